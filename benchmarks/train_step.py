"""Milliseconds per training step of six models: meshtape on 1 and 2 workers beside torch eager and torch DDP.

    python benchmarks/train_step.py [--rounds 11] [--models mlp64,lstm] [--contenders torch,ddp,mesh1,mesh2]

Every contender runs in a process of its own with one thread per worker, and takes turns with the others: a
round is a few steps of each. A step is forward, cross-entropy, backward and AdamW on a batch that starts as
NumPy arrays. DDP is gloo with 2 processes on the same global batch. All start from the same weights, and
their losses are compared before anything is timed. Figures are medians over rounds; a ratio a/b above 1 says
that b is faster.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from typing import Any

import _runner
import machine
import numpy as np
from _models import MODELS, TINY, Model
from _training import jax_run, meshtape_run, torch_run

# name -> (processes, environment)
CONTENDERS: dict[str, tuple[int, dict[str, str]]] = {
    "torch": (1, {}), "fused": (1, {}), "compile": (1, {}), "ddp": (2, {}), "jax1": _runner.JAX[1],
    "jax2": _runner.JAX[2], "mesh1": (1, {}), "mesh2": (1, {}),
}
TWOFOLD = {"ddp", "jax2", "mesh2"}      # contenders with two workers
USUAL = ("torch", "ddp", "mesh1", "mesh2")
RATIOS = (("torch", "mesh1"), ("ddp", "mesh2"), ("mesh1", "mesh2"))


def peak_growth(mt: Any = None) -> Callable[[], int]:
    """A function that says by how many bytes the peak memory of a worker has grown since now: this process's,
    or that of the worker of meshtape's which grew most.
    """
    if mt is None or mt.current_mesh().backend == "inline":
        before = _runner.resident()
        return lambda: _runner.resident("VmHWM") - before
    mt.tensor(np.zeros(2), layout=mt.Shard(0)).numpy()
    first = mt.stats()["peak_memory"]
    return lambda: max(b - a for a, b in zip(first, mt.stats()["peak_memory"], strict=True))


def starter(role: _runner.Role) -> tuple[Callable[[Model], _runner.Run], Any]:
    """What makes a contender's run from a model, after everything has been imported; and meshtape, if it is
    the contender.
    """
    if role.name.startswith("mesh"):
        import meshtape as mt
        if role.name != "mesh1":
            mt.init(workers=int(role.name.removeprefix("mesh")), threads_per_worker=1)
        return meshtape_run, mt
    if role.name.startswith("jax"):
        from _jax_models import FORWARD
        return lambda model: jax_run(model, FORWARD[role.case.partition("/")[0]]), None
    if role.name == "ddp":
        import torch.distributed as dist
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{role.port}", rank=role.rank,
                                world_size=2)
        return lambda model: torch_run(model, role.rank, 2), None
    return lambda model: torch_run(model, way=role.name), None


def build(role: _runner.Role) -> tuple[_runner.Run, dict[str, Any]]:
    """A contender, warm: its losses of the first steps and its memory are what it says about itself.

    The memory counts from after some steps of the same model in tiny, which load what loads late.
    """
    start, mt = starter(role)
    case, _, size = role.case.partition("/")
    if role.name != "compile":
        start(TINY[case])(3)
    peak = peak_growth(mt)
    run = start((TINY if size == "tiny" else MODELS)[case])
    losses = [run(1) for _ in range(3)]
    for _ in range(3):
        run(4)
    return _runner.timed(run), {"losses": losses, "peak": peak()}


# --- comparing --------------------------------------------------------------------------------------------

def check_losses(model: str, contenders: dict[str, _runner.Contender]) -> None:
    """Equal work: the same losses in the first steps. A rank of DDP knows the loss of its part only."""
    losses = {name: np.mean([a["losses"] for a in c.about], axis=0) for name, c in contenders.items()}
    first, expected = next(iter(losses.items()))
    for name, found in losses.items():
        if not np.allclose(found, expected, rtol=1e-3):
            raise SystemExit(f"{model}: losses of {name} are {found}, those of {first} {expected}")


def compare(model: str, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds by contender, "NAME 2B" for a batch twice as large; bytes of memory; and the machine's
    GFLOP/s with one and with two processes at work, measured between the turns.
    """
    steps = MODELS[model].steps
    case = f"{model}/tiny" if options.tiny else model
    probe = {"gemm1": (1, {}), "gemm2": (2, {})} if options.probe else {}
    with (_runner.contenders(__file__, case, {name: CONTENDERS[name] for name in names}) as running,
          _runner.contenders(machine.__file__, "gemm", probe) as gemm):
        check_losses(model, running)
        turns = {name: (lambda c=c: 1e3 * c.seconds(steps)) for name, c in running.items()}
        turns |= {name: (lambda c=c: machine.gflops(c, 2)) for name, c in gemm.items()}
        for name in (n for n in names if options.weak and n in TWOFOLD):
            c, half = running[name], (steps + 1) // 2
            c.seconds(4, 2)
            turns[f"{name} 2B"] = lambda c=c, half=half: 1e3 * c.seconds(half, 2)
        times = _runner.take_turns(turns, options.rounds)
        return {"ms": {name: t for name, t in times.items() if name not in gemm},
                "gflops": {name: times[name] for name in gemm},
                "peak": {name: max(a["peak"] for a in c.about) for name, c in running.items()}}


def main() -> None:
    parser = _runner.parser(__doc__, MODELS, USUAL, rounds=11, case="models")
    parser.add_argument("--weak", action="store_true", help="also a batch twice as large, on two workers")
    parser.add_argument("--probe", action="store_true", help="also what benchmarks/machine.py measures")
    parser.add_argument("--tiny", action="store_true", help="with tiny models: does everything work?")
    options = parser.parse_args()
    if options.serve:
        _runner.serve(build, options)
        return
    names = options.contenders.split(",")
    if "compile" in names and not any(map(shutil.which, ("g++", "clang++"))):
        print("no C++ compiler here, which torch.compile needs: left out")
        names.remove("compile")
    ratios = [(a, b) for a, b in RATIOS if {a, b} <= set(names)]
    print(f"OPENBLAS_CORETYPE: {os.environ.get('OPENBLAS_CORETYPE', 'not set')}")
    print(_runner.row("ms per step", [*names, *(f"{a}/{b}" for a, b in ratios)]))
    figures = {}
    for model in options.models.split(","):
        figures[model] = compare(model, names, options)
        found = _runner.medians(figures[model]["ms"])
        print(_runner.row(model, [*(found[name] for name in names),
                                  *(f"{found[a] / found[b]:.2f}" for a, b in ratios)]), flush=True)
    _runner.write_json(options.json, figures)


if __name__ == "__main__":
    main()
