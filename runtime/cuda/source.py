"""CUDA C++ as text, compiled by NVRTC for the device it runs on, once for each set of macros.

CuPy keeps compiled code on disk (CUPY_CACHE_DIR, ~/.cupy/kernel_cache), where all workers of a host find it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

PRELUDE = ""
OPTIONS = ("-std=c++17",)


class Source(NamedTuple):
    """Text with `extern "C" __global__` functions; `variants` are sets of macros that tests compile it with."""

    name: str
    code: str
    functions: tuple[str, ...]
    variants: tuple[Mapping[str, str], ...] = ({},)


SOURCES: dict[str, Source] = {}


def source(name: str, code: str, functions: tuple[str, ...],
           variants: tuple[Mapping[str, str], ...] = ({},)) -> Source:
    """Declare a source, so that tests find it."""
    SOURCES[name] = made = Source(name, code, functions, variants)
    return made


class Kernels:
    """Compiled functions by source, name and macros."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._modules: dict[Any, Any] = {}
        self._made: dict[Any, Any] = {}

    def __call__(self, given: Source, function: str, **macros: Any) -> Any:
        """The function, to be called as f(grid, block, args, shared_mem=0).

        Arguments are arrays of the device (passed as pointers) and NumPy scalars (passed by value, of
        exactly their type).
        """
        key = given.name, function, tuple(macros.items())
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._module(given, key[2]).get_function(function)
        return found

    def _module(self, given: Source, macros: Any) -> Any:
        key = given.name, macros
        if key not in self._modules:
            self._modules[key] = self._cupy.RawModule(
                code=PRELUDE + given.code,
                options=(*OPTIONS, *(f"-D{name}={value}" for name, value in macros)))
        return self._modules[key]
