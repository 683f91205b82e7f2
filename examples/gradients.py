"""A gradient by hand in NumPy, beside the same gradient from one call to backward().

    python examples/gradients.py [--workers N] [--backend ray|local|inline]

x and y are (n, 3) arrays and z is (3,). What is differentiated, by x, y and z:

    a = tanh(x * z)        b = a + y        c = b / (1 + b**2)        value = sum(c)
"""

from __future__ import annotations

import time

import numpy as np
from command import Parser, start

import meshtape as mt


def by_hand(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """The value, and its gradients by x, y and z from the chain rule on paper."""
    a = np.tanh(x * z)
    b = a + y
    value = (b / (1 + b**2)).sum()
    db = (1 - b**2) / (1 + b**2) ** 2
    dy = db
    da = db * (1 - a**2)
    dx = da * z
    dz = (da * x).sum(axis=0)       # z was broadcast over the rows, so its gradient is summed over them
    return float(value), [dx, dy, dz]


def by_tape(x: mt.Tensor, y: mt.Tensor, z: mt.Tensor) -> tuple[float, list[np.ndarray]]:
    """The same: write what is computed, and ask."""
    b = mt.tanh(x * z) + y
    value = (b / (1 + b**2)).sum()
    value.backward()
    return value.item(), [t.grad.numpy() for t in (x, y, z)]


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_mesh(backend="local")
    start(parser.parse_args())
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((1000, 3), (1000, 3), (3,))]
    x, y = (mt.tensor(a, layout=mt.Shard(0), requires_grad=True) for a in arrays[:2])
    z = mt.tensor(arrays[2], requires_grad=True)

    started = time.perf_counter()
    value, expected = by_hand(*arrays)
    middle = time.perf_counter()
    found_value, found = by_tape(x, y, z)
    ended = time.perf_counter()

    print(f"{mt.current_mesh()}\n")
    print(f"{'':10}{'shape':12}{'layout':14}{'by hand':>14}{'backward()':>14}{'difference':>13}")
    print(f"{'value':10}{'()':12}{'':14}{value:14.6f}{found_value:14.6f}{abs(value - found_value):13.1e}")
    for name, tensor, want, got in zip("xyz", (x, y, z), expected, found, strict=True):
        gap = np.abs(want - got).max()
        print(f"{'d/d' + name:10}{tensor.shape!s:12}{tensor.grad.layout!r:14}"
              f"{want.flat[0]:14.6f}{got.flat[0]:14.6f}{gap:13.1e}")
        if not np.allclose(want, got, rtol=1e-10, atol=1e-12):
            raise SystemExit(f"The gradients by {name} differ by {gap:.1e}.")
    print(f"\n(Of each gradient, the first entry and the largest difference of all.)"
          f"\nBy hand: seven lines and a sum that is easy to forget, {1e3 * (middle - started):.1f} ms."
          f" backward(): one line, {1e3 * (ended - middle):.1f} ms the first time."
          f"\nThe gradients agree.")


if __name__ == "__main__":
    main()
