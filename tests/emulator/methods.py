"""Methods of the device array that are functions of the module as well, called as CuPy's methods are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import cupy as real
import numpy as np

from emulator import streams
from emulator.array import ndarray, run_into

FUNCTIONS = ("all", "any", "argmax", "argmin", "argpartition", "argsort", "choose", "clip", "compress",
             "conj", "conjugate", "cumprod", "cumsum", "dot", "max", "mean", "min", "nonzero", "prod", "ptp",
             "repeat", "round", "searchsorted", "std", "sum", "take", "trace", "var", "put")
# Those whose first argument has another name, or is positional only, in the function.
FIRST = ("take", "repeat", "dot", "searchsorted", "choose", "put", "compress", "argpartition", "conj")
CALLED = {"max": "amax", "min": "amin"}


def signature_of(method: str) -> inspect.Signature:
    """The signature of a method of cupy.ndarray, which its docstring begins with."""
    line = (getattr(real.ndarray, method).__doc__ or "").split("\n")[0]
    found = re.match(r"[\w.]+\((.*)\)", line)
    if found is None:
        raise LookupError(f"cupy.ndarray.{method} has no signature in its docstring: {line!r}")
    params = re.sub(r"\b(int|_ndarray_base|ndarray|bint|str) (\w+)", r"\2", found[1]) or "*args, **kwargs"
    return inspect.signature(eval(f"lambda {params}: None"))


def method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    signature = signature_of(name)

    def called(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        rest = {k: v for k, v in bound.items() if k != "self"}
        if name == "clip":
            return function(self, rest.get("min"), rest.get("max"), out=rest.get("out"))
        if name in FIRST:
            first = [rest.pop(k) for k in list(rest)[:1]]
            return function(self, *first, **rest)
        return function(self, **rest)

    return called


def sort(self: ndarray, axis: int = -1, kind: Any = None) -> None:
    if kind not in (None, "stable"):
        raise ValueError("cupy only supports kind=None or 'stable'")
    if not self.ndim:
        raise np.exceptions.AxisError("Sorting arrays with the rank of zero is not supported")
    run_into(lambda a: a.sort(axis, kind="stable"), [self], self)


def partition(self: ndarray, kth: Any, axis: int = -1) -> None:
    run_into(lambda a: a.sort(axis, kind="stable"), [self], self)


def install(module: dict[str, Any]) -> None:
    """Give the array its methods, from the functions of a module."""
    for name in FUNCTIONS:
        setattr(ndarray, name, method(name, module[CALLED.get(name, name)]))
    ndarray.sort, ndarray.partition = sort, partition  # type: ignore[attr-defined]
    for what, at in (("add", "add"), ("max", "maximum"), ("min", "minimum")):
        def scatter(self: ndarray, slices: Any, value: Any, function: Any = module[at]) -> None:
            function.at(self, slices, value)
        setattr(ndarray, f"scatter_{what}", scatter)
    matmul = module["matmul"]
    ndarray.__matmul__ = lambda self, other: matmul(self, other)  # type: ignore[attr-defined]
    ndarray.__rmatmul__ = lambda self, other: matmul(other, self)  # type: ignore[attr-defined]


__all__ = ["install", "method", "signature_of", "streams"]
