"""A backward walk recorded once, then replayed.

What a walk records depends only on the structure of the tape below its root: the plans of the nodes, which
node's gradient goes where, which kept blocks are the same block, the specs of the leaves, and the values of
Python scalars (numbers of random draws apart, which a vjp hands on unseen). A survey of the tape collects
all that as a key and the kept blocks as operands. The first walk with a key is noted as a recording; the
next ones append the recording's instructions in one go, without running any vjp. A training step with the
same shapes as the last is thus walked at a fraction of the cost, while a program that records something else
each time simply walks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from meshtape.autograd.tensor import Tensor
from meshtape.scheduler.layout import Spec
from meshtape.scheduler.planner import Plan
from meshtape.scheduler.session import Block, Draw, Recording, Session
from meshtape.scheduler.sites import Site

KNOWN = 256         # recordings remembered in one place


class Survey(NamedTuple):
    """The tape below a root: `key` is its structure, `operands` the blocks a walk reads, each once, and
    random draws. `freed` are the nodes that keep something until a backward.
    """

    key: tuple[Any, ...]
    operands: list[Any]
    leaves: list[Tensor]
    freed: list[Any]


class Replay(NamedTuple):
    """The recorded instructions; for each leaf, where its new gradient comes from and its spec.

    The gradient is result k of the recording, or operand -1 - k; the spec is None where there is none.
    """

    recording: Recording
    sources: tuple[int, ...]
    specs: tuple[Spec | None, ...]


def remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Add to a collection of recordings, which forgets its oldest."""
    known[key] = value
    if len(known) > KNOWN:
        del known[next(iter(known))]


def survey(root: Any, gradient: Tensor | None, session: Session) -> Survey | None:
    """Collect the structure below `root`; None if something there must be run each time, or was freed.

    `gradient` is None if the walk itself makes the ones that it starts from.
    """
    kind = session.Block
    places: dict[Any, int] = {}
    key: list[Any] = [None]
    if gradient is not None:
        places[gradient.block] = 0
        key = [gradient.spec]
    order = {root: 0}
    nodes = [root]
    leaves: list[Tensor] = []
    freed: list[Any] = []
    draws: list[Draw] = []
    for node in nodes:
        plan = node.plan
        if plan is None:                                    # a leaf, or what cannot be replayed
            if node.hooks or not node.replayable:
                return None
            tensor = node.tensor()
            if tensor is None:
                key.append(None)
                continue
            leaves.append(tensor)
            key.append(tensor.spec)
            old = getattr(tensor, "_grad", None)
            if old is not None:
                key += (old.spec, places.setdefault(old.block, len(places)))
            continue
        kept = node.kept_in
        if kept is None or node.hooks:
            return None
        key.append(plan)
        for edge in node.edges:
            if edge is None:
                key.append(None)
                continue
            target, index = edge
            at = order.get(target)
            if at is None:
                at = order[target] = len(nodes)
                nodes.append(target)
            key.append((at, index) if index else at)
        for x in kept:
            if type(x) is kind:
                key.append(places.setdefault(x, len(places)))
            elif type(x) is Draw:
                draws.append(x)
            else:
                key.append(x)
        if node.kept_out is not None:
            for x in node.kept_out:
                key.append(places.setdefault(x, len(places)))
        if plan.frees:
            freed.append(node)
    return Survey(tuple(key), [*places, *draws], leaves, freed)


def replay(found: Replay, seen: Survey, session: Session, site: Site) -> None:
    """Do what a noted walk did, for this tape."""
    blocks = session.repeat(found.recording, seen.operands, site)
    for leaf, k, spec in zip(seen.leaves, found.sources, found.specs, strict=True):
        if spec is not None:
            t: Tensor = _new(Tensor)
            t.block = blocks[k] if k >= 0 else seen.operands[-1 - k]
            t.spec = spec
            t.edge = None
            leaf._grad = t


_new = object.__new__


