"""Turn the figures of the benchmark programs into docs/benchmarks/cpu.md and its plots.

    python benchmarks/report.py [--figures build/benchmarks] [--out docs/benchmarks]

Tables and plots are made from the JSON files; the prose around them is benchmarks/cpu.md.in, whose $names
stand for the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import _plots

HERE = Path(__file__).parent
PROGRAMS = ("machine", "train_step", "arrays", "all_reduce", "controller", "record")
# What was set out for: times as fast as the peer; all-reduce by bytes, beside gloo.
TRAIN_TARGETS = {("torch", "mesh1"): 1.2, ("ddp", "mesh2"): 2.0, ("mesh1", "mesh2"): 1.6}
REDUCE_TARGETS = {1 << 10: 50, 1 << 20: 8, 1 << 26: 4}
NAMES = {"torch": "torch eager", "fused": "torch, fused AdamW", "compile": "torch.compile",
         "ddp": "torch DDP, 2", "jax1": "JAX, 1", "jax2": "JAX, 2", "mesh1": "meshtape, 1",
         "mesh2": "meshtape, 2", "numpy": "NumPy",
         "dask1": "Dask, 1", "dask2": "Dask, 2", "threads": "meshtape, threads", "gloo": "gloo",
         "gemm1": "one", "gemm2": "matrix products, two processes",
         "shm": "meshtape, shared memory", "tcp": "meshtape, TCP"}

Figures = dict[str, Any]
Medians = dict[str, dict[str, float]]


def medians(times: Mapping[str, Mapping[str, Sequence[float]]]) -> Medians:
    return {case: {name: statistics.median(t) for name, t in found.items()} for case, found in times.items()}


def shown(x: float | None) -> str:
    """Three significant digits, without an exponent."""
    if x is None:
        return "-"
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def times_as_fast(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio(found: Mapping[str, float], a: str, b: str) -> float | None:
    return found[a] / found[b] if a in found and b in found else None


def mean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of those that are there."""
    there = [v for v in values if v is not None]
    return statistics.geometric_mean(there) if there else None


def ratio_table(cases: Medians, pairs: Sequence[tuple[str, str]], title: str) -> str:
    """How many times as fast b is as a, by case, with a geometric mean and the targets."""
    pairs = [pair for pair in pairs if any(ratio(found, *pair) for found in cases.values())]
    columns = [[ratio(found, a, b) for found in cases.values()] for a, b in pairs]
    rows = [[case, *(times_as_fast(column[i]) for column in columns)] for i, case in enumerate(cases)]
    rows.append(["**geometric mean**", *(f"**{times_as_fast(mean(column))}**" for column in columns)])
    targets = [TRAIN_TARGETS.get(pair) for pair in pairs]
    if any(targets):
        rows.append(["target", *(times_as_fast(t) for t in targets)])
    return table([title, *(f"{NAMES[b]} : {NAMES[a]}" for a, b in pairs)], rows)


# --- sections ---------------------------------------------------------------------------------------------

def header(data: Figures) -> dict[str, str]:
    machine = data["train_step"]["machine"]
    gflops = {name: statistics.median(t) for name, t in data["machine"]["figures"].items()}
    versions = machine["versions"]
    core = machine["OPENBLAS_CORETYPE"]
    rows = [["machine", f"{machine['cores']} cores, {' '.join(machine['cpu'])}"
                        f"{', AVX-512' if machine['avx512'] else ''}, Linux {machine['linux']}"],
            ["versions", ", ".join(f"{name} {number}" for name, number in versions.items())],
            ["`OPENBLAS_CORETYPE`", core or "not set"],
            ["product of 1024 x 1024 float32 matrices", "; ".join(
                f"{PRODUCTS[n]} {g:.0f} GFLOP/s" for n, g in gflops.items())]]
    return {"machine": table([f"Measured on {machine['date']}", ""], rows)}


