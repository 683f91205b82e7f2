"""Seeing what happens: the last batch as a table, and who holds which slice of a tensor."""

from __future__ import annotations

import itertools
from math import prod
from pathlib import Path
from typing import Any

from meshtape.autograd import Tensor
from meshtape.autograd.tensor import owner_session
from meshtape.runtime.dtypes import canonical
from meshtape.runtime.errors import MeshtapeError
from meshtape.runtime.shards import coordinate, is_partial, piece
from meshtape.scheduler import current
from meshtape.scheduler.report import rows, table

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#9d755d")


def explain(*, show: bool = True) -> str:
    """The batch that was sent last (what is pending is sent first), one line for every step that workers run.

    Columns: op; shapes, dtypes and layouts of operands and results; what moved over the mesh and how many
    bytes each worker sends for it (by the cost model); the line of the program that called it. With workers
    on GPUs, a line for each mesh axis says by what its collectives travel, and why. Prints the table unless
    show=False; returns it.
    """
    session = current.session()
    if session.body:
        session.flush()
    if session.last is None:
        text = "nothing has been sent yet"
    else:
        fed = sum(
            _fed(t.shape, t.dtype, t.placements, session.axes.shape) for instr, t in _feeds(session.last)
        )
        text = table(rows(session.last, session.axes), session.axes, fed)
        text = "\n".join([text, *_links(session.mesh)])
    if show:
        print(text)
    return text


def _links(mesh: Any) -> list[str]:
    """How collectives travel along each mesh axis, where that was chosen, and why."""
    return [f"{name}: {kind} ({reason})"
            for name, kind, reason in zip(mesh.names, mesh.links, mesh.reasons, strict=True) if reason]


def _feeds(sent: Any) -> list[Any]:
    program = sent.body.program
    return [
        (program.instrs[k], program.instrs[k].outs[0])
        for k, _, _ in program.steps
        if program.instrs[k].op == "feed"
    ]


def _fed(shape: tuple[int, ...], dtype: str, placements: Any, mesh_shape: tuple[int, ...]) -> int:
    return canonical(dtype).itemsize * prod(
        piece(shape, placements, mesh_shape, (0,) * len(mesh_shape)).shape
    )


def visualize(tensor: Tensor, path: str | Path | None = None, *, show: bool = True) -> str:
    """Which worker holds which slice of `tensor`, as text; with `path`, also as a picture (PNG, by
    matplotlib).

    Workers that hold the same slice share a line. Prints the text unless show=False; returns it.
    """
    session = owner_session(tensor)
    held = slices(tensor)
    lines = [f"{tuple(tensor.shape)} {tensor.dtype.name}, layout {tensor.layout}"]
    for where, ranks in held.items():
        text = ", ".join(f"{a}:{b}" for a, b in where) if where else "the scalar"
        extent = " x ".join(str(b - a) for a, b in where)
        workers = ", ".join(f"{r} ({session.mesh.nodes[r]}, {session.mesh.devices[r]})" for r in ranks)
        lines.append(f"  [{text}]" + (f"  {extent} elements" if extent else "") + f"  on worker {workers}")
    if any(is_partial(p) for p in tensor.spec.placements):
        lines.append("  (workers of one slice hold addends of it: the values are their reduction)")
    if path is not None:
        draw(tensor, held, Path(path))
    if show:
        print("\n".join(lines))
    return "\n".join(lines)


def slices(tensor: Tensor) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """(start, stop) along every dimension of each distinct slice, and the ranks that hold it."""
    shape = tensor.spec.owner.axes.shape
    size = tensor.spec.owner.axes.size
    out: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for rank in range(size):
        mine = piece(tensor.shape, tensor.spec.placements, shape, coordinate(rank, shape))
        where = tuple((o, o + n) for o, n in zip(mine.offset, mine.shape, strict=True))
        out.setdefault(where, []).append(rank)
    return out


def draw(tensor: Tensor, held: dict[tuple[tuple[int, int], ...], list[int]], path: Path) -> None:
    """The slices as coloured rectangles over the tensor's two most divided dimensions."""
    try:
        import matplotlib
    except ImportError as error:
        raise MeshtapeError(
            "visualize(path=...) draws with matplotlib: pip install meshtape[examples]"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    rows_dim, columns_dim = drawn_dimensions(tensor)
    height = tensor.shape[rows_dim] if rows_dim is not None else 1
    width = tensor.shape[columns_dim] if columns_dim is not None else 1
    scale = 6.0 / max(height, width, 1)
    figure, axes = plt.subplots(figsize=(max(width * scale, 2.4) + 1.2, max(height * scale, 1.2) + 1.4))
    seen: dict[tuple[Any, Any], list[int]] = {}
    for where, ranks in held.items():
        key = tuple((0, 1) if d is None else where[d] for d in (rows_dim, columns_dim))
        seen.setdefault(key, []).extend(ranks)  # type: ignore[arg-type]
    for ((top, bottom), (left, right)), ranks in seen.items():
        if bottom == top or right == left:
            continue
        axes.add_patch(
            Rectangle(
                (left, top),
                right - left,
                bottom - top,
                facecolor=COLOURS[min(ranks) % len(COLOURS)],
                edgecolor="white",
                linewidth=2,
                alpha=0.85,
            )
        )
        axes.text(
            (left + right) / 2,
            (top + bottom) / 2,
            "worker " + ", ".join(map(str, sorted(ranks))),
            ha="center",
            va="center",
            color="white",
            fontsize=10,
            wrap=True,
        )
    axes.set_xlim(0, max(width, 1))
    axes.set_ylim(max(height, 1), 0)
    axes.set_xlabel("" if columns_dim is None else f"dimension {columns_dim} ({width})")
    axes.set_ylabel("" if rows_dim is None else f"dimension {rows_dim} ({height})")
    for axis, dim, index in ((axes.yaxis, rows_dim, 0), (axes.xaxis, columns_dim, 1)):
        axis.set_ticks([] if dim is None else sorted(set(itertools.chain(*(k[index] for k in seen)))))
    axes.set_title(f"{tuple(tensor.shape)} {tensor.dtype.name}\n{tensor.layout}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def drawn_dimensions(tensor: Tensor) -> tuple[int | None, int | None]:
    """Rows and columns of the picture: the split dimensions first, then the others, in the tensor's order."""
    split = [d for d in range(tensor.ndim) if d in tensor.spec.placements]
    rest = [d for d in range(tensor.ndim) if d not in split]
    chosen = sorted((split + rest)[:2])
    if len(chosen) == 2:
        return chosen[0], chosen[1]
    return None, (chosen[0] if chosen else None)


__all__ = ["draw", "drawn_dimensions", "explain", "slices", "visualize"]
