"""The planner: from an op and the specs of its inputs to layouts, moves and a cost. Pure; sees no array.

For each mesh axis an op offers *strategies*: leave every input replicated, split one index letter, or let
Partial pass through a set of inputs in which the op is linear. The plan takes, over all mesh axes together,
the combination of least modelled time: moves of the inputs + compute divided by the split. Where every input
is replicated along an axis, splitting also pays for gathering the result back, so small work stays whole.
Ties: touch nothing first, then divide.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.dtypes import widens
from meshtape.runtime.errors import MeshtapeError
from meshtape.runtime.op import Axes as Letters
from meshtape.runtime.op import Op
from meshtape.runtime.protocol import Instr, TensorType, plain
from meshtape.runtime.shards import REPLICATE, Placement, Placements, Shape, is_partial
from meshtape.scheduler.cost import CPU, Device, Link, compute_seconds
from meshtape.scheduler.layout import Axes, Spec, Specs
from meshtape.scheduler.redistribution import Route, route


class Strategy(NamedTuple):
    """One way to run an op along one mesh axis."""

    ins: tuple[Placement, ...]
    outs: tuple[Placement, ...]
    letter: str             # the letter that is split, "" if none

    @property
    def divides(self) -> bool:
        return self.letter != ""


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """How to run one op on inputs of known specs. Everything that recording needs is looked up once, here.

    `before[i]` are the numbers of the instructions to run on input i first (moves, casts); `number` is the
    op's own instruction; `plain` says that there is nothing to run first, and no input is a scalar. The tape
    keeps the inputs at `kept` (those that a vjp reads, and scalars), which `keep` takes from a list.
    `seconds` and `wire` (bytes per worker) are the model's.
    """

    op: Op
    attrs: dict[str, Any]
    number: int
    before: tuple[tuple[int, ...], ...] | None
    plain: bool
    in_specs: tuple[Spec, ...]
    outs: tuple[Spec, ...]
    single: Spec | None
    differentiable: bool
    kept: tuple[int, ...]
    keep: Callable[[list[Any]], Sequence[Any]]
    kept_outputs: tuple[int, ...]
    frees: bool                 # whether the tape keeps blocks until backward
    seconds: float
    wire: float


class Planner:
    """Plans for one mesh, cached by op, attrs and input specs."""

    def __init__(self, axes: Axes, links: Sequence[Link], device: Device = CPU) -> None:
        self.axes = axes
        self.links = tuple(links)
        self.device = device
        self.specs = Specs(axes)
        self.plans: dict[Any, Plan] = {}
        self.instrs: list[Instr] = []
        self._numbers: dict[Instr, int] = {}
        self._warned: set[str] = set()

    def number(self, instr: Instr) -> int:
        """The number under which this instruction is known; equal instructions share one."""
        found = self._numbers.get(instr)
        if found is None:
            found = self._numbers[instr] = len(self.instrs)
            self.instrs.append(instr)
        return found

    def plan(self, op: Op, attrs: tuple[Any, ...], specs: tuple[Spec, ...],
             placements: Placements | None = None) -> Plan:
        """Plan `op`. `placements` fixes the first output's layout (creation); raises ShapeError, DTypeError.
        """
        attrs = plain(attrs)
        named = op.unpack(attrs)
        shapes = tuple(s.shape for s in specs)
        out_shapes = op.shape(*shapes, **named)
        casts, out_dtypes = op.dtype(*(s.weak_type if s.weak else s.dtype for s in specs), **named)
        chosen_ins, chosen_outs, seconds = self.choose(op, named, specs, out_shapes, out_dtypes, placements)
        before, arrived, wire = self._prepare(specs, casts, chosen_ins)
        outs = tuple(self.specs.get(tuple(s), np.dtype(d), p)
                     for s, d, p in zip(out_shapes, out_dtypes, chosen_outs, strict=True))
        number = self.number(Instr(op.name, attrs, arrived, tuple(o.wire for o in outs)))
        read = tuple(range(len(specs))) if op.variadic and op.kept_inputs else op.kept_inputs
        kept = tuple(i for i, s in enumerate(specs) if s.weak or i in read)
        kept_outputs = tuple(range(len(outs))) if op.n_out == -1 and op.kept_outputs else op.kept_outputs
        plain_call = not any(before) and not any(s.weak for s in specs)
        return Plan(op, named, number, before if any(before) else None, plain_call, specs, outs,
                    outs[0] if len(outs) == 1 and op.n_out == 1 else None,
                    op.vjp is not None and any(o.differentiable for o in outs),
                    kept, picker(kept), kept_outputs, bool(read or kept_outputs), seconds, wire)

    def _prepare(self, specs: Sequence[Spec], casts: Sequence[Any], wanted: Sequence[Placements],
                 ) -> tuple[tuple[tuple[int, ...], ...], tuple[TensorType | None, ...], float]:
        """Instructions that bring each input to its wanted layout and dtype, and its type on arrival."""
        before: list[tuple[int, ...]] = []
        arrived: list[TensorType | None] = []
        wire = 0.0
        for spec, cast, target in zip(specs, casts, wanted, strict=True):
            if spec.weak:
                before.append(())
                arrived.append(None)
                continue
            steps: list[int] = []
            here = spec
            target_type = spec.dtype if cast is None else cast
            if spec.partial and target_type != spec.dtype and widens(spec.dtype, target_type):
                here = self._cast(here, target_type, steps)     # addends meet in the wider dtype
            if here.placements != target:
                steps.append(self.move(here, target))
                wire += self.route(here, target).wire
                here = self.specs.get(spec.shape, here.dtype, target)
            if target_type != here.dtype:
                here = self._cast(here, target_type, steps)
            before.append(tuple(steps))
            arrived.append(here.wire)
        return tuple(before), tuple(arrived), wire

    def _cast(self, spec: Spec, dtype: Any, steps: list[int]) -> Spec:
        """Append the instruction that casts a tensor of `spec`; returns the result's spec."""
        made = self.specs.get(spec.shape, np.dtype(dtype), spec.placements)
        steps.append(self.number(Instr("astype", (made.dtype.name,), (spec.wire,), (made.wire,))))
        return made

    def route(self, spec: Spec, target: Placements) -> Route:
        return route(
            spec.shape, int(spec.dtype.itemsize), spec.placements, target, self.axes.shape, self.links
        )

    def move(self, spec: Spec, target: Placements) -> int:
        """Number of the instruction that redistributes a tensor of `spec` to `target`."""
        there = self.specs.get(spec.shape, spec.dtype, target)
        return self.number(
            Instr("redistribute", (self.route(spec, target).path,), (spec.wire,), (there.wire,))
        )

    # --- choosing layouts ---------------------------------------------------------------------------

    def choose(self, op: Op, attrs: dict[str, Any], specs: Sequence[Spec], out_shapes: Sequence[Shape],
               out_dtypes: Sequence[Any], placements: Placements | None,
               ) -> tuple[list[Placements], list[Placements], float]:
        """Placements of every input and output, and the modelled seconds."""
        if self.axes.size == 1:
            none = self.axes.replicated
            return [none] * len(specs), [none] * len(out_shapes), 0.0
        if op.n_out == -1:
            return self._pinned(attrs, specs, len(out_shapes))
        if op.axes is None:
            return self._whole(op, specs, len(out_shapes))
        letters = op.axes(*(s.shape for s in specs), **attrs)
        work = _work(letters, specs, out_shapes, out_dtypes)
        best: tuple[Any, list[Placements], list[Placements], float] | None = None
        offers = [list(strategies(op, letters, specs, attrs)) for _ in self.axes.shape]
        for order, combo in enumerate(itertools.product(*offers)):
            if not self._legal(letters, combo):
                continue
            outs = [tuple(s.outs[o] for s in combo) for o in range(len(out_shapes))]
            if placements is not None and outs[0] != placements:
                continue
            ins = [tuple(s.ins[i] for s in combo) for i in range(len(specs))]
            seconds, touched = self._price(specs, ins, outs, out_shapes, out_dtypes, combo, work,
                                           placements is not None)
            divides = sum(s.divides for s in combo)
            key = (round(seconds, 10), touched, -divides, order)
            if best is None or key < best[0]:
                best = (key, ins, outs, seconds)
        if best is None:
            raise MeshtapeError(
                f"{op.name}: no way to produce the layout {placements}; redistribute afterwards"
            )
        return best[1], best[2], best[3]

    def _price(self, specs: Sequence[Spec], ins: Sequence[Placements], outs: Sequence[Placements],
               out_shapes: Sequence[Shape], out_dtypes: Sequence[Any], combo: Sequence[Strategy],
               work: tuple[float, float], asked: bool) -> tuple[float, int]:
        seconds, touched, share = 0.0, 0, 1
        for spec, target in zip(specs, ins, strict=True):
            if not spec.weak and spec.placements != target:
                touched += 1
                seconds += self.route(spec, target).seconds
        for axis, strategy in enumerate(combo):
            if not strategy.divides:
                continue
            share *= self.axes.shape[axis]
            if not asked and all(s.weak or s.placements[axis] == REPLICATE for s in specs):
                seconds += self._gather_back(outs, out_shapes, out_dtypes, axis)
        flops, traffic = work
        return seconds + compute_seconds(flops / share, traffic / share, self.device), touched

    def _gather_back(self, outs: Sequence[Placements], shapes: Sequence[Shape], dtypes: Sequence[Any],
                     axis: int) -> float:
        seconds = 0.0
        for placements, shape, dtype in zip(outs, shapes, dtypes, strict=True):
            back = (*placements[:axis], REPLICATE, *placements[axis + 1:])
            seconds += route(tuple(shape), int(np.dtype(dtype).itemsize), placements, back, self.axes.shape,
                             self.links).seconds
        return seconds

    def _legal(self, letters: Letters, combo: Sequence[Strategy]) -> bool:
        """A letter with an `even` extent may only be split into equal parts."""
        if not letters.even:
            return True
        parts: dict[str, int] = {}
        for n, strategy in zip(self.axes.shape, combo, strict=True):
            if strategy.letter in letters.even:
                parts[strategy.letter] = parts.get(strategy.letter, 1) * n
        return all(letters.even[c] % n == 0 for c, n in parts.items())

    def _pinned(self, attrs: dict[str, Any], specs: Sequence[Spec], n_outs: int,
                ) -> tuple[list[Placements], list[Placements], float]:
        """Optimizer updates: each parameter is updated where it lies, or where its gradient and states do if
        they are split on a mesh axis on which it is replicated; results stay there.
        """
        n = attrs["n"]
        tensors = range(len(specs) - n_outs - n, len(specs))        # before these there are numbers
        homes = [_home([specs[i].placements for i in tensors[k::n]]) for k in range(n)]
        ins = [self.axes.replicated] * len(specs)
        seconds = 0.0
        for k, i in enumerate(tensors):
            ins[i] = homes[k % n]
            seconds += self.route(specs[i], ins[i]).seconds
        return ins, [homes[k % n] for k in range(n_outs)], seconds

    def _whole(self, op: Op, specs: Sequence[Spec], n_outs: int,
               ) -> tuple[list[Placements], list[Placements], float]:
        """An op without a split rule runs replicated; say so once if that moves anything."""
        none = self.axes.replicated
        moved = [s for s in specs if not s.weak and s.placements != none]
        if moved and op.name not in self._warned:
            self._warned.add(op.name)
            warnings.warn(f"{op.name} has no split rule: its inputs are gathered and every worker computes "
                          f"the whole result", stacklevel=2)
        return [none] * len(specs), [none] * n_outs, sum(self.route(s, none).seconds for s in moved)