def train_sections(figures: Figures) -> tuple[dict[str, str], Medians]:
    found = medians({model: f["ms"] for model, f in figures.items()})
    names = [n for n in NAMES if any(n in times for times in found.values())]
    peers = [("torch", "mesh1"), ("fused", "mesh1"), ("compile", "mesh1"), ("jax1", "mesh1"),
             ("ddp", "mesh2"), ("jax2", "mesh2")]
    peaks = [n for n in ("torch", "jax1", "mesh1", "ddp", "jax2", "mesh2") if n in names]
    strong = [("mesh1", "mesh2"), ("torch", "ddp"), ("jax1", "jax2"), ("gemm1", "gemm2")]
    return {
        "train_ms": table(["ms per step", *(NAMES[n] for n in names)],
                          [[m, *(shown(times.get(n)) for n in names)] for m, times in found.items()]),
        "train_ratios": ratio_table(found, peers, "times as fast"),
        "strong": ratio_table(with_probes(found, figures), strong, "speed-up"),
        "weak": weak_table(found),
        "memory": table(["MiB", *(NAMES[n] for n in peaks)],
                        [[m, *(shown(f["peak"][n] / 2 ** 20) for n in peaks)] for m, f in figures.items()]),
    }, found


def with_probes(found: Medians, figures: Figures) -> Medians:
    """The same with what two processes multiplying matrices got beside one, as if it took them time."""
    def probe(gflops: Mapping[str, Sequence[float]]) -> dict[str, float]:
        one, two = (statistics.median(gflops[name]) for name in ("gemm1", "gemm2"))
        return {"gemm1": 2 * two, "gemm2": one}

    return {model: {**times, **(probe(f["gflops"]) if f["gflops"] else {})}
            for (model, times), f in zip(found.items(), figures.values(), strict=True)}


def weak_table(found: Medians) -> str:
    pairs = [(a, b) for a, b in (("mesh1", "mesh2"), ("torch", "ddp"), ("jax1", "jax2"))
             if any(f"{b} 2B" in times for times in found.values())]
    columns = [[ratio(times, a, f"{b} 2B") for times in found.values()] for a, b in pairs]
    rows = [[m, *(times_as_fast(column[i]) for column in columns)] for i, m in enumerate(found)]
    rows.append(["**geometric mean**", *(f"**{times_as_fast(mean(column))}**" for column in columns)])
    return table(["efficiency", *(f"{NAMES[b]}" for _, b in pairs)], rows)


def array_sections(figures: Figures) -> tuple[dict[str, str], Medians]:
    found = medians(figures)
    names = [n for n in ("numpy", "torch", "jax1", "dask1", "mesh1", "jax2", "dask2", "mesh2")
             if any(n in times for times in found.values())]
    peers = [(n, "mesh1") for n in ("numpy", "torch", "jax1", "dask1")]
    peers += [("jax2", "mesh2"), ("dask2", "mesh2"), ("mesh1", "mesh2")]
    pairs = [pair for pair in peers if any(ratio(times, *pair) for times in found.values())]
    return {
        "arrays_ms": table(["ms", *(NAMES[n] for n in names)],
                           [[c, *(shown(times.get(n)) for n in names)] for c, times in found.items()]),
        "arrays_ratios": table(["times as fast", *(f"{NAMES[b]} : {NAMES[a]}" for a, b in pairs)],
                               [[c, *(times_as_fast(ratio(times, a, b)) for a, b in pairs)]
                                for c, times in found.items()]),
    }, found


