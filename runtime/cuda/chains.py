"""Which steps of a program run as one kernel. Pure: no array, no device.

A *chain* is a set of pointwise ops over one shape, and perhaps reductions of their results over the same
axes. It reads each of its inputs once, and writes only what is read outside of it.

All other steps (products, collectives, feeds, halves of collectives, ...) keep their order; they divide
the program into *gaps*, of which gap k lies before the k-th of them. Every chain stays in the gap of its
last member or goes nowhere: members move later, never earlier, and only past steps that neither read what
they make nor make memory scarcer. Chains are joined greedily, a consumer to its producers first, then
chains of one gap that read the same array.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from math import prod
from typing import Any

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.expression import scalar_dtype
from meshtape.runtime.cuda.links import Chain, End, Link, Pointwise, Reduction, Types, describe
from meshtape.runtime.overlap import Placed

# More operands or links than these make kernels that need more registers than they save reads.
MOST_ARRAYS, MOST_NUMBERS, MOST_LINKS = 16, 32, 64
# Bytes by which waiting for its last member may add to what a chain keeps alive.
SLACK = 1 << 20
# Of the readers of one array, how many chains each is tried with.
NEIGHBOURS = 8


# --- grouping ---------------------------------------------------------------------------------------

class Group:
    """Steps that will be one kernel; `gap` is where it runs."""

    def __init__(self, member: int, gap: int, what: Pointwise | Reduction) -> None:
        self.members = [member]
        self.gap = gap
        self.shape = what.shape
        self.reduced = what.reduced if isinstance(what, Reduction) else None


class Grouping:
    """The steps of a program, and which go together."""

    def __init__(self, steps: Sequence[Placed], types: Types, dead: Container[int]) -> None:
        self.steps, self.dead = steps, dead
        self.types = dict(types)
        for step in steps:
            made = zip(step.call.shapes, step.call.dtypes, strict=True)
            self.types.update(zip(step.outs, made, strict=True))
        self.what = [describe(step, self.types) for step in steps]
        self.gap: list[int] = []            # of a step; a boundary's gap is the one that it ends
        self.group: list[Group | None] = []
        self.consumers: dict[int, list[int]] = {}
        self.producer: dict[int, int] = {}
        self.horizon = 0                    # steps from here on are in no group with others
        gap = 0
        for at, (step, what) in enumerate(zip(steps, self.what, strict=True)):
            self.gap.append(gap)
            self.group.append(None if what is None else Group(at, gap, what))
            gap += what is None
            self.producer.update(dict.fromkeys(step.outs, at))
            for slot in dict.fromkeys(step.ins):
                self.consumers.setdefault(slot, []).append(at)

    def groups(self) -> list[Group]:
        return list(dict.fromkeys(g for g in self.group if g is not None))

    def join(self) -> None:
        """Put together what goes together."""
        for at, step in enumerate(self.steps):
            self.horizon = at + 1
            for slot in dict.fromkeys(step.ins):
                mine, maker = self.group[at], self.producer.get(slot)
                theirs = None if maker is None else self.group[maker]
                if mine is not None and theirs is not None:
                    self.try_merge(theirs, mine)
        for slot, readers in self.consumers.items():
            if slot >= 0:
                self._join_readers([at for at in readers if self._spans(at, slot)])

    def _spans(self, at: int, slot: int) -> bool:
        """Whether a step can be in a chain and reads the slot element by element."""
        group = self.group[at]
        return group is not None and self.types[slot][0] == group.shape

    def _join_readers(self, readers: Sequence[int]) -> None:
        """Put together steps of one gap that read the same array."""
        recent: list[int] = []
        for at in readers:
            for other in recent:
                mine, theirs = self.group[at], self.group[other]
                assert mine is not None and theirs is not None
                if mine.gap == theirs.gap:
                    self.try_merge(theirs, mine)
            if self.group[at] not in [self.group[other] for other in recent]:
                recent = [*recent[1 - NEIGHBOURS:], at]

    def try_merge(self, a: Group, b: Group) -> None:
        """Make one group of two, in b's place or a's, whichever is later, if that is right and good."""
        if a is b or a.shape != b.shape:
            return
        if a.reduced is not None and b.reduced is not None and a.reduced != b.reduced:
            return
        gap = max(a.gap, b.gap)
        members = sorted(a.members + b.members)
        if self._fits(members) and self._in_order(members, gap) and self._affordable(members, gap):
            a.members, a.gap = members, gap
            a.reduced = b.reduced if a.reduced is None else a.reduced
            for at in b.members:
                self.group[at] = a

    def _fits(self, members: Sequence[int]) -> bool:
        made = {s for at in members for s in self.steps[at].outs}
        read = {s for at in members for s in self.steps[at].ins if s not in made}
        numbers = sum(s < 0 for s in read)
        arrays = len(read) - numbers + len(self.outputs(members))
        return len(members) <= MOST_LINKS and numbers <= MOST_NUMBERS and arrays <= MOST_ARRAYS

    def outputs(self, members: Sequence[int]) -> list[int]:
        """Slots that members make and others read, or that are kept, or that nobody reads."""
        inside = set(members)
        found = []
        for at in members:
            slot, = self.steps[at].outs
            readers = self.consumers.get(slot, ())
            inner = slot in self.dead and readers and inside.issuperset(readers)
            if type(self.what[at]) is Reduction or not inner:
                found.append(slot)
        return found

    def _in_order(self, members: Sequence[int], gap: int) -> bool:
        """Whether in this gap, all that these steps make is in time, and nothing of it is needed to make
        what they read.
        """
        inside = set(members)
        todo = [at for m in members for s in self.steps[m].outs for at in self.consumers.get(s, ())
                if at not in inside or type(self.what[m]) is Reduction]
        if not inside.isdisjoint(todo):
            return False
        seen: set[int] = set()
        while todo:
            at = todo.pop()
            group = self.group[at]
            where = self.gap[at] if group is None else group.gap
            if where < gap:
                return False
            if group is None or where > gap or at in seen or at >= self.horizon:
                continue
            seen.update(group.members)
            after = [r for m in group.members for s in self.steps[m].outs for r in self.consumers.get(s, ())]
            if not inside.isdisjoint(after):
                return False
            todo += after
        return True

    def _affordable(self, members: Sequence[int], gap: int) -> bool:
        """Whether waiting for the last member frees as much memory as the operands of the others take till
        then.
        """
        late = [at for at in members if self._place(at) < gap]
        made = {s for at in members for s in self.steps[at].outs}
        longer = {s for at in late for s in self.steps[at].ins
                  if s >= 0 and s not in made and s in self.dead
                  and max(map(self._place, self.consumers[s])) < gap}
        written = set(self.outputs(members))
        saved = {s for at in late for s in self.steps[at].outs if s not in written
                 and any(self._place(r) >= gap for r in self.consumers[s])}
        return self._bytes(longer) <= self._bytes(saved) + (SLACK if late else 0)

    def _place(self, at: int) -> int:
        group = self.group[at]
        return self.gap[at] if group is None else group.gap

    def _bytes(self, slots: Iterable[int]) -> int:
        return sum(prod(self.types[s][0]) * self.types[s][1].itemsize for s in slots)


# --- the program afterwards -------------------------------------------------------------------------

def group_steps(steps: Sequence[Placed], types: Types, dead: Container[int],
                make: Callable[[Chain], Callable[..., Any]]) -> list[Placed]:
    """The steps with every chain as one call of make(chain), a function (device, *arrays and numbers,
    out=None).

    `types` gives local shape and dtype of slots that are there before the program, `dead` are slots that
    nobody reads after it. A fused call's `over` says which results may be written over which inputs;
    `numbers` how its scalars arrive.
    """
    grouping = Grouping(steps, types, dead)
    grouping.join()
    return [steps[unit] if isinstance(unit, int) else fused(grouping, unit, make)
            for unit in ordered(grouping)]


def ordered(grouping: Grouping) -> list[int | Group]:
    """Groups and other steps, by gap and then as data flow; where both orders are right, as they were."""
    unit_of: list[int | Group] = [at if g is None else g for at, g in enumerate(grouping.group)]
    units = list(dict.fromkeys(unit_of))
    first = {u: u if isinstance(u, int) else u.members[0] for u in units}
    after: dict[int | Group, set[int | Group]] = {u: set() for u in units}
    waits = dict.fromkeys(units, 0)

    def edge(before: int | Group, then: int | Group) -> None:
        if before is not then and then not in after[before]:
            after[before].add(then)
            waits[then] += 1

    boundaries = [u for u in units if isinstance(u, int)]
    for k in range(1, len(boundaries)):
        edge(boundaries[k - 1], boundaries[k])
    for slot, readers in grouping.consumers.items():
        maker = grouping.producer.get(slot)
        for at in readers if maker is not None else ():
            edge(unit_of[maker], unit_of[at])   # type: ignore[index]
    for unit in units:
        if not isinstance(unit, int):
            if unit.gap:
                edge(boundaries[unit.gap - 1], unit)
            if unit.gap < len(boundaries):
                edge(unit, boundaries[unit.gap])
    ready = [(first[u], u) for u in units if not waits[u]]
    heapify(ready)
    out = []
    while ready:
        _, unit = heappop(ready)
        out.append(unit)
        for then in after[unit]:
            waits[then] -= 1
            if not waits[then]:
                heappush(ready, (first[then], then))
    assert len(out) == len(units), "chains depend on each other"
    return out


def fused(grouping: Grouping, group: Group, make: Callable[[Chain], Callable[..., Any]]) -> Placed:
    """The step that does what a group's steps do. A reduction that is alone stays what it was."""
    steps = [grouping.steps[at] for at in group.members]
    if len(steps) == 1 and type(grouping.what[group.members[0]]) is Reduction:
        return steps[0]
    chain, ins, outs = chain_of(grouping, group)
    over = tuple((k, i) for k, value in enumerate(chain.results) for i, operand in enumerate(chain.arrays)
                 if operand == (chain.shape, chain.dtype(value)))
    dtype = [chain.dtype(value) for value in chain.results] + [end.dtype for end in chain.ends]
    shapes = [chain.shape] * len(chain.results) + [end.shape for end in chain.ends]
    names = [step.call.name for step in steps]
    name = names[0] if len(names) == 1 else f"fused {' '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
    call = steps[0].call._replace(
        kind="fused", name=name, function=make(chain), attrs={}, op=None, many=len(outs) > 1,
        dtypes=tuple(dtype), shapes=tuple(shapes), over=over, on_device=True, numbers=chain.numbers)
    return Placed(call, ins, outs, steps[0].origin)


