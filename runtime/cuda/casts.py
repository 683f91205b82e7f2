"""Casts between 16-bit floats and float32 that kernels do on the way; probabilities that nobody writes. Pure.

Kernels of norms and losses read and write 16-bit floats and compute in float32. So where autocast puts a cast
before or after them, they take the uncast array, and write what the cast would have made of their result.

The row cross_entropy keeps the softmax of its logits for the derivative: an array as large as the logits, in
float32. Within one program the logits themselves do, with one number per sample.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from math import prod
from typing import Any

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.kernels.loss import cross_entropy_grad_lse, cross_entropy_lse
from meshtape.runtime.cuda.kernels.rows import wide
from meshtape.runtime.overlap import Placed
from meshtape.runtime.shards import Shape

Types = Mapping[int, tuple[Shape, Any]]


def absorb_casts(steps: Sequence[Placed], types: Types, dead: Container[int]) -> list[Placed]:
    """The steps without the casts that kernels can do.

    `types` gives local shape and dtype of the slots that are there before the first step; `dead` are slots
    that nobody reads after the last.
    """
    found = Absorbing(steps, types, dead)
    for at in range(len(steps)):
        found.loss(at)
    for at in range(len(steps)):
        found.inputs(at)
    for at in range(len(steps)):
        found.results(at)
    return found.left()


class Absorbing:
    """Steps that change: `steps[at]` is None once a step is done by others."""

    def __init__(self, steps: Sequence[Placed], types: Types, dead: Container[int]) -> None:
        self.steps: list[Placed | None] = list(steps)
        self.dead = dead
        self.types = dict(types)
        self.producer: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        for at, step in enumerate(steps):
            for slot in step.ins:
                self.readers.setdefault(slot, []).append(at)
            for slot, shape, dtype in zip(step.outs, step.call.shapes, step.call.dtypes, strict=True):
                self.producer[slot], self.types[slot] = at, (shape, dtype)

    def left(self) -> list[Placed]:
        """What remains, without casts that nobody reads any more."""
        read = {slot for step in self.steps if step is not None for slot in step.ins}
        return [step for step in self.steps if step is not None and not (
            _is_cast(step) and step.outs[0] in self.dead and step.outs[0] not in read)]

    def uncast(self, slot: int) -> int | None:
        """The 16-bit slot of which a float32 slot is a cast."""
        step = self.steps[self.producer[slot]] if slot in self.producer else None
        if step is None or not _is_cast(step):
            return None
        short = self.types[step.ins[0]][1]
        return step.ins[0] if _short(short) and step.call.dtypes[0] == dtypes.float32 else None

    def only_cast(self, slot: int) -> int | None:
        """The step that reads a slot, if nothing else does and it casts between 16-bit floats and float32."""
        readers = self.readers.get(slot, [])
        if slot not in self.dead or len(readers) != 1:
            return None
        step = self.steps[readers[0]]
        if step is None or not _is_cast(step):
            return None
        pair = self.types[slot][1], step.call.dtypes[0]
        fits = dtypes.float32 in pair and any(map(_short, pair))
        return readers[0] if fits else None

    # --- norms, and whatever else mixes ---------------------------------------------------------------------

    def inputs(self, at: int) -> None:
        """Take 16-bit inputs in place of their casts."""
        step = self.steps[at]
        mixes = _mixes(step)
        if step is None or mixes is None:
            return
        ins = list(step.ins)
        for k, slot in enumerate(step.ins):
            source = self.uncast(slot) if slot >= 0 else None
            if source is not None:
                trial = [*ins[:k], source, *ins[k + 1:]]
                if mixes(self._dtypes(trial), step.call.dtypes):
                    ins = trial
        if tuple(ins) != step.ins:
            self._replace(at, step, tuple(ins), step.outs, step.call.dtypes)

    def results(self, at: int) -> None:
        """Write what the only reader of a result would make of it."""
        step = self.steps[at]
        mixes = _mixes(step)
        if step is None or mixes is None:
            return
        outs, made = list(step.outs), list(step.call.dtypes)
        for k, slot in enumerate(step.outs):
            cast = self.only_cast(slot)
            if cast is None:
                continue
            reader = self.steps[cast]
            assert reader is not None
            trial = [*made[:k], reader.call.dtypes[0], *made[k + 1:]]
            if mixes(self._dtypes(step.ins), trial):
                outs[k], made = reader.outs[0], trial
                self.steps[cast] = None
        if tuple(outs) != step.outs:
            self._replace(at, step, step.ins, tuple(outs), tuple(made))

    def _dtypes(self, slots: Sequence[int]) -> list[Any]:
        return [self.types[slot][1] if slot >= 0 else None for slot in slots]

    def _replace(self, at: int, step: Placed, ins: tuple[int, ...], outs: tuple[int, ...],
                 made: tuple[Any, ...]) -> None:
        attrs = {**step.call.attrs, "result_dtypes": made}
        self.steps[at] = step._replace(ins=ins, outs=outs, call=step.call._replace(attrs=attrs, dtypes=made))
        for slot, shape, dtype in zip(outs, step.call.shapes, made, strict=True):
            self.types[slot] = shape, dtype

    # --- cross-entropy --------------------------------------------------------------------------------------

    def loss(self, at: int) -> None:
        """Keep the logits instead of probabilities, if only derivatives read these."""
        step = self.steps[at]
        if step is None or step.call.name != "cross_entropy" or not step.call.on_device:
            return
        kept = step.outs[2]
        readers = [(k, self.steps[k]) for k in self.readers.get(kept, [])]
        if kept not in self.dead or not readers or any(
                r is None or r.call.name != "cross_entropy_grad" or not r.call.on_device or r.ins[1] != kept
                for _, r in readers):
            return
        logits = self._short_logits(step.ins[0], [r.outs[0] for _, r in readers if r is not None])
        short = logits != step.ins[0]
        shape, dtype = self.types[logits]
        samples = self.types[step.ins[1]][0]
        call = step.call._replace(
            kind="fused", function=cross_entropy_lse, op=None, dtypes=(*step.call.dtypes[:2], wide(dtype)),
            shapes=((), (), (prod(samples),)))
        self.steps[at] = step._replace(call=call, ins=(logits, step.ins[1]))
        self.types[kept] = call.shapes[2], call.dtypes[2]
        for k, reader in readers:
            assert reader is not None
            outs = reader.outs
            if short:
                cast = self.only_cast(outs[0])
                assert cast is not None
                outs = self.steps[cast].outs  # type: ignore[union-attr]
                self.steps[cast] = None
            call = reader.call._replace(kind="fused", function=cross_entropy_grad_lse, op=None,
                                        dtypes=(dtype,), shapes=(shape,))
            ins = reader.ins[0], logits, kept, reader.ins[2]
            self.steps[k] = reader._replace(call=call, ins=ins, outs=outs)
            self.types[outs[0]] = shape, dtype

    def _short_logits(self, logits: int, gradients: Sequence[int]) -> int:
        """The 16-bit slot that the logits are a cast of, if the gradients are cast back to its dtype."""
        source = self.uncast(logits)
        if source is None:
            return logits
        dtype = self.types[source][1]
        for slot in gradients:
            cast = self.only_cast(slot)
            step = None if cast is None else self.steps[cast]
            if step is None or step.call.dtypes[0] != dtype:
                return logits
        return source


def _mixes(step: Placed | None) -> Any:
    """What a step's kernel says of mixed dtypes; None if it takes none."""
    if step is None or not step.call.on_device or step.call.op is None or step.call.op.device is None:
        return None
    return step.call.op.device.mixes


def _is_cast(step: Placed) -> bool:
    return bool(step.call.name == "astype" and step.call.kind == "op")


def _short(dtype: Any) -> bool:
    return bool(dtypes.is_floating(dtype) and dtype.itemsize == 2)
