"""Milliseconds of scaled dot-product attention, forward and forward + backward: meshtape's kernels beside
torch.

    python benchmarks/attention.py [--rounds 30] [--layer]

One thread, float32, shapes (batch, heads, length, width). meshtape's figures are the kernels alone, as a
worker calls them; with --layer the whole of nn.functional on one worker, recording included. The contenders
take turns, and figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np

SHAPES = ((32, 4, 64, 16), (16, 4, 128, 32), (4, 8, 512, 64), (1, 4, 2048, 64))

Call = Callable[[], Any]


def arrays(shape: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]


def kernels(shape: tuple[int, ...], is_causal: bool) -> tuple[Call, Call]:
    """Forward, and forward + backward, of the rows' kernels."""
    from meshtape.runtime.memory import keep_pages
    from meshtape.runtime.op import TABLE
    keep_pages()
    q, k, v, g = arrays(shape)
    attrs = TABLE["attention"].attrs | {"is_causal": is_causal, "scale": shape[-1]**-0.5}

    def forward() -> Any:
        return TABLE["attention"].kernel(np, q, k, v, True, 0, 0, **attrs)

    def both() -> Any:
        out, lse = forward()
        delta = TABLE["sum"].kernel(np, np.multiply(g, out), axis=3, keepdims=False, dtype=None)
        return TABLE["attention_grad"].kernel(np, g, delta, q, k, v, lse, True, 0, 0, **attrs)
    return forward, both


def layers(shape: tuple[int, ...], is_causal: bool) -> tuple[Call, Call]:
    """The same through nn.functional, waiting for the results."""
    import meshtape as mt
    from meshtape.nn import functional as F
    q, k, v, g = (mt.tensor(x, requires_grad=i < 3) for i, x in enumerate(arrays(shape)))

    def forward() -> Any:
        with mt.no_grad():
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).sum().item()

    def both() -> Any:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return mt.grad(out, (q, k, v), g)[0].sum().item()
    return forward, both


def torch_calls(shape: tuple[int, ...], is_causal: bool) -> tuple[Call, Call]:
    import torch
    torch.set_num_threads(1)
    q, k, v, g = (torch.tensor(x, requires_grad=i < 3) for i, x in enumerate(arrays(shape)))

    def forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    def both() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return torch.autograd.grad(out, (q, k, v), g)
    return forward, both


def milliseconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layer", action="store_true")
    options = parser.parse_args()
    ours = layers if options.layer else kernels
    print(f"{'shape':20}{'causal':>7}{'forward':>10}{'torch':>9}{'both':>10}{'torch':>9}{'both/torch':>12}")
    for shape in SHAPES:
        for is_causal in (False, True):
            calls = [*ours(shape, is_causal), *torch_calls(shape, is_causal)]
            for call in calls:
                call()
            times = [[milliseconds(call) for call in calls] for _ in range(options.rounds)]
            f, b, tf, tb = (statistics.median(t) for t in zip(*times, strict=True))
            print(
                f"{shape!s:20}{is_causal!s:>7}{f:10.2f}{tf:9.2f}{b:10.2f}{tb:9.2f}{b / tb:12.2f}", flush=True
            )


if __name__ == "__main__":
    main()
