"""What is installed, and what a user finds there."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import tomllib
from pathlib import Path

import pytest

import meshtape as mt

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PUBLIC = ["meshtape.nn", "meshtape.nn.functional", "meshtape.nn.init", "meshtape.nn.utils", "meshtape.optim",
          "meshtape.optim.lr_scheduler", "meshtape.data", "meshtape.random"]
# Names of the README and of the design that every release keeps.
KEPT = (
    "tensor", "asarray", "zeros", "ones", "full", "arange", "linspace", "eye", "where", "concat", "stack",
    "reshape", "permute_dims", "matmul", "einsum", "sum", "mean", "max", "min", "argmax", "exp", "log",
    "tanh", "sqrt", "grad", "no_grad", "checkpoint", "init", "shutdown", "current_mesh", "flush",
    "synchronize", "manual_seed", "Shard", "Replicate", "Partial", "Layout", "Tensor", "explain",
    "visualize", "save", "load", "nn", "optim", "data", "random", "float32", "float64", "int64", "bool_",
    "bfloat16",
)


def test_nothing_is_installed_outside_meshtape():
    for package in SETTINGS["packages"]:
        assert package == "meshtape" or package.startswith("meshtape.")
    top = importlib.metadata.distribution("meshtape").read_text("top_level.txt")
    assert top is not None and top.split() == ["meshtape"]


def test_every_package_of_the_repository_is_installed():
    found = {path.parent for room in ("meshtape", "autograd", "scheduler", "cluster", "runtime")
             for path in (ROOT / room).rglob("__init__.py")}
    installed = set()
    for package in SETTINGS["packages"]:
        near = max((p for p in SETTINGS["package-dir"] if f"{package}.".startswith(f"{p}.")), key=len)
        below = package.removeprefix(near).strip(".").split(".")
        installed.add(ROOT.joinpath(SETTINGS["package-dir"][near], *below))
    assert installed == found


def test_the_front_has_the_names_that_the_guides_use():
    assert not [name for name in KEPT if getattr(mt, name, None) is None]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_exist_and_are_documented(module):
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None) or [n for n in vars(found) if not n.startswith("_")]
    assert found.__doc__
    values = {name: getattr(found, name) for name in names}
    assert not [name for name, value in values.items() if needs_words(value) and not inspect.getdoc(value)]


def test_the_front_is_documented():
    assert mt.__doc__
    assert not [name for name, value in vars(mt).items() if not name.startswith("_") and needs_words(value)
                and not inspect.getdoc(value)]


def needs_words(value: object) -> bool:
    """Whether this is a function or class of meshtape's own."""
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    return is_code and str(getattr(value, "__module__", "")).startswith("meshtape")
