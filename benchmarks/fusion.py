"""Ways to run a chain of pointwise ops on a CPU, one thread: whole arrays, cache blocks, numexpr, numba.

    python benchmarks/fusion.py

A chain of n float32 ops alternates add, multiply, maximum and (every fifth) tanh over three inputs. `whole`:
one ufunc call an op, over two reused buffers. `blocks`: the same calls block by block, so that intermediates
stay in cache. numexpr and numba compile the whole expression (their first call is shown apart, as compile
time). Milliseconds, medians of interleaved rounds.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np

LENGTHS, SIZES, BLOCKS = (2, 5, 15), (1 << 14, 1 << 18, 1 << 22), (1 << 12, 1 << 13, 1 << 14, 1 << 15)
OPS: list[tuple[str, str]] = [
    ("add", "b"),
    ("multiply", "a"),
    ("maximum", "c"),
    ("multiply", "b"),
    ("tanh", ""),
]


def chain(n: int) -> list[tuple[str, str]]:
    return [OPS[i % len(OPS)] for i in range(n)]


def whole(ops: list[tuple[str, str]], given: dict[str, Any], out: Any) -> None:
    value = given["a"]
    for name, operand in ops:
        ufunc = getattr(np, name)
        value = ufunc(value, given[operand], out=out) if operand else ufunc(value, out=out)


def blocks(ops: list[tuple[str, str]], given: dict[str, Any], out: Any, size: int) -> None:
    calls = [(getattr(np, name), operand) for name, operand in ops]
    for at in range(0, out.size, size):
        part = slice(at, at + size)
        here = out[part]
        value = given["a"][part]
        cut = {k: v[part] for k, v in given.items()}
        for ufunc, operand in calls:
            value = ufunc(value, cut[operand], out=here) if operand else ufunc(value, out=here)


def expression(ops: list[tuple[str, str]], maximum: str) -> str:
    text = "a"
    for name, operand in ops:
        text = {"add": f"({text} + {operand})", "multiply": f"({text} * {operand})", "tanh": f"tanh({text})",
                "maximum": maximum.format(text, operand)}[name]
    return text


def with_numexpr(ops: list[tuple[str, str]], given: dict[str, Any], out: Any) -> Callable[[], Any]:
    import numexpr
    text = expression(ops, "where({0} > {1}, {0}, {1})") if len(ops) < 8 else None
    if text is None:        # a `where` repeats its operand, so long chains go in pieces
        half = len(ops) // 3
        texts = [expression(ops[i:i + half], "where({0} > {1}, {0}, {1})") for i in range(0, len(ops), half)]

        def pieces() -> None:
            numexpr.evaluate(texts[0], given, out=out)
            for t in texts[1:]:
                numexpr.evaluate(t, {**given, "a": out}, out=out)
        return pieces
    return lambda: numexpr.evaluate(text, given, out=out)


def with_numba(ops: list[tuple[str, str]], given: dict[str, Any], out: Any) -> Callable[[], Any]:
    import math

    import numba
    lines = ["def f(a, b, c, out):", " for i in range(out.size):", "  v = a[i]"]
    for name, operand in ops:
        lines.append(
            {
                "add": f"  v = v + {operand}[i]",
                "multiply": f"  v = v * {operand}[i]",
                "tanh": "  v = tanh(v)",
                "maximum": f"  v = max(v, {operand}[i])",
            }[name]
        )
    lines.append("  out[i] = v")
    scope: dict[str, Any] = {"tanh": math.tanh}
    exec("\n".join(lines), scope)
    compiled = numba.njit(fastmath=False)(scope["f"])
    return lambda: compiled(given["a"], given["b"], given["c"], out)


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"NumPy {np.__version__}; milliseconds")
    names = ["whole", *(f"blocks {b >> 10}k" for b in BLOCKS), "numexpr", "numba"]
    print(
        f"{'ops':>4}{'elements':>10}" + "".join(f"{n:>12}" for n in names) + "   first call: numexpr, numba"
    )
    for n, size in itertools.product(LENGTHS, SIZES):
        measure(n, size, names, rng)


def measure(n: int, size: int, names: list[str], rng: np.random.Generator) -> None:
    """One line of the table: a chain of n ops over `size` elements."""
    given = {k: rng.standard_normal(size, dtype=np.float32) for k in "abc"}
    out, ops = np.empty(size, np.float32), chain(n)
    runs: dict[str, Callable[[], Any]] = {"whole": lambda: whole(ops, given, out)}
    for b in BLOCKS:
        runs[f"blocks {b >> 10}k"] = lambda b=b: blocks(ops, given, out, b)
    runs["numexpr"], runs["numba"] = with_numexpr(ops, given, out), with_numba(ops, given, out)
    first = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        first[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {k: [] for k in runs}
    for _ in range(max(5, (1 << 22) // size)):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    print(f"{n:4d}{size:10d}" + "".join(f"{1e3 * statistics.median(times[k]):12.3f}" for k in names)
          + f"   {1e3 * first['numexpr']:8.1f} {1e3 * first['numba']:8.1f}")


if __name__ == "__main__":
    main()
