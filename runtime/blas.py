"""How many threads the BLAS under NumPy uses. NumPy has no call for it, so the loaded library is asked."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

# What OpenBLAS (as in NumPy's wheels, and built plainly) and MKL call it.
NAMES = (("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
         ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
         ("openblas_get_num_threads", "openblas_set_num_threads"),
         ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"))


@cache
def _calls() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """The loaded library's functions that get and set its number of threads; None if it has none we know."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
    for path in sorted(paths):
        if any(word in os.path.basename(path) for word in ("blas", "mkl_rt")):
            library = ctypes.CDLL(path)
            for get, set_ in NAMES:
                if hasattr(library, get) and hasattr(library, set_):
                    return getattr(library, get), getattr(library, set_)
    return None


def blas_threads() -> int | None:
    """The number of threads in use; None if the BLAS is one that cannot be asked."""
    calls = _calls()
    return None if calls is None else int(calls[0]())


def set_blas_threads(count: int) -> None:
    """Let every call of this process's BLAS use `count` threads; no effect on one that cannot be told."""
    calls = _calls()
    if calls is not None:
        calls[1](count)
