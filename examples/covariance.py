"""Arrays without gradients: the covariance of a large array, standardised and split by rows.

    python examples/covariance.py [--rows N] [--workers N] [--backend ray|local|inline]

Functions and methods are NumPy's, by the names of the Array API standard. Each worker makes its own rows,
and what travels are sums of 50 and of 50 x 50 numbers. The random numbers come from counters, so they are the
same on any number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from command import Parser, at_least_one, start

import meshtape as mt

COLUMNS = 50


def covariance(x: Any) -> Any:
    """Covariance (columns, columns) of the standardised columns of x: the same text for both libraries."""
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    return z.T @ z / (x.shape[0] - 1)


def timed(make: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """The result and the seconds it took, the better of two runs."""
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        result = make()
        best = min(best, time.perf_counter() - started)
    return result, best


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_mesh(backend="local")
    parser.add_argument("--rows", type=at_least_one, default=1_000_000, metavar="N", help="rows of the array")
    options = parser.parse_args()
    start(options)
    mt.manual_seed(0)
    noise = mt.random.normal(shape=(options.rows, COLUMNS), layout=mt.Shard(0))
    x = noise + noise[:, :1] * mt.linspace(0.0, 2.0, COLUMNS)       # columns that have something in common
    print(f"{mt.current_mesh()}\nx: {x.shape} {x.dtype}, {x.nbytes / 1e6:.0f} MB, layout {x.layout}")
    ours, ours_seconds = timed(lambda: covariance(x).numpy())
    mt.explain()
    whole = x.numpy()
    theirs, theirs_seconds = timed(lambda: covariance(whole))
    exact = covariance(whole.astype(np.float64))
    print(f"\n{'':20}{'seconds':>10}{'error':>10}   corner")
    rows = (("meshtape, float32", ours_seconds, ours), ("NumPy, float32", theirs_seconds, theirs))
    for name, seconds, found in rows:
        print(f"{name:20}{seconds:10.3f}{np.abs(found - exact).max():10.1e}   {found[0, :4].round(4)}")
    print(f"{'NumPy, float64':40}   {exact[0, :4].round(4)}")
    if not np.allclose(ours, exact, atol=2e-3):
        raise SystemExit("meshtape's covariance is wrong.")
    print("The covariances agree.")


if __name__ == "__main__":
    main()
