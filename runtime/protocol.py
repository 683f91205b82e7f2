"""Every message between the driver and its workers. Plain values and arrays; nothing here is pickled.

A *batch* is what the driver recorded between two flushes. Its *body* (a Program) repeats from step to step,
so it is sent once and then named by its digest; a Run carries what changes: the global ids bound to the
body's slots, the values of Python scalars, and the arrays that the user fed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.shards import Placements, Shape


class TensorType(NamedTuple):
    """Global shape, dtype name and placements of one operand."""

    shape: Shape
    dtype: str
    placements: Placements


class Instr(NamedTuple):
    """An op applied to operands of known types; None in `ins` is a Python scalar."""

    op: str
    attrs: tuple[Any, ...]
    ins: tuple[TensorType | None, ...]
    outs: tuple[TensorType, ...]


class Program(NamedTuple):
    """A batch's body.

    `steps` holds (index into instrs, input slots, output slots). Slots count up in order of first use; a
    negative input slot -(k + 1) is scalar k of the Run. `dead` are the slots whose tensors the user can no
    longer reach when the batch ends. `precision` says how products of float32 are computed: "highest" in
    float32, "high" with TF32 where a device has it, "medium" with less.
    """

    instrs: tuple[Instr, ...]
    steps: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
    n_slots: int
    dead: tuple[int, ...]
    precision: str = "highest"


class Fetch(NamedTuple):
    """A tensor whose owners send their slices back with the batch's reply."""

    id: int
    type: TensorType


class Run(NamedTuple):
    """Run a batch. `ids[slot]` is the global id bound to a slot; `program` comes with a digest's first use.

    `feeds` are this worker's pieces of the arrays fed in, in order of the body's "feed" instructions. With
    `trace` the reply tells how long every step took.
    `frees` are ids to drop first, `drop` digests that will not come again. Without `answer` the worker
    replies only if something failed; a reply says that all batches before it were run as well, and those
    without a reply of their own without a failure.
    """

    batch: int
    digest: bytes
    ids: list[int]
    scalars: list[Any]
    feeds: list[Any]
    fetch: list[Fetch]
    frees: list[int]
    drop: list[bytes]
    program: Program | None
    trace: bool = False
    answer: bool = True


class Failure(NamedTuple):
    """An error as a value: which step of which batch failed on which rank, and how it said so."""

    batch: int
    step: int
    rank: int
    kind: str
    message: str


class Span(NamedTuple):
    """Something a worker did: `start` and `duration` in nanoseconds of its own clock, the `kind` of thing
    (kernel, collective, wait, feed, compile), the bytes it sent to other workers, and whether it went on
    beside the others.
    """

    name: str
    start: int
    duration: int
    kind: str = "kernel"
    sent: int = 0
    beside: bool = False


class Reply(NamedTuple):
    """A worker finished a batch.

    `values` holds its slices of the fetched tensors it owns, None otherwise; `peak` is the most memory its
    process ever held, in bytes, or on a GPU what it held there. Of a traced batch, `spans` tells what took
    how long and `clock` when it began and ended (nanoseconds of the worker's clock). `traffic` holds, per
    mesh axis, how many collectives the rank has taken part in so far, and the bytes that it sent to others in
    them. `graphs` tells of CUDA graphs: programs captured, replays done, and reasons why programs are not
    captured; empty without a GPU.
    """

    rank: int
    batch: int
    failures: list[Failure]
    values: list[Any]
    peak: int = 0
    clock: tuple[int, int] = (0, 0)
    spans: Sequence[Span] = ()
    traffic: Sequence[tuple[int, int]] = ()
    graphs: Sequence[Any] = ()


def program_from_wire(data: Any) -> Program:
    """Rebuild a Program from nested lists (msgpack turns tuples into lists)."""
    instrs, steps, n_slots, dead, precision = data
    return Program(
        tuple(Instr(op, freeze(attrs), tuple(None if t is None else type_from_wire(t) for t in ins),
                    tuple(type_from_wire(t) for t in outs)) for op, attrs, ins, outs in instrs),
        tuple((k, tuple(i), tuple(o)) for k, i, o in steps), n_slots, tuple(dead), precision)


def type_from_wire(data: Any) -> TensorType:
    shape, dtype, placements = data
    return TensorType(tuple(shape), dtype, tuple(placements))


def plain(value: Any) -> Any:
    """An attribute's value as it can travel: NumPy's scalars as Python's, lists and arrays as tuples.

    Raises TypeError for what is no None, bool, str, number of 64 bits, or sequence of these.
    """
    if value is None or isinstance(value, bool | float | str):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, tuple | list):
        return tuple(plain(v) for v in value)
    if isinstance(value, int) and -2 ** 63 <= value < 2 ** 64:
        return int(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} is none of the values that an operation can "
                    f"be given: None, bool, str, float, int of 64 bits, or a sequence of these")


def freeze(value: Any) -> Any:
    """Lists become tuples, all the way down."""
    return tuple(freeze(v) for v in value) if isinstance(value, list | tuple) else value
