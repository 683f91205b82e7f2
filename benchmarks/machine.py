"""What the machine gives to one process multiplying matrices, and to two at once.

    python benchmarks/machine.py [--rounds 15]

GFLOP/s of each process for float32 products of 1024 x 1024 in NumPy, one thread each, and of one process in
torch. Two processes that get much less than one alone bound every speed-up that a second worker can bring.
"""

from __future__ import annotations

from typing import Any

import _runner
import numpy as np

SIZE, PRODUCTS = 1024, 20
RANKS = {"1": 1, "2": 2, "torch": 1}


def build(role: _runner.Role) -> tuple[_runner.Run, None]:
    a: Any = np.ones((SIZE, SIZE), np.float32)
    out: Any = np.empty_like(a)
    multiply: Any = np.matmul
    if role.name == "torch":
        import torch
        torch.set_num_threads(1)
        a, out, multiply = torch.from_numpy(a), torch.from_numpy(out), torch.mm

    def run(n: int) -> None:
        for _ in range(n):
            multiply(a, a, out=out)

    run(PRODUCTS)
    return _runner.timed(run), None


def gflops(contender: _runner.Contender, products: int = PRODUCTS) -> float:
    """Of the slower process."""
    return 2e-9 * SIZE ** 3 / contender.seconds(products)


def main() -> None:
    parser = _runner.parser(__doc__, ["gemm"], RANKS, rounds=15)
    options = parser.parse_args()
    if options.serve:
        _runner.serve(build, options)
        return
    wanted = {name: (RANKS[name], {}) for name in options.contenders.split(",")}
    with _runner.contenders(__file__, "gemm", wanted) as running:
        turns = {name: (lambda c=c: gflops(c)) for name, c in running.items()}
        figures = _runner.take_turns(turns, options.rounds)
    for name, found in _runner.medians(figures).items():
        print(f"{name:6} {found:6.0f} GFLOP/s each")
    _runner.write_json(options.json, figures)


if __name__ == "__main__":
    main()