def _home(placements: Sequence[Placements]) -> Placements:
    """Where to update a parameter, given its placements and those of its gradient and states."""
    return tuple(
        next((p for p in along if p != REPLICATE and not is_partial(p)), REPLICATE)
        for along in zip(*placements, strict=True)
    )


def picker(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """What takes the elements at `places` from a list, as a sequence."""
    first, stop = (places[0], places[-1] + 1) if places else (0, 0)
    if tuple(places) == tuple(range(first, stop)):
        return itemgetter(slice(first, stop))
    return itemgetter(*places)


def strategies(op: Op, letters: Letters, specs: Sequence[Spec], attrs: dict[str, Any]) -> Iterator[Strategy]:
    """Every way to run `op` along one mesh axis."""
    n_in, n_out = len(letters.ins), len(letters.outs)
    yield Strategy((REPLICATE,) * n_in, (REPLICATE,) * n_out, "")
    named = [*letters.ins, *letters.outs]
    for letter in dict.fromkeys("".join(named).replace(".", "")):
        if any(text.count(letter) > 1 for text in named):
            continue
        lacking = any(letter not in text for text in letters.outs)
        if lacking and not letters.combine:
            continue
        additive = letters.additive if lacking else ()
        if any(specs[i].weak for i in additive):
            continue
        ins: tuple[Placement, ...] = tuple(
            text.index(letter) if letter in text else ("sum" if i in additive else REPLICATE)
            for i, text in enumerate(letters.ins))
        outs: tuple[Placement, ...] = tuple(
            text.index(letter) if letter in text else letters.combine for text in letters.outs)
        yield Strategy(ins, outs, letter)
    for group in op.linear_sets([s.dtype for s in specs], attrs):
        if not any(i >= n_in or specs[i].weak for i in group):
            yield Strategy(
                tuple("sum" if i in group else REPLICATE for i in range(n_in)), ("sum",) * n_out, ""
            )


def _work(letters: Letters, specs: Sequence[Spec], out_shapes: Sequence[Shape],
          out_dtypes: Sequence[Any]) -> tuple[float, float]:
    """(floating-point operations, bytes of memory traffic) of the whole op, from its index letters."""
    extents: dict[str, int] = {}
    traffic = 0.0
    for text, spec in zip(letters.ins, specs, strict=True):
        extents.update(zip(text, spec.shape, strict=False))
        traffic += 0 if spec.weak else spec.nbytes
    for text, shape, dtype in zip(letters.outs, out_shapes, out_dtypes, strict=True):
        extents.update(zip(text, shape, strict=False))
        traffic += np.dtype(dtype).itemsize * prod(shape)
    return 2.0 * prod(extents.values()), traffic

