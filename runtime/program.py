"""Compiling a batch's body for one worker: ops resolved, attributes made local, releases placed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from meshtape.runtime import moves
from meshtape.runtime.dtypes import canonical
from meshtape.runtime.op import IO, lookup
from meshtape.runtime.protocol import Instr, Program, TensorType
from meshtape.runtime.shards import Shape, piece


class Step(NamedTuple):
    """One call: `call(*arrays)` gives one array, or a sequence of them if `many`."""

    call: Callable[..., Any]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    many: bool
    dtypes: tuple[Any, ...]
    release: tuple[int, ...]
    feed: bool
    op: str
    meets: tuple[TensorType, ...]      # of a collective: the inputs' types; empty otherwise


class Compiled(NamedTuple):
    """A body ready to run: `external` slots are bound from the block table before the first step (`taken` ones
    leave it), `kept` slots enter it after the last."""

    steps: tuple[Step, ...]
    n_slots: int
    external: tuple[int, ...]
    taken: tuple[int, ...]
    kept: tuple[int, ...]


class Site(NamedTuple):
    """Where a program runs."""

    xp: Any
    mesh_shape: tuple[int, ...]
    coord: tuple[int, ...]
    communicators: Sequence[Any]


def local_shape(t: TensorType, site: Site) -> Shape:
    return piece(t.shape, t.placements, site.mesh_shape, site.coord).shape


def compile_program(program: Program, site: Site) -> Compiled:
    calls = [compile_instr(instr, site) for instr in program.instrs]
    dead = set(program.dead)
    made: set[int] = set()
    external: list[int] = []
    last: dict[int, int] = {}
    for at, (_, ins, outs) in enumerate(program.steps):
        for slot in ins:
            if slot >= 0:
                if slot not in made and slot not in last:
                    external.append(slot)
                last[slot] = at
        made.update(outs)
        for slot in outs:
            last.setdefault(slot, at)
    release: list[list[int]] = [[] for _ in program.steps]
    for slot, at in last.items():
        if slot in dead:
            release[at].append(slot)
    steps = tuple(
        Step(calls[k][0], ins, outs, calls[k][1], calls[k][2], tuple(release[at]), program.instrs[k].op == "feed",
             program.instrs[k].op,
             tuple(t for t in program.instrs[k].ins if t is not None) if calls[k][3] else ())
        for at, (k, ins, outs) in enumerate(program.steps))
    return Compiled(steps, program.n_slots, tuple(external), tuple(s for s in external if s in dead),
                    tuple(sorted(made - dead)))


def compile_instr(instr: Instr, site: Site) -> tuple[Callable[..., Any], bool, tuple[Any, ...], bool]:
    """(call, gives many outputs, output dtypes, is a collective)."""
    dtypes = tuple(canonical(t.dtype) for t in instr.outs)
    xp = site.xp
    match instr.op:
        case "feed":
            return xp.asarray, False, dtypes, False
        case "redistribute":
            source = instr.ins[0]
            assert source is not None
            call = moves.compile_path(xp, source.shape, instr.attrs[0], site.mesh_shape, site.coord,
                                      site.communicators)
            return call, False, dtypes, True
        case "all_reduce_bucket":
            axis, combine = instr.attrs
            shapes = [local_shape(t, site) for t in instr.outs]
            return moves.compile_bucket(xp, shapes, combine, site.communicators[axis]), True, dtypes, True
    op = lookup(instr.op)
    attrs = op.unpack(instr.attrs)
    io = IO(tuple(None if t is None else piece(t.shape, t.placements, site.mesh_shape, site.coord)
                  for t in instr.ins),
            tuple(piece(t.shape, t.placements, site.mesh_shape, site.coord) for t in instr.outs))
    if op.local is not None:
        attrs = op.local(attrs, io)
    return bind(op.kernel, xp, attrs), op.n_out != 1, dtypes, False


def bind(kernel: Callable[..., Any], xp: Any, attrs: dict[str, Any]) -> Callable[..., Any]:
    if not attrs:
        return lambda *arrays: kernel(xp, *arrays)
    return lambda *arrays: kernel(xp, *arrays, **attrs)


def placeholder(t: TensorType, site: Site) -> Any:
    """Zeros that stand in for a value that could not be computed, so that peers in a collective do not hang."""
    return site.xp.zeros(local_shape(t, site), canonical(t.dtype))

