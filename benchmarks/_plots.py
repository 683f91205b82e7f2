"""The plots of docs/benchmarks/cpu.md. Figures come as {case: {name: median}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Medians = Mapping[Any, Mapping[str, float]]
COLOURS = {"torch": "#e07a3f", "fused": "#eda77f", "compile": "#b3541e", "ddp": "#8c4a2f", "gloo": "#8c4a2f",
           "jax1": "#6c8ebf", "jax2": "#3b5b92", "numpy": "#9aa5b1", "dask1": "#c9a227", "dask2": "#8f7315",
           "mesh1": "#2a9d8f", "mesh2": "#1b6b62", "shm": "#1b6b62", "threads": "#2a9d8f", "tcp": "#7cc8bf"}
plt.rcParams.update({"figure.dpi": 100, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False,
                     "legend.fontsize": 8})


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def grouped(ax: Any, cases: Sequence[str], series: Mapping[str, tuple[str, Sequence[float | None]]]) -> None:
    """Bars side by side for every case; `series` gives label -> (colour, heights)."""
    width = 0.8 / max(1, len(series))
    for i, (label, (colour, heights)) in enumerate(series.items()):
        at = [k + (i + 0.5) * width - 0.4 for k in range(len(cases))]
        ax.bar(at, [h or 0 for h in heights], width * 0.92, color=colour, label=label)
    ax.set_xticks(range(len(cases)), cases)
    ax.grid(axis="x", visible=False)


def finish(ax: Any, title: str, target: float | None) -> None:
    """A line at 1 and one at the target, the title, and the legend above the highest bar."""
    ax.axhline(1, color="black", linewidth=1)
    if target is not None:
        ax.axhline(target, color="black", linewidth=1, linestyle=":", label=f"target {target:g}")
    ax.set_ylim(top=1.2 * max(ax.get_ylim()[1], target or 1))
    ax.set_title(title, fontsize=10)
    ax.legend(ncols=5, loc="upper right")


def ratios(cases: Medians, a: str, b: str) -> list[float | None]:
    return [found[a] / found[b] if a in found and b in found else None for found in cases.values()]


def compared(ax: Any, cases: Medians, pairs: Sequence[tuple[str, str, str]], title: str,
             target: float | None = None) -> None:
    """Bars of a/b for (label, a, b), with a line at 1 and one at the target; coloured as a."""
    series = {label: (COLOURS[a.split()[0]], ratios(cases, a, b)) for label, a, b in pairs}
    grouped(ax, list(cases), {label: s for label, s in series.items() if any(s[1])})
    finish(ax, title, target)


def train(path: Path, cases: Medians) -> None:
    figure, (one, two) = plt.subplots(2, 1, figsize=(8.6, 6))
    compared(one, cases, [("torch eager", "torch", "mesh1"), ("fused AdamW", "fused", "mesh1"),
                          ("torch.compile", "compile", "mesh1"), ("JAX", "jax1", "mesh1")],
             "meshtape on 1 worker: times as fast as", 1.2)
    compared(two, cases, [("torch DDP", "ddp", "mesh2"), ("JAX", "jax2", "mesh2")],
             "meshtape on 2 workers: times as fast as", 2)
    save(figure, path)


def scaling(path: Path, cases: Medians) -> None:
    figure, (strong, weak) = plt.subplots(2, 1, figsize=(8.6, 5.4))
    ours, theirs, jax = ("mesh1", "mesh2"), ("torch", "ddp"), ("jax1", "jax2")
    for ax, suffix, title, target in (
            (strong, "", "strong scaling: speed-up of 2 workers over 1, same batch", 1.6),
            (weak, " 2B", "weak scaling: time of batch B on 1 worker / time of 2B on 2", None)):
        series = {label: (COLOURS[b], ratios(cases, a, b + suffix))
                  for label, (a, b) in (("meshtape", ours), ("torch DDP", theirs), ("JAX", jax))}
        grouped(ax, list(cases), {label: s for label, s in series.items() if any(s[1])})
        finish(ax, title, target)
    save(figure, path)


def arrays(path: Path, cases: Medians) -> None:
    figure, axes = plt.subplots(1, len(cases), figsize=(8.6, 3), squeeze=False)
    for ax, (case, found) in zip(axes[0], cases.items(), strict=True):
        ax.bar(list(found), list(found.values()), color=[COLOURS[name] for name in found])
        ax.set_title(f"{case}, ms", fontsize=10)
        ax.tick_params(axis="x", rotation=45)
        ax.grid(axis="x", visible=False)
    save(figure, path)


def all_reduce(path: Path, sizes: Medians) -> None:
    figure, ax = plt.subplots(figsize=(8.6, 3.8))
    for name in next(iter(sizes.values())):
        ax.plot(list(sizes), [times[name] for times in sizes.values()], marker="o", markersize=4,
                color=COLOURS[name], label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(list(sizes), [f"{s >> 20} MB" if s >= 1 << 20 else f"{s >> 10} KB" for s in sizes])
    ax.set_title("all-reduce of float32 between two processes (or threads), microseconds", fontsize=10)
    ax.legend()
    save(figure, path)


def many_workers(path: Path, us: Mapping[int, float]) -> None:
    figure, ax = plt.subplots(figsize=(8.6, 3))
    ax.plot(list(us), [t / n for n, t in us.items()], marker="o", color=COLOURS["mesh2"])
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(us), [str(n) for n in us])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("workers")
    ax.set_title("CPU time of the driver's thread per training step and worker, microseconds", fontsize=10)
    save(figure, path)
