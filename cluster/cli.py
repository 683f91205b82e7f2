"""The command `meshtape` (or `python -m meshtape`)."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from meshtape.cluster import doctor, launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv by default); returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    # What follows "--" belongs to the script, whatever it looks like.
    at = given.index("--") if "--" in given else len(given)
    options, unknown = parser().parse_known_args(given[:at])
    rest = unknown + given[at + 1:]
    if options.command == "doctor":
        if rest:
            parser().error(f"unrecognized arguments: {' '.join(rest)}")
        return doctor.report(options.workers)
    return run(options, rest)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="meshtape", description="Tensors on a cluster, one Python program.")
    commands = top.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="what this machine offers, what is wrong, how to fix it")
    check.add_argument("--workers", type=int, default=0, metavar="N", help="also start N Ray workers")
    script = commands.add_parser("run", allow_abbrev=False, help="run a script on a mesh",
                                 usage="meshtape run SCRIPT [--workers N] [--address A] [--backend B] "
                                       "[--mesh data=4,model=2] [--] ARGS...",
                                 description="The options say what init() without arguments means in the "
                                             "script, which gets all other arguments.")
    script.add_argument("script")
    script.add_argument("--workers", type=int, metavar="N")
    script.add_argument("--address", metavar="A", help='"auto", host:port or ray://host:port')
    script.add_argument("--backend", choices=[b for b in launch.BACKENDS if b])
    script.add_argument("--mesh", metavar="AXES", help="for example data=4,model=2")
    return top


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run the script in this process, as `python script.py arguments...` would."""
    path = Path(options.script)
    if not path.is_file():
        print(f"meshtape run: there is no file {options.script!r}", file=sys.stderr)
        return 2
    names = {launch.WORKERS: options.workers, launch.ADDRESS: options.address,
             launch.BACKEND: options.backend, launch.MESH: options.mesh}
    os.environ.update({name: str(value) for name, value in names.items() if value is not None})
    sys.argv = [options.script, *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    runpy.run_path(str(path), run_name="__main__")
    return 0
