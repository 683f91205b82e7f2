"""How a worker's process asks the system for memory."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters in glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LIMIT = 1 << 30


def keep_pages() -> None:
    """Let malloc keep the pages of freed arrays for the next ones (glibc only; elsewhere nothing happens).

    By default glibc maps each array of more than 128 KB (at most 32 MB, as it learns) anew and unmaps it
    when it is freed, so that a kernel's first touch of its result is a page fault for every 4 KB. A program
    that repeats the same batch wants the same pages again.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LIMIT)
        mallopt(M_TRIM_THRESHOLD, LIMIT)
