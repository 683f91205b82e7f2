"""From a recorded batch to the body that workers run: duplicate reductions merged, reductions bucketed.

Pure: tuples in, tuples out. A reduction is put off until a result of its bucket is first needed (or the
bucket is full), so that one collective carries many gradients; and so are all-gathers of what a batch made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

from meshtape.runtime.dtypes import canonical
from meshtape.runtime.moves import changed_axis
from meshtape.runtime.protocol import Instr
from meshtape.runtime.shards import REPLICATE, is_partial

# What goes to the front of a batch: bytes of a reduction, how many steps it is with those that it needs, and
# bytes of each of their operands.
TINY, FEW, SLIGHT = 1 << 12, 4, 1 << 16


class Recorded(NamedTuple):
    """One recorded instruction: its number, slots (negative inputs are scalars), and its place in the batch.
    """

    number: int
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    origin: int


def unflatten(body: Sequence[int], instrs: Sequence[Instr]) -> list[Recorded]:
    """The recorded batch is flat: number, inputs, outputs, number, ...; cut it by the instructions' arity."""
    out: list[Recorded] = []
    at = 0
    while at < len(body):
        instr = instrs[body[at]]
        mid = at + 1 + len(instr.ins)
        end = mid + len(instr.outs)
        out.append(Recorded(body[at], tuple(body[at + 1:mid]), tuple(body[mid:end]), len(out)))
        at = end
    return out


class Kind(NamedTuple):
    """What must agree for collectives to travel as one message: the verb, mesh axis, reduction and dtype."""

    verb: str               # all_reduce_bucket, reduce_scatter_bucket or all_gather_bucket
    axis: int
    combine: str            # "" for an all-gather
    dtype: str


class Collective(NamedTuple):
    """A redistribution that is nothing but one collective; `dim` is what is scattered or gathered, or -1."""

    kind: Kind
    dim: int


def collective(instr: Instr) -> Collective | None:
    """What a redistribution that can join a bucket is, else None."""
    if instr.op != "redistribute" or len(instr.attrs[0]) != 2:
        return None
    before, after = instr.attrs[0]
    axis = changed_axis(before, after)
    source, target = before[axis], after[axis]
    dtype = instr.outs[0].dtype
    if is_partial(source) and not is_partial(target):
        if target == REPLICATE:
            return Collective(Kind("all_reduce_bucket", axis, str(source), dtype), -1)
        return Collective(Kind("reduce_scatter_bucket", axis, str(source), dtype), int(target))
    if not is_partial(source) and source != REPLICATE and target == REPLICATE:
        return Collective(Kind("all_gather_bucket", axis, "", dtype), int(source))
    return None


def merge_duplicates(steps: Sequence[Recorded], instrs: Sequence[Instr], temporary: frozenset[int],
                     ) -> list[Recorded]:
    """A value of this batch that several ops need in one other layout is redistributed once.

    Only where the result is a temporary: one that the user can reach keeps its own slot. Values from before
    the batch are left alone unless they are Partial: a parameter that was gathered for forward is better
    gathered again for backward than kept whole in between.
    """
    known: dict[tuple[int, int], int] = {}
    same: dict[int, int] = {}
    made: set[int] = set()
    out = []
    for step in steps:
        ins = tuple(same.get(s, s) for s in step.ins)
        made.update(step.outs)
        instr = instrs[step.number]
        if instr.op == "redistribute" and step.outs[0] in temporary and (
                ins[0] in made or any(is_partial(p) for p in instr.attrs[0][0])):
            key = (step.number, ins[0])
            if key in known:
                same[step.outs[0]] = known[key]
                continue
            known[key] = step.outs[0]
        out.append(step._replace(ins=ins))
    return out


def bucket(steps: Sequence[Recorded], instrs: Sequence[Instr], number: Callable[[Instr], int],
           limits: Sequence[int]) -> list[Recorded]:
    """Group collectives that can travel together; each group runs where one of its results is first needed,
    or, if it is not needed before, where it has the bytes that `limits` says for its mesh axis.

    An all-gather of what exists before the batch is left where it is recorded: a sharded parameter that is
    gathered for one layer shall not wait for, nor live as long as, those of the others.
    """
    out: list[Recorded] = []
    open_: dict[Kind, list[tuple[Recorded, int]]] = {}
    home: dict[int, Kind] = {}
    size: dict[Kind, int] = {}
    made: set[int] = set()

    def close(kind: Kind) -> None:
        group = open_.pop(kind)
        size.pop(kind)
        for s, _ in group:
            home.pop(s.outs[0])
        out.append(group[0][0] if len(group) == 1 else _joined(kind, group, instrs, number))

    for step in steps:
        for kind in dict.fromkeys(home[s] for s in step.ins if s in home):
            close(kind)
        instr = instrs[step.number]
        found = collective(instr)
        if found is None or (found.kind.verb == "all_gather_bucket" and step.ins[0] not in made):
            out.append(step)
        else:
            kind = found.kind
            open_.setdefault(kind, []).append((step, found.dim))
            home[step.outs[0]] = kind
            size[kind] = size.get(kind, 0) + _bytes(instr)
            if size[kind] >= limits[kind.axis]:
                close(kind)
        made.update(step.outs)
    for kind in list(open_):
        close(kind)
    return out


