"""Sharded optimizer updates as one step: reduce-scatter of gradients, update of slices, all-gather. Pure.

An optimizer that updates replicated parameters by parts records cuts of the parameters, reduce-scatters of
the gradients, the update, and all-gathers of the new parameters. Where nothing else reads what lies between
these, they become one step, which can write the new parts into the old parameters and needs no memory for
what lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from meshtape.runtime.moves import changed_axis
from meshtape.runtime.op import lookup
from meshtape.runtime.protocol import Instr, TensorType
from meshtape.runtime.shards import REPLICATE
from meshtape.scheduler.buckets import Recorded, collective


class _Part(NamedTuple):
    """A parameter that is updated by parts: its steps in the batch, and the dimension that is split."""

    cut: int
    scatter: int
    gather: int
    whole: int              # slot of the parameter before the cut
    addends: int            # slot of its gradient before the reduce-scatter
    result: int             # slot of the new parameter, gathered
    axis: int
    dim: int


class _Links:
    """Which step makes each slot and which read it."""

    def __init__(self, steps: Sequence[Recorded], instrs: Sequence[Instr], dead: frozenset[int]) -> None:
        self.steps = steps
        self.instrs = instrs
        self.dead = dead
        self.maker: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        for at, step in enumerate(steps):
            for s in step.ins:
                self.readers.setdefault(s, []).append(at)
            self.maker.update(dict.fromkeys(step.outs, at))

    def between(self, slot: int, reader: int) -> bool:
        """Whether nobody but step `reader` ever sees a slot."""
        return slot in self.dead and self.readers.get(slot) == [reader]

    def moved(self, at: int | None, slot: int, verb: str) -> tuple[int, int, int] | None:
        """If step `at` is a collective `verb`: mesh axis, dimension, and the slot that `slot` comes from."""
        if at is None:
            return None
        step, instr = self.steps[at], self.instrs[self.steps[at].number]
        place = step.outs.index(slot)
        if instr.op == f"{verb}_bucket":
            return instr.attrs[0], instr.attrs[2][place], step.ins[place]
        found = collective(instr)
        if found is None or found.kind.verb != f"{verb}_bucket":
            return None
        return found.kind.axis, found.dim, step.ins[place]

    def cut(self, at: int | None) -> tuple[int, int, int] | None:
        """If step `at` cuts a replicated tensor once: mesh axis, dimension and the tensor's slot."""
        if at is None:
            return None
        step, instr = self.steps[at], self.instrs[self.steps[at].number]
        if instr.op != "redistribute" or len(instr.attrs[0]) != 2:
            return None
        before, after = instr.attrs[0]
        axis = changed_axis(before, after)
        if before[axis] != REPLICATE or not isinstance(after[axis], int):
            return None
        return axis, after[axis], step.ins[0]

    def part(self, update: int, param: int, grad: int, out: int) -> _Part | None:
        """The parameter in slot `param` of step `update`, if it is updated by parts."""
        readers = self.readers.get(out, [])
        if not (self.between(param, update) and self.between(grad, update) and len(readers) == 1
                and out in self.dead):
            return None
        cutter, scatter, gather = self.maker.get(param), self.maker.get(grad), readers[0]
        result = self.steps[gather].outs[self.steps[gather].ins.index(out)]
        cut = self.cut(cutter)
        scattered = self.moved(scatter, grad, "reduce_scatter")
        gathered = self.moved(gather, result, "all_gather")
        if (
            cut is None
            or scattered is None
            or gathered is None
            or not cut[:2] == scattered[:2] == gathered[:2]
        ):
            return None
        assert cutter is not None and scatter is not None
        return _Part(cutter, scatter, gather, cut[2], scattered[2], result, cut[0], cut[1])


def join_updates(steps: Sequence[Recorded], instrs: Sequence[Instr], number: Callable[[Instr], int],
                 dead: frozenset[int], overlaps: Sequence[bool]) -> list[Recorded]:
    """The steps with every sharded update, from the cuts to the all-gathers, as one "sharded_update".

    Not on mesh axes whose collectives run beside kernels: there the reduce-scatters begin during backward.

    Its attrs are the update's op, that op's attrs, the mesh axis, and per parameter the dimension that is
    split, or -1. Its operands are those of the update, but parameters are whole and gradients are addends.
    """
    links = _Links(steps, instrs, dead)
    joined: dict[int, Recorded] = {}
    gone: set[int] = set()
    for at, step in enumerate(steps):
        found = _joined(at, step, links, number)
        if found is not None and not overlaps[found[1][0].axis]:
            joined[at], parts = found
            for p in parts:
                gone.update((p.cut, p.scatter, p.gather))
    return [joined.get(at, step) for at, step in enumerate(steps) if at not in gone]


def _joined(at: int, step: Recorded, links: _Links,
            number: Callable[[Instr], int]) -> tuple[Recorded, list[_Part]] | None:
    instrs = links.instrs
    instr = instrs[step.number]
    op = lookup(instr.op) if instr.op.endswith("_update") and instr.op != "sharded_update" else None
    if op is None or op.n_out != -1 or op.over is None:
        return None
    n, first = op.unpack(instr.attrs)["n"], sum(t is None for t in instr.ins)
    if first != len(instr.ins) - len(instr.outs) - n:
        return None                     # a number that is a tensor: the step may have to be left out
    found = {k: links.part(at, step.ins[first + k], step.ins[first + n + k], step.outs[k]) for k in range(n)}
    parts = {k: p for k, p in found.items() if p is not None}
    if (
        not parts
        or len({p.axis for p in parts.values()}) > 1
        or not _complete(step, list(parts.values()), links)
    ):
        return None
    kinds = {(_type(links, p.whole).dtype, _type(links, p.addends).dtype) for p in parts.values()}
    if len(kinds) > 1:
        return None
    ins, types, outs, made = list(step.ins), list(instr.ins), list(step.outs), list(instr.outs)
    for k, p in parts.items():
        ins[first + k], types[first + k] = p.whole, _type(links, p.whole)
        ins[first + n + k], types[first + n + k] = p.addends, _type(links, p.addends)
        outs[k], made[k] = p.result, _type(links, p.whole)
    attrs = (instr.op, instr.attrs, next(iter(parts.values())).axis,
             tuple(parts[k].dim if k in parts else -1 for k in range(n)))
    whole = Instr("sharded_update", attrs, tuple(types), tuple(made))
    return Recorded(number(whole), tuple(ins), tuple(outs), step.origin), list(parts.values())


def _complete(step: Recorded, parts: Sequence[_Part], links: _Links) -> bool:
    """Whether the collectives of these parts carry nothing else."""
    grads = sum(len(links.steps[at].outs) for at in {p.scatter for p in parts})
    news = sum(len(links.steps[at].outs) for at in {p.gather for p in parts})
    return grads == news == len(parts)


def _type(links: _Links, slot: int) -> TensorType:
    """The type of a slot that some step reads."""
    at = links.readers[slot][0]
    found = links.instrs[links.steps[at].number].ins[links.steps[at].ins.index(slot)]
    assert found is not None
    return found
