"""Imports go downward: meshtape (the front) -> autograd -> scheduler -> cluster -> runtime."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("runtime", "cluster", "scheduler", "autograd", "meshtape")     # from the bottom up
# What each room may import besides the standard library and the rooms at and below it.
OTHERS = {
    "runtime": {"numpy", "cupy", "cupyx", "cupy_backends", "cuda", "cudnn", "nvmath", "pynvml", "ml_dtypes"},
    "cluster": {"numpy", "msgpack", "ray"},
    "scheduler": {"numpy", "msgpack"},
    "autograd": {"numpy"},
    "meshtape": {"numpy", "safetensors", "matplotlib"},
}
FILES = [(room, path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str:
    """The room of a full name that starts with meshtape."""
    second = name.split(".")[1] if "." in name else ""
    return second if second in ROOMS else "meshtape"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downward(room):
    allowed = ROOMS[:ROOMS.index(room) + 1]
    upward = [f"{path.relative_to(ROOT)}:{line} imports {name}"
              for where, path in FILES if where == room for line, name in imported(path)
              if name.split(".")[0] == "meshtape" and room_of(name) not in allowed]
    assert not upward


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_uses_its_own_libraries_only(room):
    others = [f"{path.relative_to(ROOT)}:{line} imports {name}"
              for where, path in FILES if where == room for line, name in imported(path)
              if (top := name.split(".")[0]) != "meshtape" and top not in sys.stdlib_module_names
              and top not in OTHERS[room]]
    assert not others


def test_every_name_is_imported_by_its_full_path():
    short = [f"{path.relative_to(ROOT)}:{line} imports {name}"
             for _, path in FILES for line, name in imported(path) if name.split(".")[0] in ROOMS[:-1]]
    assert not short


def test_importing_meshtape_leaves_heavy_libraries_alone():
    heavy = ["ray", "cupy", "cudnn", "nvmath", "torch", "sklearn", "scipy", "matplotlib", "safetensors"]
    code = f"import sys, meshtape; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_one_worker_in_the_process_needs_no_ray():
    code = ("import sys, meshtape as mt; x = mt.tensor([1.0, 2.0], requires_grad=True); "
            "(x * x).sum().backward(); print(x.grad.tolist(), 'ray' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[2.0, 4.0] False"
