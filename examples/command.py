"""What the examples' command lines share: options for a mesh, and errors told in one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from types import TracebackType
from typing import NoReturn

BACKENDS = ("ray", "local", "inline")


class Parser(argparse.ArgumentParser):
    """Options of an example; a wrong one ends the program with one sentence."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")

    def add_mesh(self, backend: str) -> None:
        """--workers, --backend and --address; `meshtape run` sets their defaults."""
        told = {name: os.environ.get(f"MESHTAPE_{name}") for name in ("WORKERS", "BACKEND", "ADDRESS")}
        self.add_argument("--workers", type=at_least_one, default=told["WORKERS"] or 2, metavar="N",
                          help="number of workers")
        self.add_argument("--backend", choices=BACKENDS, default=told["BACKEND"] or backend,
                          help="Ray actors, threads of this process, or one worker inside it")
        self.add_argument("--address", default=told["ADDRESS"], metavar="A",
                          help='a Ray cluster to join: "auto" or host:port')


def start(options: argparse.Namespace) -> None:
    """Start the mesh asked for; without init() there is one worker inside. Raises MeshError."""
    import meshtape as mt

    if options.backend != "inline":
        mt.init(workers=options.workers, backend=options.backend, address=options.address)


def at_least_one(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C and a mesh that cannot be had are no accidents of the program: say so, without a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nStopped by Ctrl-C; the workers are gone.", file=sys.stderr)
    elif kind.__name__ == "MeshError":
        print(error, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = tell
