"""One CUDA device as one worker uses it: what its kernels are handed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from meshtape.runtime.cuda.libraries import Libraries
from meshtape.runtime.cuda.source import Kernels


class Device:
    """All work of one worker on one device, on one non-blocking stream, with memory from one pool.

    cp       CuPy
    xp       the array module that plain kernels get: CuPy, with what it lacks or does slowly replaced
    kernels  compiled CUDA sources: kernels(SOURCE, "function", T="float")(grid, block, args)
    blas     matrix products
    dnn      convolutions, normalisations and attention by cuDNN, or None
    """

    def __init__(self, libraries: Libraries, index: int = 0, memory_fraction: float | None = None) -> None:
        self.libraries = libraries
        self.cp = cp = libraries.cupy
        self.index = index
        self.handle = cp.cuda.Device(index)
        self.kernels = Kernels(cp)
        self.xp: Any = cp
        self.blas: Any = None
        self.dnn: Any = None
        with self.handle:
            self.stream = cp.cuda.Stream(non_blocking=True)
            self.pool = cp.cuda.MemoryPool()
            if memory_fraction is not None:
                self.pool.set_limit(fraction=memory_fraction)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this thread's arrays are made on this device, by its pool, and work goes to its stream."""
        with self.handle, self.stream, self.cp.cuda.using_allocator(self.pool.malloc):
            yield

    def synchronize(self) -> None:
        """Wait for all work that was begun."""
        self.stream.synchronize()