class Trace:
    """Notes what is recorded meanwhile. What does more than record ops (draws, feeds, fetches) is spoiled."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.steps: list[tuple[Plan | int, Sequence[Any], Sequence[Any]]] = []
        self.spoiled = False

    def __enter__(self) -> Trace:
        kind = type(self.session)
        shadows: dict[str, Any] = {"record": self.record, "redistribute": self.redistribute}
        shadows.update(
            {name: self._spoiling(getattr(kind, name)) for name in ("place", "draw", "fetch", "repeat")}
        )
        vars(self.session).update(shadows)
        self._names = list(shadows)
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self._names:
            del vars(self.session)[name]

    def record(self, plan: Plan, inputs: Sequence[Any], site: Site) -> list[Block]:
        made = type(self.session).record(self.session, plan, inputs, site)
        self.steps.append((plan, inputs, made))
        return made

    def redistribute(self, block: Block, spec: Spec, placements: Any) -> tuple[Block, Spec]:
        made, there = type(self.session).redistribute(self.session, block, spec, placements)
        if made is not block:
            self.steps.append((self.session.planner.move(spec, placements), [block], [made]))
        return made, there

    def _spoiling(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.spoiled = True
            return method(self.session, *args, **kwargs)
        return call

    def recording(self, operands: Sequence[Any],
                  results: Iterable[Block], in_order: bool = False) -> tuple[Recording, list[int]] | None:
        """What was noted, with operands by their position, and where to find each of the results: k for
        result k of the recording, -1 - k for operand k. None if it cannot be repeated.

        Scalars among the operands are told by identity, or, with `in_order`, are all that were recorded.
        """
        code = None if self.spoiled else _Code(operands, in_order)
        if code is None or not all(code.add(*step) for step in self.steps):
            return None
        places = [code.where.get(int(b)) for b in results]
        shown = tuple(dict.fromkeys(k for kind, k in filter(None, places) if kind == "made"))
        if None in places:
            return None
        sources = [shown.index(k) if kind == "made" else -1 - k for kind, k in filter(None, places)]
        return code.recording(shown), sources


def noted_walk(trace: Trace, seen: Survey) -> Replay | None:
    """The walk that `trace` noted, to be replayed on a tape with the same survey; None if it cannot be."""
    grads = [getattr(leaf, "_grad", None) for leaf in seen.leaves]
    found = trace.recording(seen.operands, [g.block for g in grads if g is not None])
    if found is None:
        return None
    recording, sources = found
    left = iter(sources)
    return Replay(recording, tuple(0 if g is None else next(left) for g in grads),
                  tuple(None if g is None else g.spec for g in grads))


class _Code:
    """The flat entries of a recording: instruction numbers, operands, constants, and outputs, by position."""

    def __init__(self, operands: Sequence[Any], in_order: bool) -> None:
        self.where = {int(b): ("block", i) for i, b in enumerate(operands) if isinstance(b, Block)}
        scalars = [("scalar", i) for i, x in enumerate(operands) if not isinstance(x, Block)]
        self.next = iter(scalars) if in_order else None
        self.scalars = {id(operands[i]): (kind, i) for kind, i in scalars}
        self.constants: list[Any] = []
        self.entries: list[tuple[str, int]] = []
        self.made = self.count = 0

    def add(self, step: Plan | int, inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
        """One recorded op with its moves; False if an operand is not known."""
        places = []
        for i, x in enumerate(inputs):
            if not isinstance(x, Block):
                place = self.scalars.get(id(x)) if self.next is None else next(self.next)
                if place is None:
                    place = ("constant", len(self.constants))
                    self.constants.append(x)
            elif int(x) in self.where:
                place = self.where[int(x)]
            else:
                return False
            for number in () if isinstance(step, int) or step.before is None else step.before[i]:
                self.entries += [("number", number), place, ("made", self.made)]
                place = ("made", self.made)
                self.made += 1
                self.count += 1
            places.append(place)
        self.entries += [("number", step if isinstance(step, int) else step.number), *places]
        for b in outputs:
            self.where[int(b)] = ("made", self.made)
            self.entries.append(("made", self.made))
            self.made += 1
        self.count += 1
        return True

    def recording(self, shown: tuple[int, ...]) -> Recording:
        """The entries as a selection from numbers, blocks, scalars, constants and outputs, in this order."""
        numbers = tuple(k for kind, k in self.entries if kind == "number")
        uses, given = (tuple(dict.fromkeys(k for kind, k in self.entries if kind == wanted))
                       for wanted in ("block", "scalar"))
        values = [("block", k) for k in uses] + [("scalar", k) for k in given]
        values += [("constant", k) for k in range(len(self.constants))]
        values += [("made", k) for k in range(self.made)]
        place = {value: len(numbers) + i for i, value in enumerate(values)}
        nth = iter(range(len(numbers)))
        picks = [next(nth) if entry[0] == "number" else place[entry] for entry in self.entries]
        return Recording(
            numbers,
            uses,
            given,
            tuple(self.constants),
            self.made,
            itemgetter(*picks) if picks else None,
            self.count,
            shown,
            tuple(k for k in range(self.made) if k not in shown),
        )
