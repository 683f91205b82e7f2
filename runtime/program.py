"""Compiling a batch's body for one worker: ops resolved, attributes made local, releases and reuses placed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from meshtape.runtime import moves
from meshtape.runtime.cuda.casts import absorb_casts
from meshtape.runtime.cuda.epilogues import epilogue_pattern
from meshtape.runtime.cuda.fusion import fuse
from meshtape.runtime.cuda.inputs import Inputs
from meshtape.runtime.dtypes import canonical
from meshtape.runtime.op import IO, DeviceKernel, Op, lookup
from meshtape.runtime.overlap import Placed, split_collectives
from meshtape.runtime.protocol import Instr, Program, TensorType
from meshtape.runtime.reuse import Reuse, Sharing, reuses
from meshtape.runtime.sharded_update import sharded_update
from meshtape.runtime.shards import Shape, piece


class Call(NamedTuple):
    """What one instruction runs: `function(*arrays, **attrs)`; an op's kernel gets the array module first.

    `kind` is "op", "feed", "collective", or half of a collective: "start" or "wait". `many`: it returns a
    sequence of arrays. `meets` are the types of a collective's inputs (None for a scalar). `over`: what a
    collective may write over what, as (output, input) positions. `name` is for traces.

    `on_device`: the kernel is for CUDA and gets the device first. `numbers` says how its Python scalars
    arrive (see DeviceKernel). `beside`: a collective that may run beside kernels.

    A reduction's operands can lie in memory that the other ranks read: `lend(start)` gives such arrays, from
    byte `start` of that memory, with the function that reduces through them, or None; `lendable` are the
    positions of the operands.
    """

    kind: str
    name: str
    function: Callable[..., Any]
    attrs: dict[str, Any]
    op: Op | None
    many: bool
    dtypes: tuple[Any, ...]
    shapes: tuple[Shape, ...]
    meets: tuple[TensorType | None, ...] = ()
    over: tuple[tuple[int, int], ...] = ()
    lend: Callable[[int], tuple[Any, Callable[..., Any]] | None] | None = None
    lendable: tuple[int, ...] = ()
    on_device: bool = False
    numbers: str = ""
    beside: bool = False


class Step(NamedTuple):
    """One call in its place: operand slots (negative: scalars), slots to release after it, which outputs may
    be written over which inputs, the step of the body that it comes from, arrays to write outputs to, and
    arrays that stand in for scalars, by position.
    """

    call: Call
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    release: tuple[int, ...]
    reuse: Reuse
    origin: int
    places: tuple[tuple[int, Any], ...] = ()
    given: tuple[tuple[int, Any], ...] = ()


class Compiled(NamedTuple):
    """A body ready to run: `external` slots are bound from the block table before the first step (`taken`
    ones leave it), `kept` slots enter it after the last, copied if `sharing` says so. Of these, `lent` ones
    lie in memory that a later program may write to.

    On a device `inputs` holds what changes from run to run, `by_value` are the scalars that kernels take as
    they are, and `tf32` says whether products of float32 may take their operands with 10 bits of mantissa.
    """

    steps: tuple[Step, ...]
    n_slots: int
    external: tuple[int, ...]
    taken: frozenset[int]
    kept: tuple[int, ...]
    sharing: Sharing
    lent: tuple[int, ...] = ()
    inputs: Inputs | None = None
    by_value: tuple[int, ...] = ()
    tf32: bool = False


class Site(NamedTuple):
    """Where a program runs. `start` begins a collective of the mesh axes that `overlap` beside other work;
    `device` is the CUDA device, if it is one, and `fuse` says to join its pointwise ops.
    """

    xp: Any
    mesh_shape: tuple[int, ...]
    coord: tuple[int, ...]
    communicators: Sequence[Any]
    start: Callable[..., Any] | None = None
    overlap: tuple[bool, ...] = ()
    reuse: bool = True
    device: Any = None
    fuse: bool = False


def local_shape(t: TensorType, site: Site) -> Shape:
    return piece(t.shape, t.placements, site.mesh_shape, site.coord).shape


def compile_program(program: Program, site: Site) -> Compiled:
    calls = [compile_instr(instr, site) for instr in program.instrs]
    if any(site.overlap):
        calls = [call._replace(beside=_overlaps(instr, site))
                 for call, instr in zip(calls, program.instrs, strict=True)]
    placed = [Placed(calls[k], ins, outs, at) for at, (k, ins, outs) in enumerate(program.steps)]
    types = {s: kind for k, ins, _ in program.steps
             for s, kind in zip(ins, in_shapes(program.instrs[k], site), strict=True) if kind is not None}
    n_slots = program.n_slots
    if site.fuse:
        if site.device.libraries.cublaslt is not None:
            placed, n_slots = epilogue_pattern(placed, types, frozenset(program.dead), n_slots)
        gone = frozenset((*program.dead, *range(program.n_slots, n_slots)))
        placed = fuse(absorb_casts(placed, types, gone), types, gone)
    placed, room = lend(placed)
    placed, n_slots = split_collectives(placed, n_slots, [step.call.beside for step in placed],
                                        lambda c, what: half(c, what, site))
    dead = {*program.dead, *range(program.n_slots, n_slots)}
    made: set[int] = set()
    external: dict[int, None] = {}
    last: dict[int, int] = {}
    for at, (_, ins, outs, _) in enumerate(placed):
        for slot in ins:
            if slot >= 0:
                if slot not in made:
                    external[slot] = None
                last[slot] = at
        made.update(outs)
        last.update((slot, max(at, last.get(slot, at))) for slot in outs)
    release: list[list[int]] = [[] for _ in placed]
    for slot, at in last.items():
        if slot in dead:
            release[at].append(slot)
    taken = frozenset(s for s in external if s in dead)
    kept = tuple(sorted(made - dead))
    found, sharing = reuses([step[:3] for step in placed], last, taken, kept, types, frozenset(room))
    inputs, by_value = (None, ()) if site.device is None else device_inputs(placed, site.device)
    steps = tuple(Step(call, ins, outs, tuple(release[at]), found[at] if site.reuse else (), origin,
                       tuple((k, room[s]) for k, s in enumerate(outs) if s in room),
                       () if inputs is None else given_numbers(call, ins, inputs))
                  for at, (call, ins, outs, origin) in enumerate(placed))
    return Compiled(
        steps, n_slots, tuple(external), taken, kept, sharing, tuple(s for s in kept if s in room), inputs,
        by_value, program.precision != "highest")


def device_inputs(placed: Sequence[Placed], device: Any) -> tuple[Inputs, tuple[int, ...]]:
    """What is loaded for every run of a program on a device, and the scalars that are taken by value."""
    feeds = [(step.call.shapes[0], step.call.dtypes[0]) for step in placed if step.call.kind == "feed"]
    used = dict.fromkeys(pair for step in placed for pair in scalar_letters(step.call, step.ins))
    wanted = [(index, letter) for index, letter in used if letter != "h"]
    return Inputs(device, feeds, wanted), tuple(index for index, letter in used if letter == "h")


def scalar_letters(call: Call, ins: Sequence[int]) -> list[tuple[int, str]]:
    """(index, letter of DeviceKernel.numbers) of every scalar among the inputs."""
    scalars = [-1 - s for s in ins if s < 0]
    letters = call.numbers or "h" * len(scalars)
    return list(zip(scalars, letters[len(letters) - len(scalars):], strict=True))


def given_numbers(call: Call, ins: Sequence[int], inputs: Inputs) -> tuple[tuple[int, Any], ...]:
    """The arrays that stand in for scalars, with the positions of these."""
    positions = [i for i, s in enumerate(ins) if s < 0]
    return tuple((i, inputs.numbers[pair])
                 for i, pair in zip(positions, scalar_letters(call, ins), strict=True) if pair[1] != "h")


def lend(placed: Sequence[Placed]) -> tuple[list[Placed], dict[int, Any]]:
    """The steps with reductions that read their operands where the peers can, and the arrays of those slots
    that a kernel can write there.
    """
    out, wanted, at = list(placed), dict[int, Any](), 0
    for k, step in enumerate(placed):
        found = step.call.lend(at) if step.call.lend is not None else None
        if found is not None:
            resident, function = found
            at = resident.stop
            out[k] = step._replace(call=step.call._replace(function=function))
            wanted.update(zip((step.ins[i] for i in step.call.lendable), resident.arrays, strict=True))
    room = {}
    for call, _, outs, _ in placed:
        for slot, shape, dtype in zip(outs, call.shapes, call.dtypes, strict=True):
            array = wanted.get(slot)
            if array is not None and call.op is not None and call.op.takes_out and (
                    array.shape == shape and array.dtype == dtype):
                room[slot] = array
    return out, room


def _overlaps(instr: Instr, site: Site) -> bool:
    """Whether an instruction is a collective on a mesh axis that overlaps."""
    if instr.op.endswith("_bucket"):
        return bool(site.overlap[instr.attrs[0]])
    if instr.op != "redistribute":
        return False
    return any(site.overlap[moves.changed_axis(before, after)] and moves.communicates(before, after)
               for before, after in pairwise(instr.attrs[0]))


def half(call: Call, what: str, site: Site) -> Call:
    """The call that starts a collective, waits for it, or (what="through") does both."""
    start, function = site.start, call.function
    assert start is not None
    if what == "start":
        return call._replace(kind="start", function=lambda *args: start(function, *args), many=False,
                             dtypes=(None,), shapes=((),), over=())
    if what == "wait":
        return call._replace(
            kind="wait",
            name=f"wait for {call.name}",
            function=lambda token, *operands: token.result(),
            over=(),
        )
    return call._replace(function=lambda *args, **out: start(lambda: function(*args, **out)).result())


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
            # To a device, arrays are copied before the program runs: see runtime.cuda.inputs.
            take = xp.asarray if site.device is None else lambda x: x
            return Call("feed", "feed", take, {}, None, False, dtypes, shapes)
        case "redistribute":
            path = moves.compile_path(xp, meets[0].shape, instr.attrs[0], site.mesh_shape, site.coord,
                                      site.communicators)
            return Call("collective", move_name(instr), path, {}, None, False, dtypes, shapes, meets)
        case "all_reduce_bucket":
            axis, combine = instr.attrs
            comm = site.communicators[axis]
            return reduction(instr, site, axis, dtypes, shapes,
                             lambda via=None: moves.compile_bucket(xp, shapes, combine, comm, via), shapes)
        case "reduce_scatter_bucket":
            axis, combine, dims = instr.attrs
            whole = [local_shape(t, site) for t in meets]
            comm = site.communicators[axis]
            return reduction(
                instr, site, axis, dtypes, shapes,
                lambda via=None: moves.compile_scatter_bucket(xp, whole, dims, combine, comm, via), whole)
        case "all_gather_bucket":
            axis, _, dims = instr.attrs
            run = moves.compile_gather_bucket(xp, shapes, dims, site.communicators[axis])
            return Call("collective", bucket_name(instr), run, {}, None, True, dtypes, shapes, meets)
        case "sharded_update":
            return compile_update(instr, site)
    op = lookup(instr.op)
    attrs = op.unpack(instr.attrs)
    if op.local is not None:
        pieces = [None if t is None else piece(t.shape, t.placements, site.mesh_shape, site.coord)
                  for t in instr.ins]
        attrs = op.local(attrs, IO(tuple(pieces), tuple(
            piece(t.shape, t.placements, site.mesh_shape, site.coord) for t in instr.outs)))
    if site.device is not None and op.device is not None and _supported(op.device, instr, site, attrs):
        return Call("op", op.name, op.device.run, attrs, op, op.n_out != 1, dtypes, shapes, on_device=True,
                    numbers=op.device.numbers)
    return Call("op", op.name, op.kernel, attrs, op, op.n_out != 1, dtypes, shapes)


def _supported(kernel: DeviceKernel, instr: Instr, site: Site, attrs: dict[str, Any]) -> bool:
    """Whether a CUDA kernel takes what this worker holds."""
    given = in_shapes(instr, site)
    return kernel.supports(tuple(None if x is None else x[0] for x in given),
                           tuple(None if x is None else x[1] for x in given), attrs)


# Bytes of a bucket from which not copying its operands is worth the bookkeeping.
LEND_FROM = 1 << 18


def reduction(instr: Instr, site: Site, axis: int, dtypes: tuple[Any, ...], shapes: tuple[Shape, ...],
              make: Callable[..., Any], given: Sequence[Shape]) -> Call:
    """A bucket of reductions of arrays of the shapes `given`; make(via) makes the function."""
    meets = tuple(t for t in instr.ins if t is not None)
    return Call("collective", bucket_name(instr), make(), {}, None, True, dtypes, shapes, meets,
                lend=lender(site, axis, given, dtypes[0], make), lendable=tuple(range(len(meets))))


def lender(site: Site, axis: int, shapes: Sequence[Shape], dtype: Any,
           make: Callable[..., Any]) -> Callable[[int], tuple[Any, Callable[..., Any]] | None] | None:
    """What Call.lend is for arrays of these shapes, where that is worth it; the same on all ranks."""
    if not site.reuse or sum(map(prod, shapes)) * dtype.itemsize < LEND_FROM:
        return None

    def lend_from(start: int) -> tuple[Any, Callable[..., Any]] | None:
        via = site.communicators[axis].resident(shapes, dtype, start)
        return None if via is None else (via, make(via))

    return lend_from


def bucket_name(instr: Instr) -> str:
    return f"{instr.op.removesuffix('_bucket')} ({len(instr.outs)} tensors)"


def move_name(instr: Instr) -> str:
    """The collective that a redistribution is, or "redistribute" if it is several."""
    path = instr.attrs[0]
    return moves.verb(path[0], path[1]) if len(path) == 2 else "redistribute"


def compile_update(instr: Instr, site: Site) -> Call:
    """A sharded optimizer update: see runtime.sharded_update."""
    name, attrs, axis, dims = instr.attrs
    op = lookup(name)
    ins = [None if t is None else local_shape(t, site) for t in instr.ins]
    values, numbers = op.unpack(attrs), ""
    kernel = partial(op.kernel, site.xp)
    if site.device is not None and op.device is not None and _supported(op.device, instr, site, values):
        kernel, numbers = partial(op.device.run, site.device), op.device.numbers

    def make(via: Any = None) -> Any:
        return sharded_update(site.xp, op, kernel, values, dims, site.communicators[axis], ins, via)

    run, over = make()
    first = ins.count(None) + len(dims)
    addends = tuple(first + k for k, dim in enumerate(dims) if dim >= 0)
    shapes = [s for s in (ins[i] for i in addends) if s is not None]
    kind = instr.ins[addends[0]]
    assert kind is not None
    return Call("collective", f"sharded {name}", run, {}, None, True,
                tuple(canonical(t.dtype) for t in instr.outs),
                tuple(local_shape(t, site) for t in instr.outs), instr.ins, over,
                lender(site, axis, shapes, canonical(kind.dtype), lambda via: make(via)[0]), addends,
                numbers=numbers)


def placeholder(t: TensorType, site: Site) -> Any:
    """Zeros that stand in for a value that could not be computed, so that peers in a collective do not hang.
    """
    return site.xp.zeros(local_shape(t, site), canonical(t.dtype))
