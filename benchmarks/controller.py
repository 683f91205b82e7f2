"""What the driver itself costs per training step: by number of workers, and beside torch's host time.

    python benchmarks/controller.py [--rounds 9] [--workers 1,2,4,8,16,32,64] [--models mlp64,lstm]

First, workers as threads of the driver's process training mlp64 (backend="local"): messages per step and
worker, and CPU time of the driver's thread per step and worker.

Then the models in tiny, with operands so small that arithmetic costs next to nothing: what a step takes in
torch eager (all of it: that is torch's host time); what meshtape's driver takes for the same step once
workers know its digest (recording, tape, optimizer, flush), with one worker inside the process whose own time
is taken off; "whole", the same with the worker's time; and "driver2", the CPU time of the driver's process
with two Ray workers, where messages come on top.
"""

from __future__ import annotations

import time
from typing import Any

import _runner
from _models import MODELS, TINY
from _training import meshtape_run, torch_run

WORKERS = ("1", "2", "4", "8", "16", "32", "64")
FIGURES = {"torch": ("torch",), "mesh1": ("driver", "whole"), "mesh2": ("driver2",)}
MANY = "mlp64"          # what is trained on many workers
STEPS = 20
SHAPES = [name for name in TINY if name != "mlp784"]      # in tiny, mlp784 is mlp64


def cpu_time(run: _runner.Run, clock: Any) -> _runner.Run:
    """The same, returning seconds of a CPU clock per step."""
    def measure(n: int) -> float:
        start = clock()
        run(n)
        return float((clock() - start) / n)

    return measure


def driver_time(run: _runner.Run, mesh: Any) -> _runner.Run:
    """The same, returning (seconds without the worker's, all seconds) per step; `mesh` is inline."""
    send, inside = mesh.send, 0.0

    def timed_send(runs: Any) -> None:
        nonlocal inside
        start = time.perf_counter()
        send(runs)
        inside += time.perf_counter() - start

    mesh.send = timed_send

    def measure(n: int) -> tuple[float, float]:
        nonlocal inside
        inside, start = 0.0, time.perf_counter()
        run(n)
        seconds = time.perf_counter() - start
        return (seconds - inside) / n, seconds / n

    return measure


def build(role: _runner.Role) -> tuple[_runner.Run, Any]:
    if role.name == "torch":
        run = torch_run(TINY[role.case])
        run(STEPS)
        return _runner.timed(run), None
    import meshtape as mt
    from meshtape.scheduler import current

    if role.name.startswith("mesh"):
        if role.name != "mesh1":
            mt.init(workers=int(role.name.removeprefix("mesh")), threads_per_worker=1)
        run = meshtape_run(TINY[role.case])
        run(STEPS)
        inline = role.name == "mesh1"
        return driver_time(run, current.session().mesh) if inline else cpu_time(run, time.process_time), None
    mt.init(workers=int(role.name), backend="local")
    run = meshtape_run(MODELS[MANY])
    run(STEPS)
    before = mt.stats()["messages"]
    run(STEPS)
    messages = (mt.stats()["messages"] - before) / STEPS / int(role.name)
    return cpu_time(run, time.thread_time), messages


def many_workers(counts: list[str], rounds: int) -> dict[str, Any]:
    """Messages per step and worker, and driver microseconds per step, by number of workers."""
    with _runner.contenders(__file__, MANY, {count: (1, {}) for count in counts}) as running:
        turns = {count: (lambda c=c: 1e6 * c.seconds(STEPS)) for count, c in running.items()}
        times = _runner.take_turns(turns, rounds)
        return {"messages": {count: c.about[0] for count, c in running.items()}, "us": times}


def tiny_steps(model: str, names: list[str], rounds: int) -> _runner.Times:
    """Microseconds per tiny step: torch, driver, whole, driver2."""
    steps = TINY[model].steps
    with _runner.contenders(__file__, model, {name: (1, {}) for name in names}) as running:
        times: _runner.Times = {figure: [] for name in names for figure in FIGURES[name]}
        for _ in range(rounds):
            for name, contender in running.items():
                answer, = contender.ask(steps)
                seconds = answer if isinstance(answer, list) else [answer]
                for figure, t in zip(FIGURES[name], seconds, strict=True):
                    times[figure].append(1e6 * t)
        return times


def main() -> None:
    parser = _runner.parser(__doc__, SHAPES, FIGURES, rounds=9, case="models")
    parser.add_argument("--workers", default=",".join(WORKERS))
    options = parser.parse_args()
    if options.serve:
        _runner.serve(build, options)
        return
    figures: dict[str, Any] = {"many": many_workers(options.workers.split(","), options.rounds), "tiny": {}}
    print(_runner.row("workers", ["messages", "us", "us/worker"]) + "   per step")
    for count, us in _runner.medians(figures["many"]["us"]).items():
        print(_runner.row(count, [figures["many"]["messages"][count], us, us / int(count)]))
    names = options.contenders.split(",")
    print(_runner.row("tiny, us", [figure for name in names for figure in FIGURES[name]]))
    for model in options.models.split(","):
        figures["tiny"][model] = tiny_steps(model, names, options.rounds)
        print(_runner.row(model, list(_runner.medians(figures["tiny"][model]).values())), flush=True)
    _runner.write_json(options.json, figures)


if __name__ == "__main__":
    main()
