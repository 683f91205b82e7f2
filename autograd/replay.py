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

from collections import OrderedDict
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from meshtape.autograd.tensor import Tensor
from meshtape.scheduler.layout import Spec
from meshtape.scheduler.planner import Plan
from meshtape.scheduler.session import Block, Draw, Recording, Session
from meshtape.scheduler.sites import Site

KNOWN = 256         # walks remembered per session


class Survey(NamedTuple):
    """The tape below a root: `key` is its structure, `operands` the blocks a walk reads, each once."""

    key: tuple[Any, ...]
    operands: list[Any]
    nodes: list[Any]
    leaves: list[Tensor]


class Replay(NamedTuple):
    """The recorded instructions, and the spec of each leaf's new gradient (None where there is none)."""

    recording: Recording
    specs: tuple[Spec | None, ...]


class Replays:
    """The walks that a session has noted."""

    def __init__(self) -> None:
        self.known: OrderedDict[Any, Replay | None] = OrderedDict()

    def find(self, key: tuple[Any, ...]) -> Replay | None:
        found = self.known.get(key)
        if found is not None:
            self.known.move_to_end(key)
        return found

    def keep(self, key: tuple[Any, ...], replay: Replay | None) -> None:
        self.known[key] = replay
        if len(self.known) > KNOWN:
            self.known.popitem(last=False)


def survey(root: Any, gradient: Tensor) -> Survey | None:
    """Collect the structure below `root`; None if something there must be run each time."""
    places = {gradient.block: 0}
    order = {root: 0}
    nodes = [root]
    key: list[Any] = [gradient.spec]
    draws: list[Draw] = []
    leaves: list[Tensor] = []
    for node in nodes:
        if node.hooks or not node.replayable:
            return None
        plan = node.plan
        if plan is None:                                    # a leaf
            tensor = node.tensor()
            if tensor is None:
                key.append(None)
                continue
            leaves.append(tensor)
            old = tensor.raw_grad
            key.append(tensor.spec)
            if old is not None:
                key += (old.spec, places.setdefault(old.block, len(places)))
            continue
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
            key.append(at)
            if index:
                key.append((index,))
        if node.kept_out is not None:
            for b in node.kept_out:
                key.append(places.setdefault(b, len(places)))
        for x in node.kept_in:
            if isinstance(x, Block):
                key.append(places.setdefault(x, len(places)))
            elif type(x) is Draw:
                draws.append(x)
            else:
                key.append(x)
    return Survey(tuple(key), [*places, *draws], nodes, leaves)


def replay(found: Replay, seen: Survey, session: Session, site: Site) -> None:
    """Do what a noted walk did, for this tape."""
    blocks = session.repeat(found.recording, seen.operands, site)
    for leaf, block, spec in zip(seen.leaves, blocks, found.specs, strict=True):
        if spec is not None:
            t: Tensor = _new(Tensor)
            t.block = block  # type: ignore[assignment]
            t.spec = spec
            t.edge = None
            leaf._grad = t


_new = object.__new__


class Trace:
    """Notes what a walk records. A walk that does more than record ops (draws, feeds, fetches) is spoiled."""

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
        def call(*args: Any) -> Any:
            self.spoiled = True
            return method(self.session, *args)
        return call

    def replay(self, seen: Survey) -> Replay | None:
        """The noted walk, every operand named by its position; None if it cannot be repeated."""
        code = None if self.spoiled else _Code(seen.operands)
        if code is None or not all(code.add(*step) for step in self.steps):
            return None
        grads = [leaf.raw_grad for leaf in seen.leaves]
        if any(g is not None and int(g.block) not in code.where for g in grads):
            return None
        results = [None if g is None else code.where[int(g.block)] for g in grads]
        return Replay(code.recording(results), tuple(None if g is None else g.spec for g in grads))


class _Code:
    """The flat entries of a recording: instruction numbers, operands, constants, and outputs, by position."""

    def __init__(self, operands: Sequence[Any]) -> None:
        self.where = {int(b): ("operand", i) for i, b in enumerate(operands) if isinstance(b, Block)}
        self.draws = {id(x): ("operand", i) for i, x in enumerate(operands) if type(x) is Draw}
        self.constants: list[Any] = []
        self.entries: list[tuple[str, int]] = []
        self.made = self.count = 0

    def add(self, step: Plan | int, inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
        """One recorded op with its moves; False if an operand is not known."""
        places = []
        for i, x in enumerate(inputs):
            if not isinstance(x, Block):
                place = self.draws.get(id(x))
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

    def recording(self, results: Sequence[tuple[str, int] | None]) -> Recording:
        numbers = tuple(k for kind, k in self.entries if kind == "number")
        uses = tuple(dict.fromkeys(k for kind, k in self.entries if kind == "operand"))
        constants = len(numbers) + len(uses)
        base = {"constant": constants, "made": constants + len(self.constants)}
        use_place = {k: len(numbers) + i for i, k in enumerate(uses)}
        picks, at = [], 0
        for kind, k in self.entries:
            if kind == "number":
                picks.append(at)
                at += 1
            else:
                picks.append(use_place[k] if kind == "operand" else base[kind] + k)
        shown = {r[1] for r in results if r is not None and r[0] == "made"}
        return Recording(
            numbers,
            uses,
            tuple(self.constants),
            self.made,
            itemgetter(*picks) if picks else None,
            self.count,
            tuple(k for k in range(self.made) if k not in shown),
            tuple(None if r is None else r[1] if r[0] == "operand" else -1 - r[1] for r in results),
        )
