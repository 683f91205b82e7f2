"""How many threads the BLAS under NumPy uses, and which processor's kernels. NumPy has no call for it, so the
loaded library is asked.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache

# What OpenBLAS (as in NumPy's wheels, and built plainly) and MKL call it.
NAMES = (("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
         ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
         ("openblas_get_num_threads", "openblas_set_num_threads"),
         ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"))
CORE_NAMES = ("scipy_openblas_get_corename64_", "openblas_get_corename64_", "openblas_get_corename")


def _libraries() -> Iterator[ctypes.CDLL]:
    """The loaded libraries that look like a BLAS."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
    for path in sorted(paths):
        if any(word in os.path.basename(path) for word in ("blas", "mkl_rt")):
            yield ctypes.CDLL(path)


@cache
def _calls() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """The loaded library's functions that get and set its number of threads; None if it has none we know."""
    for library in _libraries():
        for get, set_ in NAMES:
            if hasattr(library, get) and hasattr(library, set_):
                return getattr(library, get), getattr(library, set_)
    return None


@cache
def blas_core() -> str:
    """The processor whose kernels OpenBLAS chose, such as "Haswell" or "SkylakeX"; "" for any other BLAS."""
    if not sys.platform.startswith("linux"):
        return ""
    for library in _libraries():
        for name in CORE_NAMES:
            if hasattr(library, name):
                ask = getattr(library, name)
                ask.restype = ctypes.c_char_p
                return bytes(ask()).decode()
    return ""


def blas_threads() -> int | None:
    """The number of threads in use; None if the BLAS is one that cannot be asked."""
    calls = _calls()
    return None if calls is None else int(calls[0]())


def set_blas_threads(count: int) -> None:
    """Let every call of this process's BLAS use `count` threads; no effect on one that cannot be told."""
    calls = _calls()
    if calls is not None:
        calls[1](count)