def hoist(steps: Sequence[Recorded], instrs: Sequence[Instr], overlaps: Sequence[bool]) -> list[Recorded]:
    """Collectives on mesh axes that overlap, moved to where their last operand is made, to run beside what
    follows there.
    """
    maker: dict[int, int] = {}
    after: dict[int, list[Recorded]] = {}
    moved: set[int] = set()
    for at, step in enumerate(steps):
        made = max((maker.get(s, -1) for s in step.ins), default=-1)
        if _reduces(instrs[step.number], overlaps) and made >= 0:
            after.setdefault(made, []).append(step)
            moved.add(at)
            maker.update(dict.fromkeys(step.outs, made))
        else:
            maker.update(dict.fromkeys(step.outs, at))
    out = []
    for at, step in enumerate(steps):
        if at not in moved:
            out += [step, *after.get(at, ())]
    return out


def advance(steps: Sequence[Recorded], instrs: Sequence[Instr]) -> list[Recorded]:
    """Reductions of small values that hardly need any work, such as how many rows of a batch count, moved to
    the front with what they need.

    Every collective makes each rank wait for the slowest. The batch before has just ended with one, so that
    there is least to wait for at the front.
    """
    maker: dict[int, int] = {}
    front: set[int] = set()
    for at, step in enumerate(steps):
        maker.update(dict.fromkeys(step.outs, at))
        found = collective(instrs[step.number])
        if (
            found is not None
            and found.kind.verb == "all_reduce_bucket"
            and _bytes(instrs[step.number]) <= TINY
        ):
            needed = _needed(at, steps, maker)
            if len(needed) <= FEW and all(_slight(instrs[steps[k].number]) for k in needed - {at}):
                front |= needed
    return [steps[k] for k in sorted(front)] + [s for k, s in enumerate(steps) if k not in front]


def _needed(at: int, steps: Sequence[Recorded], maker: dict[int, int]) -> set[int]:
    """Step `at` and all steps of the batch that it needs."""
    found, queue = {at}, [at]
    while queue:
        for s in steps[queue.pop()].ins:
            k = maker.get(s)
            if k is not None and k not in found:
                found.add(k)
                queue.append(k)
    return found


def _slight(instr: Instr) -> bool:
    """Whether an instruction does no more than go over little data once, and is no collective."""
    if instr.op == "redistribute" or instr.op.endswith(("_bucket", "_update")):
        return False
    return all(canonical(t.dtype).itemsize * prod(t.shape) <= SLIGHT for t in (*instr.ins, *instr.outs) if t)


def _reduces(instr: Instr, overlaps: Sequence[bool]) -> bool:
    if instr.op in ("all_reduce_bucket", "reduce_scatter_bucket"):
        return bool(overlaps[instr.attrs[0]])
    found = collective(instr)
    return found is not None and found.kind.verb != "all_gather_bucket" and overlaps[found.kind.axis]


def _joined(kind: Kind, group: Sequence[tuple[Recorded, int]], instrs: Sequence[Instr],
            number: Callable[[Instr], int]) -> Recorded:
    steps = [s for s, _ in group]
    ins = tuple(instrs[s.number].ins[0] for s in steps)
    outs = tuple(instrs[s.number].outs[0] for s in steps)
    attrs: tuple[object, ...] = (kind.axis, kind.combine)
    if kind.verb != "all_reduce_bucket":
        attrs = (*attrs, tuple(dim for _, dim in group))
    joined = Instr(kind.verb, attrs, ins, outs)
    return Recorded(number(joined), tuple(s.ins[0] for s in steps), tuple(s.outs[0] for s in steps),
                    steps[-1].origin)


def _bytes(instr: Instr) -> int:
    """Bytes of the whole tensor."""
    out = instr.outs[0]
    return canonical(out.dtype).itemsize * prod(out.shape)