def size_name(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def reduce_section(figures: Figures) -> tuple[str, dict[int, dict[str, float]]]:
    found = {int(size): m for size, m in medians(figures).items()}
    names = list(next(iter(found.values())))
    ours = [n for n in names if n != "gloo" and "gloo" in names]
    rows = [[size_name(size), *(shown(times[n]) for n in names),
             *(times_as_fast(times["gloo"] / times[n]) for n in ours), shown(REDUCE_TARGETS.get(size))]
            for size, times in found.items()]
    head = [*(NAMES[n] for n in names), *(f"{NAMES[n]} : gloo" for n in ours), "target"]
    return table(["us", *head], rows), found


def controller_sections(figures: Figures, record: Figures) -> tuple[dict[str, str], dict[int, float]]:
    many = {int(n): statistics.median(us) for n, us in figures["many"]["us"].items()}
    messages = {int(n): m for n, m in figures["many"]["messages"].items()}
    tiny = medians(figures["tiny"])
    names = list(next(iter(tiny.values())))
    rows = [[m, *(shown(us[n]) for n in names), times_as_fast(ratio(us, "torch", "driver"))]
            for m, us in tiny.items()]
    rows.append(["**geometric mean**", *[""] * len(names),
                 f"**{times_as_fast(mean(ratio(us, 'torch', 'driver') for us in tiny.values()))}**"])
    return {
        "many": table(["workers", "messages per worker and step", "driver, us per step",
                       "us per step and worker"],
                      [[str(n), f"{messages[n]:.2f}", shown(us), shown(us / n)] for n, us in many.items()]),
        "tiny": table(["us per step", *(HOST[n] for n in names), "torch : driver"], rows),
        "record": table([f"{record['ops']} ops, forward and backward", "us"],
                        [["recording, per op", shown(record["per op"])],
                         ["recording, whole program", shown(record["ours"])],
                         ["torch eager, whole program", shown(record["torch"])],
                         ["flush of a known digest, driver's share", shown(record["flush"])],
                         ["flush at first sight", shown(record["first flush"])]]),
    }, many


PRODUCTS = {"1": "NumPy", "2": "NumPy, two processes at once, each", "torch": "torch"}
HOST = {"torch": "torch eager (host)", "driver": "driver, worker in the process",
        "whole": "with that worker's time", "driver2": "driver, two Ray workers"}


def summary(train: Medians, reduce: dict[int, dict[str, float]], record: Figures) -> str:
    """The targets, and what was reached."""
    rows = []
    for (a, b), target in TRAIN_TARGETS.items():
        found = [r for r in (ratio(times, a, b) for times in train.values()) if r is not None]
        if found:
            spread = f"{min(found):.2f} to {max(found):.2f}"
            rows.append([f"training step, {NAMES[b]} : {NAMES[a]}", times_as_fast(mean(found)), spread,
                         times_as_fast(target)])
    for size, target in REDUCE_TARGETS.items():
        if "gloo" in reduce.get(size, {}):
            r = reduce[size]["gloo"] / reduce[size]["shm"]
            rows.append([f"all-reduce of {size_name(size)}, {NAMES['shm']} : gloo", f"{r:.1f}", "",
                         f"{target}"])
    recording = times_as_fast(record["torch"] / record["ours"])
    rows.append(["recording of a program : torch eager's host time", recording, "", ""])
    return table(["times as fast", "geometric mean", "from, to", "target"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    data = {name: json.loads((options.figures / f"{name}.json").read_text()) for name in PROGRAMS}
    figures = {name: found["figures"] for name, found in data.items()}
    options.out.mkdir(parents=True, exist_ok=True)

    train_text, train = train_sections(figures["train_step"])
    array_text, arrays = array_sections(figures["arrays"])
    reduce_text, reduce = reduce_section(figures["all_reduce"])
    controller_text, many = controller_sections(figures["controller"], figures["record"])
    page = Template((HERE / "cpu.md.in").read_text()).substitute(
        header(data), **train_text, **array_text, **controller_text, all_reduce=reduce_text,
        summary=summary(train, reduce, figures["record"]))
    (options.out / "cpu.md").write_text(page)

    _plots.train(options.out / "train_step.png", train)
    _plots.scaling(options.out / "scaling.png", train)
    _plots.arrays(options.out / "arrays.png", arrays)
    _plots.all_reduce(options.out / "all_reduce.png", reduce)
    _plots.many_workers(options.out / "controller.png", many)
    print(f"written: {options.out / 'cpu.md'} and its plots")


if __name__ == "__main__":
    main()
