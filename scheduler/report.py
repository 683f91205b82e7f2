"""A batch as a table: what ran, on what shapes and layouts, and what moved."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from meshtape.runtime.dtypes import canonical
from meshtape.runtime.moves import changed_axis
from meshtape.runtime.protocol import Instr, TensorType
from meshtape.runtime.shards import REPLICATE, is_partial
from meshtape.scheduler.cost import move_bytes
from meshtape.scheduler.inflight import Sent, placements_text
from meshtape.scheduler.layout import Axes
from meshtape.scheduler.redistribution import bytes_without
from meshtape.scheduler.sites import site_text

SHORT = {
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "float64": "f64",
    "int64": "i64",
    "int32": "i32",
    "complex64": "c64",
    "complex128": "c128",
}


class Row(NamedTuple):
    """One line of the table. `wire` counts the bytes that each worker sends."""

    op: str
    operands: str
    result: str
    moved: str
    wire: int
    where: str


def rows(sent: Sent, axes: Axes) -> list[Row]:
    """A row for every step of a batch, in the order in which workers run them."""
    assert sent.body is not None
    out = []
    for (number, _, _), origin in zip(sent.body.program.steps, sent.body.origin, strict=True):
        instr = sent.body.program.instrs[number]
        moved, wire = movement(instr, axes)
        out.append(
            Row(
                instr.op,
                several([type_text(t) for t in instr.ins if t is not None]),
                several([type_text(t) for t in instr.outs]),
                moved,
                wire,
                site_text(sent.sites[origin]),
            )
        )
    return out


def several(texts: list[str]) -> str:
    return ", ".join(texts) if len(texts) <= 3 else f"{len(texts)} tensors"


def type_text(t: TensorType) -> str:
    """Shape, dtype and placements, e.g. "64x128 f32 [S0]"."""
    shape = "x".join(map(str, t.shape)) or "scalar"
    return f"{shape} {SHORT.get(t.dtype, t.dtype)} {placements_text(t.placements)}"


def movement(instr: Instr, axes: Axes) -> tuple[str, int]:
    """What a step sends over the mesh, in words, and the modelled bytes that each worker sends."""
    if instr.op.endswith("_bucket"):
        axis, combine = instr.attrs[:2]
        wire = sum(
            _hop_bytes(t, t.placements, out.placements, axes)
            for t, out in zip(instr.ins, instr.outs, strict=True)
            if t is not None
        )
        word = instr.op.removesuffix("_bucket").replace("_", "-")
        return f"{word}{f'({combine})' if combine else ''} over {axes.names[axis]}", round(wire)
    if instr.op == "sharded_update":
        return _update_movement(instr, axes)
    if instr.op != "redistribute" or instr.ins[0] is None:
        return "", 0
    words, wire, source = [], 0.0, instr.ins[0]
    for before, after in pairwise(instr.attrs[0]):
        axis = changed_axis(before, after)
        words.append(f"{verb(before[axis], after[axis])} over {axes.names[axis]}")
        wire += _hop_bytes(source, before, after, axes)
    return ", ".join(words), round(wire)


def _update_movement(instr: Instr, axes: Axes) -> tuple[str, int]:
    """As movement(), of a sharded optimizer update: each parameter's bytes are scattered, and gathered."""
    axis, dims = instr.attrs[2:]
    tensors = [t for t in instr.ins if t is not None]
    wire = 0.0
    for param, grad, dim in zip(tensors, tensors[len(dims):], dims, strict=False):
        if dim >= 0:
            part = (*param.placements[:axis], dim, *param.placements[axis + 1 :])
            wire += _hop_bytes(grad, grad.placements, part, axes)
            wire += _hop_bytes(param, part, param.placements, axes)
    return f"reduce-scatter(sum), all-gather over {axes.names[axis]}", round(wire)


def verb(before: int | str, after: int | str) -> str:
    """The collective that changes one placement."""
    if is_partial(before):
        return f"all-reduce({before})" if after == REPLICATE else f"reduce-scatter({before})"
    if is_partial(after):
        return "spread"
    if before == REPLICATE:
        return "cut"
    return "all-gather" if after == REPLICATE else "all-to-all"


def _hop_bytes(
    t: TensorType, before: tuple[int | str, ...], after: tuple[int | str, ...], axes: Axes
) -> float:
    axis = changed_axis(before, after)
    whole = bytes_without(t.shape, canonical(t.dtype).itemsize, before, axis, axes.shape)
    return move_bytes(before[axis], after[axis], whole, axes.shape[axis])


def bytes_text(n: int) -> str:
    """1.5 KB, 3.2 MB, ... (powers of 1000); "" for none."""
    if not n:
        return ""
    size = float(n)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def table(found: list[Row], axes: Axes, batch_bytes: int) -> str:
    """The rows under their headings, and a line of totals."""
    cells = [("op", "operands", "result", "moved", "bytes", "called from")]
    cells += [(r.op, r.operands, r.result, r.moved, bytes_text(r.wire), short(r.where)) for r in found]
    widths = [max(len(c[i]) for c in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(w) for text, w in zip(c, widths, strict=True)).rstrip() for c in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    mesh = ", ".join(f"{n}={s}" for n, s in zip(axes.names, axes.shape, strict=True))
    collectives = sum(bool(r.wire) for r in found)
    lines.append(
        f"{len(found)} steps on mesh ({mesh}); {collectives} collectives, each worker sends "
        f"{bytes_text(sum(r.wire for r in found)) or '0 B'} and is fed {bytes_text(batch_bytes) or '0 B'}. "
        f"S0: split on dimension 0, R: replicated, P(sum): addends."
    )
    return "\n".join(lines)


def short(where: str) -> str:
    """The last two parts of a path, with its line."""
    return "/".join(where.split("/")[-2:])
