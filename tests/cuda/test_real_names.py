"""What is asked of CuPy by name is there in the installed CuPy, with keywords that it takes.

The emulation has what tests use; this looks at all sources under runtime/, run by a test or not.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import meshtape.runtime.op

cupy = pytest.importorskip("cupy", reason="names are looked up in the installed CuPy")
if not pytest.importorskip("cupy.cuda.nccl").available:
    pytest.skip("NCCL is not installed, which the installed CuPy's binding needs", allow_module_level=True)

RUNTIME = Path(meshtape.runtime.op.__file__).parent
# What names in sources stand for, wherever they are: in a variable, or the attribute of something.
ROOTS = {"cp": "cupy", "_cp": "cupy", "cupy": "cupy", "_cupy": "cupy", "xp": "cupy", "cuda": "cupy.cuda",
         "_cuda": "cupy.cuda", "nccl": "cupy.cuda.nccl", "_nccl": "cupy.cuda.nccl",
         "comm": "cupy.cuda.nccl.NcclCommunicator"}
# What runtime.cuda.arrays.ArrayModule adds to CuPy, or has in place of a name of NumPy's.
ADDED = {"tables", "erf"}
# Sources in which a name of ROOTS stands for something else.
ELSEWHERE = {"comm": lambda path: path.name != "nccl.py", "nccl": lambda path: path.name == "choice.py",
             "cuda": lambda path: path.name in ("cublas.py", "nvml.py", "survey.py")}


class Use(NamedTuple):
    """A name in the sources, and the keywords of its calls."""

    root: str
    path: tuple[str, ...]
    keywords: tuple[str, ...]
    where: str


def chain(node: ast.expr) -> list[str]:
    """["dev", "cp", "cuda", "Event"] of dev.cp.cuda.Event; [] of what is no chain of names."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def uses() -> Iterator[Use]:
    for path in sorted(RUNTIME.rglob("*.py")):
        tree = ast.parse(path.read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or id(node) in inner:
                continue
            names = chain(node)
            at = next((k for k, name in enumerate(names) if name in ROOTS), len(names))
            if at + 1 >= len(names) or ELSEWHERE.get(names[at], lambda path: False)(path):
                continue
            call = calls.get(id(node))
            keywords = () if call is None else tuple(k.arg for k in call.keywords if k.arg is not None)
            yield Use(ROOTS[names[at]], tuple(names[at + 1:]), keywords,
                      f"{path.relative_to(RUNTIME)}:{node.lineno}")


def found(use: Use) -> Any:
    """What a use names; raises AttributeError."""
    made: Any = cupy
    for name in (*use.root.split(".")[1:], *use.path):
        if not (isinstance(made, property) or inspect.isgetsetdescriptor(made)):
            made = getattr(made, name)
    return made


FOUND = list(uses())


def test_there_is_something_to_look_up() -> None:
    assert len(FOUND) > 300
    assert {use.root for use in FOUND} == set(ROOTS.values())


@pytest.mark.parametrize("name", sorted({".".join((use.root, *use.path)) for use in FOUND
                                         if use.path[0] not in ADDED}))
def test_a_name_is_there(name: str) -> None:
    root = max((r for r in ROOTS.values() if name.startswith(r + ".")), key=len)
    for use in FOUND:
        if ".".join((use.root, *use.path)) == name:
            try:
                found(use)
            except AttributeError as error:
                pytest.fail(f"{use.where}: {root} has no {name}: {error}")


def parameters(function: Any) -> set[str] | None:
    """The keywords that a function takes; None if it does not tell, or takes any."""
    if isinstance(function, (np.ufunc, cupy.ufunc)):
        return {"out", "dtype", "casting", "where"}
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return None
    return set(signature.parameters)


def test_keywords_are_taken() -> None:
    wrong = []
    for use in FOUND:
        if use.keywords and use.path[0] not in ADDED:
            taken = parameters(found(use))
            if taken is not None and not set(use.keywords) <= taken:
                wrong.append(f"{use.where}: {'.'.join(use.path)} takes {sorted(taken)}, given {use.keywords}")
    assert not wrong, "\n".join(wrong)
