"""Array programs: meshtape on 1 and 2 workers beside NumPy, torch, JAX and Dask array.

    python benchmarks/arrays.py [--rounds 9] [--cases logistic,chain] [--contenders numpy,torch,mesh1]

logistic: steps of gradient descent on logistic regression, 1,000,000 x 50 float32 examples, the gradient
written out; examples and weights stay where they are computed with. chain: (a * b + c).tanh().sum() of
4,194,304 float32, the sum fetched. All write the same formulas; JAX compiles them (jit). Every contender runs
in a process of its own, one thread per worker ("1" or "2" at the end of its name: how many workers), and
takes turns with the others. All get the same results. Medians over rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import _runner
import numpy as np

EXAMPLES, FEATURES, RATE = 1_000_000, 50, 0.1
ELEMENTS = 1 << 22
STEPS = {"logistic": 3, "chain": 4}
CONTENDERS: dict[str, tuple[int, dict[str, str]]] = {
    "numpy": (1, {}), "torch": (1, {}), "jax1": _runner.JAX[1], "dask1": (1, {}), "mesh1": (1, {}),
    "jax2": _runner.JAX[2], "dask2": (1, {}), "mesh2": (1, {}),
}
PEERS = {"mesh1": ("numpy", "torch", "jax1", "dask1"), "mesh2": ("numpy", "torch", "jax2", "dask2")}


class Arrays(NamedTuple):
    """A library: how it takes arrays split over its workers and whole, its functions, jit, values."""

    split: Callable[[Any], Any]
    whole: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    value: Callable[[Any], Any]
    jit: Callable[[Any], Any] = lambda f: f
    step: Callable[[Any], Any] = lambda x: x       # what ends a step whose result the next one needs


def plain_sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def numpy_arrays() -> Arrays:
    return Arrays(np.asarray, np.asarray, plain_sigmoid, np.tanh, np.asarray)


def torch_arrays() -> Arrays:
    import torch
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    return Arrays(torch.from_numpy, torch.from_numpy, torch.sigmoid, torch.tanh, np.asarray)


def jax_arrays() -> Arrays:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    return Arrays(lambda a: jax.device_put(a, split), lambda a: jax.device_put(a, whole), jax.nn.sigmoid,
                  jax.numpy.tanh, np.asarray, jax.jit)


def dask_arrays(workers: int) -> Arrays:
    import dask
    import dask.array as da
    dask.config.set(scheduler="threads", num_workers=workers)
    # Two chunks for each worker, and no fewer than four: Dask's advice is several a worker.
    return Arrays(lambda a: da.from_array(a, chunks=(len(a) // 4, *a.shape[1:])), np.asarray,
                  plain_sigmoid, np.tanh, lambda x: np.asarray(dask.compute(x)[0]),
                  step=lambda x: dask.compute(x)[0])


def meshtape_arrays(workers: int) -> Arrays:
    import meshtape as mt
    from meshtape.nn import functional
    if workers > 1:
        mt.init(workers=workers, threads_per_worker=1)

    def flush(x: Any) -> Any:
        mt.flush()
        return x

    return Arrays(lambda a: mt.tensor(a, layout=mt.Shard(0)), mt.tensor, functional.sigmoid, mt.tanh,
                  np.asarray, step=flush)


def library(name: str) -> Arrays:
    if name == "numpy":
        return numpy_arrays()
    if name == "torch":
        return torch_arrays()
    if name.startswith("jax"):
        return jax_arrays()
    return (dask_arrays if name.startswith("dask") else meshtape_arrays)(int(name[-1]))


def logistic(lib: Arrays, size: int) -> _runner.Run:
    rng = np.random.default_rng(0)
    examples = rng.standard_normal((size, FEATURES), dtype=np.float32)
    truth = rng.standard_normal(FEATURES, dtype=np.float32)
    x, y = lib.split(examples), lib.split((examples @ truth > 0).astype(np.float32))
    w = lib.whole(np.zeros(FEATURES, np.float32))

    @lib.jit
    def descend(x: Any, y: Any, w: Any) -> Any:
        return w - (RATE / size) * ((lib.sigmoid(x @ w) - y) @ x)

    def run(n: int) -> Any:
        nonlocal w
        for _ in range(n):
            w = lib.step(descend(x, y, w))
        return lib.value(w)

    return run


def chain(lib: Arrays, size: int) -> _runner.Run:
    rng = np.random.default_rng(0)
    a, b, c = (lib.split(rng.standard_normal(size, dtype=np.float32)) for _ in range(3))

    @lib.jit
    def total(a: Any, b: Any, c: Any) -> Any:
        return lib.tanh(a * b + c).sum()

    def run(n: int) -> Any:
        for _ in range(n):
            found = lib.value(total(a, b, c))
        return found

    return run


CASES = {"logistic": (logistic, EXAMPLES), "chain": (chain, ELEMENTS)}


def build(role: _runner.Role) -> tuple[_runner.Run, Any]:
    """A contender, warm; its result is what it says about itself."""
    case, _, shrink = role.case.partition("/")
    program, size = CASES[case]
    run = program(library(role.name), size // int(shrink or 1))
    result = run(4).tolist()
    for _ in range(2):
        run(STEPS[case])
    return _runner.timed(run), result


def compare(case: str, names: list[str], rounds: int) -> _runner.Times:
    """Milliseconds by contender."""
    steps = STEPS[case.partition("/")[0]]
    with _runner.contenders(__file__, case, {name: CONTENDERS[name] for name in names}) as running:
        results = {name: c.about[0] for name, c in running.items()}
        for name, found in results.items():
            if not np.allclose(found, results[names[0]], rtol=1e-3, atol=1e-4):
                raise SystemExit(f"{case}: {name} computes {found}, {names[0]} {results[names[0]]}")
        return _runner.take_turns({name: (lambda c=c: 1e3 * c.seconds(steps)) for name, c in running.items()},
                                  rounds)


def main() -> None:
    parser = _runner.parser(__doc__, CASES, CONTENDERS, rounds=9)
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes by this")
    options = parser.parse_args()
    if options.serve:
        _runner.serve(build, options)
        return
    names = options.contenders.split(",")
    print(_runner.row("ms", names))
    figures = {}
    for case in options.cases.split(","):
        figures[case] = compare(f"{case}/{options.shrink}", names, options.rounds)
        print(_runner.row(case, list(_runner.medians(figures[case]).values())), flush=True)
    _runner.write_json(options.json, figures)


if __name__ == "__main__":
    main()
