"""What the benchmark programs share: contenders in processes of their own, which take turns.

A program starts itself again for every contender, with `--serve NAME --case CASE`, and talks to it in lines
of JSON. What a contender prints goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

# One thread per worker and per torch process. Set before NumPy is imported anywhere.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = "1"

Run = Callable[..., Any]
Times = dict[str, list[float]]


# --- in the contender's process ---------------------------------------------------------------------------

def private_output() -> TextIO:
    """Standard output for us alone: what anybody else prints goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def serve(build: Callable[[], tuple[Run, dict[str, Any]]]) -> None:
    """Answer with what the contender says about itself, then for every line [n, *args] run(n, *args) and
    answer with seconds per step.
    """
    channel = private_output()
    run, about = build()
    print(json.dumps(about), file=channel, flush=True)
    for line in sys.stdin:
        n, *args = json.loads(line)
        start = time.perf_counter()
        run(n, *args)
        print(json.dumps((time.perf_counter() - start) / n), file=channel, flush=True)


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
        self.about = self.answers()

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

    def seconds(self, n: int, *args: Any) -> float:
        """Seconds per step, of the slowest rank."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([n, *args]) + "\n")
            process.stdin.flush()
        return float(max(self.answers()))

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait(60)


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


def write_json(path: Path | None, figures: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")


def row(label: str, cells: Sequence[Any], width: int = 12) -> str:
    """One line of a printed table."""
    shown = (cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells)
    return f"{label:12}" + "".join(cell.rjust(width) for cell in shown)
