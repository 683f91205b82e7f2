"""What the benchmark programs share: contenders in processes of their own, which take turns.

A program starts itself again for every contender, with `--serve NAME --case CASE`, and talks to it in lines
of JSON. What a contender prints goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

# One thread per worker and per torch process. Set before NumPy is imported anywhere.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = "1"

Run = Callable[..., Any]            # run(n, *args) does n steps and waits for them
Times = dict[str, list[float]]


# Processes and environment of a JAX contender on so many CPU devices. NPROC: threads that XLA computes with.
JAX = {n: (1, {"JAX_PLATFORMS": "cpu", "NPROC": str(n),
               "XLA_FLAGS": f"--xla_force_host_platform_device_count={n}"}) for n in (1, 2)}


class Role(NamedTuple):
    """What a contender's process is to be. `meet` hands something to the other ranks and returns what all
    handed over, by rank.
    """

    name: str
    case: str
    rank: int
    port: int
    meet: Callable[[Any], list[Any]]


# --- in the contender's process ---------------------------------------------------------------------------

def private_output() -> TextIO:
    """Standard output for us alone: what anybody else prints goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def serve(build: Callable[[Role], tuple[Run, Any]], options: argparse.Namespace) -> None:
    """Be the contender that `options` name. `build` returns a function and what the contender says about
    itself; then for every line [n, *args], function(n, *args) is the answer.
    """
    channel = private_output()

    def say(message: Any) -> None:
        print(json.dumps(message), file=channel, flush=True)

    def meet(mine: Any) -> list[Any]:
        say({"meet": mine})
        found: list[Any] = json.loads(sys.stdin.readline())
        return found

    answer, about = build(Role(options.serve, options.case, options.rank, options.port, meet))
    say({"about": about})
    for line in sys.stdin:
        say(answer(*json.loads(line)))


def timed(run: Run) -> Run:
    """The same, returning seconds per step."""
    def measure(n: int, *args: Any) -> float:
        start = time.perf_counter()
        run(n, *args)
        return (time.perf_counter() - start) / n

    return measure


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


# --- in the program that compares -------------------------------------------------------------------------

def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Contender:
    """The process of a contender, or one for each of its ranks; `about` is what each said of itself."""

    def __init__(self, script: str, name: str, case: str, ranks: int = 1,
                 environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, script, "--serve", name, "--case", case, "--port", str(free_port())]
        self.name = name
        self.processes = [subprocess.Popen([*command, "--rank", str(rank)], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, text=True,
                                           env={**os.environ, **(environment or {})})
                          for rank in range(ranks)]
        first = self.answers()
        while "meet" in first[0]:
            self.tell([answer["meet"] for answer in first])
            first = self.answers()
        self.about = [answer["about"] for answer in first]

    def tell(self, message: Any) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

    def answers(self) -> list[Any]:
        found = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                self.close()
                raise SystemExit(f"{self.name} ended with status {process.wait()}")
            found.append(json.loads(line))
        return found

    def ask(self, n: int, *args: Any) -> list[Any]:
        """Every rank's answer to n steps."""
        self.tell([n, *args])
        return self.answers()

    def seconds(self, n: int, *args: Any) -> float:
        """The answer of the slowest rank."""
        return float(max(self.ask(n, *args)))

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait(60)


@contextmanager
def contenders(script: str, case: str,
               wanted: Mapping[str, tuple[int, Mapping[str, str]]]) -> Iterator[dict[str, Contender]]:
    """Contenders of a case by name, all started; `wanted` gives each one's ranks and environment."""
    running: dict[str, Contender] = {}
    try:
        for name, (ranks, environment) in wanted.items():
            running[name] = Contender(script, name, case, ranks, environment)
        yield running
    finally:
        for contender in running.values():
            contender.close()


def take_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """`rounds` results of every turn, all turns once before any comes again."""
    times: Times = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            times[name].append(turn())
    return times


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(t) for name, t in times.items()}


# --- command line and results -----------------------------------------------------------------------------

def parser(doc: str | None, cases: Iterable[str], contenders: Iterable[str], rounds: int,
           case: str = "cases") -> argparse.ArgumentParser:
    """Options of a program that compares `contenders` on `cases` (shown as --`case`)."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument(f"--{case}", default=",".join(cases))
    made.add_argument("--contenders", default=",".join(contenders))
    made.add_argument("--json", type=Path, help="also write the figures here")
    made.add_argument("--serve", help=argparse.SUPPRESS)
    made.add_argument("--case", help=argparse.SUPPRESS)
    made.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    made.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return made


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("meshtape", "numpy", "ray", "torch", "jax", "dask"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on beside the program."""
    info = Path("/proc/cpuinfo").read_text()
    return {"cpu": re.findall(r"model name\s*: (.*)", info)[:1], "cores": os.cpu_count(),
            "avx512": "avx512f" in info, "linux": platform.release(), "load": os.getloadavg()[0],
            "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE"), "date": date.today().isoformat(),
            "versions": versions()}


def write_json(path: Path | None, figures: Any) -> None:
    """Write the figures with machine and versions, if there is a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")


def row(label: str, cells: Sequence[Any], width: int = 12) -> str:
    """One line of a printed table."""
    shown = (cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells)
    return f"{label:12}" + "".join(cell.rjust(width) for cell in shown)