def chain_of(grouping: Grouping, group: Group) -> tuple[Chain, tuple[int, ...], tuple[int, ...]]:
    """A group as a chain, its input slots and its output slots."""
    links = [at for at in group.members if type(grouping.what[at]) is Pointwise]
    ends = [at for at in group.members if type(grouping.what[at]) is Reduction]
    made = [grouping.steps[at].outs[0] for at in links]
    read = dict.fromkeys(s for at in group.members for s in grouping.steps[at].ins)
    arrays = [s for s in read if s >= 0 and s not in made]
    numbers = list(dict.fromkeys(n for at in links for n in _numbers(grouping, at)))
    index: dict[Any, int] = {key: i for i, key in enumerate((*arrays, *numbers, *made))}
    outputs = set(grouping.outputs(links + ends))
    results = [s for s in made if s in outputs]
    chain = Chain(
        group.shape, tuple(grouping.types[s] for s in arrays), "".join(letter for _, letter in numbers),
        tuple(_link(grouping, at, index) for at in links), tuple(index[s] for s in results),
        tuple(_end(grouping, at, index) for at in ends), group.reduced or ())
    outs = (*results, *(grouping.steps[at].outs[0] for at in ends))
    return chain, (*arrays, *(s for s, _ in numbers)), outs


def _numbers(grouping: Grouping, at: int) -> list[tuple[int, str]]:
    """(negative slot, letter) of every scalar of a step."""
    step, what = grouping.steps[at], grouping.what[at]
    assert isinstance(what, Pointwise)
    return [(s, "d" if dtypes.is_floating(d) else "i")
            for s, d in zip(step.ins, what.given, strict=True) if s < 0]


def _link(grouping: Grouping, at: int, index: Mapping[Any, int]) -> Link:
    step, what = grouping.steps[at], grouping.what[at]
    assert isinstance(what, Pointwise)
    numbers = iter(_numbers(grouping, at))
    out = step.call.dtypes[0]
    given = tuple(d if s >= 0 else scalar_dtype(d, out) for s, d in zip(step.ins, what.given, strict=True))
    operands = tuple(index[s if s >= 0 else next(numbers)] for s in step.ins)
    return Link(step.call.op, step.call.attrs, operands, given, out)


def _end(grouping: Grouping, at: int, index: Mapping[Any, int]) -> End:
    step, what = grouping.steps[at], grouping.what[at]
    assert isinstance(what, Reduction)
    shape, dtype = step.call.shapes[0], step.call.dtypes[0]
    return End(what.combine, index[step.ins[0]], what.total, what.divisor, shape, dtype)
