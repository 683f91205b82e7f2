"""What gpu.py makes of its figures: the page, and on it what they should be."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A row of the table: a measured value from the medians of a case, and what it should be at least (or,
    with `most`, at most).
    """

    text: str
    case: str
    value: Callable[[Mapping[str, float]], float]
    wanted: float
    most: bool = False


TARGETS = (
    Target("launch-bound MLP step, torch eager : meshtape", "mlp", lambda m: m["torch"] / m["mesh"], 3.0),
    Target("the same, torch.compile with CUDA graphs : meshtape", "mlp",
           lambda m: m["compile"] / m["mesh"], 1.0),
    Target("GPT-2 small step, torch eager : meshtape", "gpt2", lambda m: m["torch"] / m["mesh"], 1.2),
    Target("the same, torch.compile : meshtape", "gpt2", lambda m: m["compile"] / m["mesh"], 0.9),
    Target("ResNet-18 step, torch eager : meshtape", "resnet18", lambda m: m["torch"] / m["mesh"], 1.0),
    Target("pointwise chain of 6, part of copy bandwidth", "chain", lambda m: m["copy"] / m["mesh"], 0.85),
    Target("bf16 GEMM, torch : meshtape", "gemm", lambda m: m["torch"] / m["mesh"], 0.98),
    Target("a worker's overhead over its kernels", "overhead",
           lambda m: m["mesh"] / m["plain"] - 1, 0.03, most=True),
    Target("digits MLP, CPU worker : GPU worker", "digits", lambda m: m["cpu"] / m["mesh"], 15.0),
)


INTRODUCTION = """# Benchmarks on one GPU

`make bench-gpu` measures what follows on the first GPU of a machine with CuPy and PyTorch, and writes this
page. It takes about 8 minutes; [`benchmarks/gpu.py`](../../benchmarks/gpu.py) says what the cases are.

Every figure is a quotient of two medians of the same run on the same machine, or a time. "Wanted" was set
before anything was measured.
"""
UNMEASURED = "**Nothing here has been measured yet**: no GPU was at hand. The table says what is wanted."


def tables(figures: Mapping[str, Any]) -> list[str]:
    """The tables, in Markdown."""
    out = ["| measure | found | wanted |", "|---|---|---|"]
    for target in TARGETS:
        found = figures.get(target.case, {})
        sign = "at most" if target.most else "at least"
        shown = found.get("error") or "not measured yet"
        with suppress(KeyError):
            shown = f"{target.value({k: statistics.median(v) for k, v in found['seconds'].items()}):.3f}"
        out.append(f"| {target.text} | {shown} | {sign} {target.wanted:g} |")
    if figures:
        out += ["", "| case | median milliseconds per step |", "|---|---|"]
    for case, found in figures.items():
        times = {k: statistics.median(v) for k, v in found.get("seconds", {}).items()}
        batch = times.pop("batch", 0)
        shown = ", ".join(f"{k} {1e3 * v:.3f}" for k, v in times.items())
        out.append(f"| {case}{f' (batch {batch:.0f})' if batch else ''} | {shown or found.get('error')} |")
    return out


def machine(figures: Mapping[str, Any]) -> str:
    """When and on what, in a sentence."""
    if not any("seconds" in found for found in figures.values()):
        return UNMEASURED
    facts: dict[str, Any] = {}
    for found in figures.values():
        for about in found.get("about", {}).values():
            facts.update((k, v) for k, v in about.items() if v)
    gpu = facts.pop("gpu", "a CPU" if facts else "an unknown device")
    return f"Measured on {date.today()} on {gpu}: " + ", ".join(f"{k} {v}" for k, v in facts.items()) + "."


def page(figures: Mapping[str, Any]) -> str:
    """docs/benchmarks/gpu.md."""
    return "\n".join([INTRODUCTION, machine(figures), "", *tables(figures)]) + "\n"
