"""What the machine gives before any library comes in: one process multiplying matrices, and two at once.

    python benchmarks/machine.py [--rounds 15]

GFLOP/s of each process for float32 products of 1024 x 1024 in NumPy, one thread each. Two processes that get
much less than one alone bound every speed-up that a second worker can bring.
"""

from __future__ import annotations

import _runner
import numpy as np

SIZE, PRODUCTS = 1024, 20


def build(role: _runner.Role) -> tuple[_runner.Run, None]:
    a = np.ones((SIZE, SIZE), np.float32)
    out = np.empty_like(a)

    def run(n: int) -> None:
        for _ in range(n):
            np.matmul(a, a, out=out)

    run(PRODUCTS)
    return _runner.timed(run), None


def gflops(contender: _runner.Contender, products: int = PRODUCTS) -> float:
    """Of the slower process."""
    return 2e-9 * SIZE ** 3 / contender.seconds(products)


def main() -> None:
    parser = _runner.parser(__doc__, ["gemm"], ["1", "2"], rounds=15)
    options = parser.parse_args()
    if options.serve:
        _runner.serve(build, options)
        return
    wanted = {name: (int(name), {}) for name in options.contenders.split(",")}
    with _runner.contenders(__file__, "gemm", wanted) as running:
        turns = {name: (lambda c=c: gflops(c)) for name, c in running.items()}
        figures = _runner.take_turns(turns, options.rounds)
    for name, found in _runner.medians(figures).items():
        print(f"{name} at once: {found:.0f} GFLOP/s each")
    _runner.write_json(options.json, figures)


if __name__ == "__main__":
    main()
