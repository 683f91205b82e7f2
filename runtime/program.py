"""Compiling a batch's body for one worker: ops resolved, attributes made local, releases and reuses placed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from meshtape.runtime import moves
from meshtape.runtime.dtypes import canonical
from meshtape.runtime.op import IO, Op, lookup
from meshtape.runtime.protocol import Instr, Program, TensorType
from meshtape.runtime.reuse import Reuse, Sharing, reuses
from meshtape.runtime.sharded_update import sharded_update
from meshtape.runtime.shards import Shape, piece


class Call(NamedTuple):
    """What one instruction runs: `function(*arrays, **attrs)`, its op (None for moves and feeds), and the
    types of a collective's inputs (empty otherwise; None for a scalar). `many`: it returns a sequence of
    arrays. `over`: what a collective may write over what, as (output, input) positions.
    """

    function: Callable[..., Any]
    attrs: dict[str, Any]
    op: Op | None
    many: bool
    dtypes: tuple[Any, ...]
    shapes: tuple[Shape, ...]
    meets: tuple[TensorType | None, ...]
    over: tuple[tuple[int, int], ...] = ()


class Step(NamedTuple):
    """One call in its place: operand slots (negative: scalars), slots to release after it, and which outputs
    may be written over which inputs.
    """

    call: Call
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    release: tuple[int, ...]
    reuse: Reuse

    @property
    def name(self) -> str:
        """For a trace: the op, or what kind of step it is."""
        if self.call.op is not None:
            return self.call.op.name
        return f"collective ({len(self.call.meets)} tensors)" if self.call.meets else "feed"


class Compiled(NamedTuple):
    """A body ready to run: `external` slots are bound from the block table before the first step (`taken`
    ones leave it), `kept` slots enter it after the last, copied if `sharing` says so.
    """

    steps: tuple[Step, ...]
    n_slots: int
    external: tuple[int, ...]
    taken: frozenset[int]
    kept: tuple[int, ...]
    sharing: Sharing


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
    external: dict[int, None] = {}
    last: dict[int, int] = {}
    for at, (_, ins, outs) in enumerate(program.steps):
        for slot in ins:
            if slot >= 0:
                if slot not in made:
                    external[slot] = None
                last[slot] = at
        made.update(outs)
        last.update((slot, max(at, last.get(slot, at))) for slot in outs)
    release: list[list[int]] = [[] for _ in program.steps]
    for slot, at in last.items():
        if slot in dead:
            release[at].append(slot)
    taken = frozenset(s for s in external if s in dead)
    kept = tuple(sorted(made - dead))
    found, sharing = reuses([(calls[k], ins, outs) for k, ins, outs in program.steps], last, taken, kept,
                           {s: shape for k, ins, _ in program.steps
                            for s, shape in zip(ins, in_shapes(program.instrs[k], site), strict=True)})
    steps = tuple(Step(calls[k], ins, outs, tuple(release[at]), found[at])
                  for at, (k, ins, outs) in enumerate(program.steps))
    return Compiled(steps, program.n_slots, tuple(external), taken, kept, sharing)


def in_shapes(instr: Instr, site: Site) -> list[tuple[Shape, Any] | None]:
    """Local shape and dtype of every input."""
    return [None if t is None else (local_shape(t, site), canonical(t.dtype)) for t in instr.ins]


def compile_instr(instr: Instr, site: Site) -> Call:
    dtypes = tuple(canonical(t.dtype) for t in instr.outs)
    shapes = tuple(local_shape(t, site) for t in instr.outs)
    meets = tuple(t for t in instr.ins if t is not None)
    xp = site.xp
    match instr.op:
        case "feed":
            return Call(xp.asarray, {}, None, False, dtypes, shapes, ())
        case "redistribute":
            path = moves.compile_path(xp, meets[0].shape, instr.attrs[0], site.mesh_shape, site.coord,
                                      site.communicators)
            return Call(path, {}, None, False, dtypes, shapes, meets)
        case "all_reduce_bucket":
            axis, combine = instr.attrs
            run = moves.compile_bucket(xp, shapes, combine, site.communicators[axis])
            return Call(run, {}, None, True, dtypes, shapes, meets)
        case "reduce_scatter_bucket":
            axis, combine, dims = instr.attrs
            whole = [local_shape(t, site) for t in meets]
            run = moves.compile_scatter_bucket(xp, whole, dims, combine, site.communicators[axis])
            return Call(run, {}, None, True, dtypes, shapes, meets)
        case "all_gather_bucket":
            axis, _, dims = instr.attrs
            run = moves.compile_gather_bucket(xp, shapes, dims, site.communicators[axis])
            return Call(run, {}, None, True, dtypes, shapes, meets)
        case "sharded_update":
            return compile_update(instr, site)
    op = lookup(instr.op)
    attrs = op.unpack(instr.attrs)
    if op.local is not None:
        pieces = [None if t is None else piece(t.shape, t.placements, site.mesh_shape, site.coord)
                  for t in instr.ins]
        attrs = op.local(attrs, IO(tuple(pieces), tuple(
            piece(t.shape, t.placements, site.mesh_shape, site.coord) for t in instr.outs)))
    return Call(op.kernel, attrs, op, op.n_out != 1, dtypes, shapes, ())


def compile_update(instr: Instr, site: Site) -> Call:
    """A sharded optimizer update: see runtime.sharded_update."""
    name, attrs, axis, dims = instr.attrs
    op = lookup(name)
    run, over = sharded_update(site.xp, op, op.unpack(attrs), dims, site.communicators[axis],
                               [None if t is None else local_shape(t, site) for t in instr.ins])
    return Call(run, {}, None, True, tuple(canonical(t.dtype) for t in instr.outs),
                tuple(local_shape(t, site) for t in instr.outs), instr.ins, over)


def placeholder(t: TensorType, site: Site) -> Any:
    """Zeros that stand in for a value that could not be computed, so that peers in a collective do not hang.
    """
    return site.xp.zeros(local_shape(t, site), canonical(t.dtype))
