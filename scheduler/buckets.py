"""From a recorded batch to the body that workers run: duplicate reductions merged, reductions bucketed.

Pure: tuples in, tuples out. A gradient reduction is recorded right after the gradient; here it is put off
until a result of its bucket is first needed (or the bucket is full), so that one collective carries many
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

from meshtape.runtime.dtypes import canonical
from meshtape.runtime.moves import changed_axis
from meshtape.runtime.protocol import Instr
from meshtape.runtime.shards import REPLICATE, is_partial

BUCKET_BYTES = 16 << 20


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


def all_reduce_axis(instr: Instr) -> int | None:
    """The mesh axis of an instruction that is nothing but one all-reduce, else None."""
    if instr.op != "redistribute" or len(instr.attrs[0]) != 2:
        return None
    before, after = instr.attrs[0]
    axis = changed_axis(before, after)
    return axis if is_partial(before[axis]) and after[axis] == REPLICATE else None


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
           limit: int = BUCKET_BYTES) -> list[Recorded]:
    """Group all-reduces of one mesh axis, reduction and dtype; each group runs where first needed."""
    out: list[Recorded] = []
    open_: dict[tuple[int, str, str], list[Recorded]] = {}
    home: dict[int, tuple[int, str, str]] = {}
    size: dict[tuple[int, str, str], int] = {}

    def close(key: tuple[int, str, str]) -> None:
        group = open_.pop(key)
        size.pop(key)
        for s in group:
            home.pop(s.outs[0])
        out.append(group[0] if len(group) == 1 else _joined(key, group, instrs, number))

    for step in steps:
        for key in dict.fromkeys(home[s] for s in step.ins if s in home):
            close(key)
        instr = instrs[step.number]
        axis = all_reduce_axis(instr)
        if axis is None:
            out.append(step)
            continue
        kind = instr.outs[0]
        key = (axis, str(instr.attrs[0][0][axis]), kind.dtype)
        open_.setdefault(key, []).append(step)
        home[step.outs[0]] = key
        size[key] = size.get(key, 0) + _bytes(instr)
        if size[key] >= limit:
            close(key)
    for key in list(open_):
        close(key)
    return out


def _joined(key: tuple[int, str, str], group: Sequence[Recorded], instrs: Sequence[Instr],
            number: Callable[[Instr], int]) -> Recorded:
    axis, combine, _ = key
    ins = tuple(instrs[s.number].ins[0] for s in group)
    outs = tuple(instrs[s.number].outs[0] for s in group)
    joined = Instr("all_reduce_bucket", (axis, combine), ins, outs)
    return Recorded(number(joined), tuple(s.ins[0] for s in group), tuple(s.outs[0] for s in group),
                    group[-1].origin)


def _bytes(instr: Instr) -> int:
    out = instr.outs[0]
    return canonical(out.dtype).itemsize * prod(out.shape)
