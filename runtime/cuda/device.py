"""One CUDA device as one worker uses it: what its kernels are handed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from meshtape.runtime.cuda.arrays import ArrayModule
from meshtape.runtime.cuda.blas import Blas
from meshtape.runtime.cuda.dnn import Dnn
from meshtape.runtime.cuda.libraries import Libraries
from meshtape.runtime.cuda.source import Kernels

MIB = 1 << 20
MEMORY_ALLOCATION = 2       # cudaErrorMemoryAllocation
# Tensors that an out-of-memory error names.
LARGEST = 5


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
        self.kernels = Kernels(libraries)
        self.capturing = False      # whether a CUDA graph is being recorded
        self._peak = 0
        with self.handle:
            self.stream = cp.cuda.Stream(non_blocking=True)
            total = cp.cuda.runtime.memGetInfo()[1]
            self.limit = 0 if memory_fraction is None else int(memory_fraction * total)
            self._pools: list[Any] = []
            self._retired: list[Any] = []
            self.pool = self.new_pool()
        self.blas = Blas(self)
        self.dnn = None if libraries.cudnn is None else Dnn(self)
        self.xp = ArrayModule(self)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this thread's arrays are made on this device, by its pool, and work goes to its stream."""
        with self.handle, self.stream, self.cp.cuda.using_allocator(self.pool.malloc):
            yield

    def synchronize(self) -> None:
        """Wait for all work that was begun."""
        self.stream.synchronize()

    def close(self) -> None:
        """Give libraries' handles and unused memory back. The device's arrays stay as they are."""
        with self.active():
            self.synchronize()
            self.blas.close()
            if self.dnn is not None:
                self.dnn.close()
            self.pool.free_all_blocks()

    # -- memory

    def new_pool(self) -> Any:
        """A memory pool that keeps, together with the others of this device, to the limit; until retire()."""
        pool = self.cp.cuda.MemoryPool()
        if self.limit:
            pool.set_limit(size=max(1, self.limit - self.held()))
        self._pools.append(pool)
        return pool

    def new_graph_pool(self) -> Any:
        """A memory pool for what a graph will do, until retire(). Unlike others it gives no unused blocks
        back where memory is short, but raises OutOfMemoryError at once: what is unused while a graph is
        recorded is used when it is replayed.
        """
        pool = self.cp.cuda.MemoryPool(self._grown)
        self._pools.append(pool)
        return pool

    def _grown(self, size: int) -> Any:
        """More memory of the device for a pool, which counts it already."""
        cuda = self.cp.cuda
        if self.limit and self.held() > self.limit:
            raise cuda.memory.OutOfMemoryError(size, self.held() - size, self.limit)
        try:
            return cuda.MemoryPointer(cuda.Memory(size), 0)
        except cuda.runtime.CUDARuntimeError as error:
            if error.status != MEMORY_ALLOCATION:
                raise
            raise cuda.memory.OutOfMemoryError(size, self.held() - size) from error

    def retire(self, pool: Any) -> None:
        """Give a pool up. It stays till the last array in it has gone: with a pool that goes earlier, CuPy
        never returns the rest of blocks that were split.
        """
        self._pools.remove(pool)
        self._retired.append(pool)
        self._return_retired()
        self.share()

    def _return_retired(self) -> None:
        for pool in self._retired:
            pool.free_all_blocks()
        self._retired = [pool for pool in self._retired if pool.total_bytes()]

    def share(self) -> None:
        """Leave the pool what the other pools do not hold."""
        if self.limit:
            others = self.held() - self.pool.total_bytes()
            self.pool.set_limit(size=max(1, self.limit - others))

    def held(self) -> int:
        """Bytes that this worker holds on the device, used or not."""
        return sum(pool.total_bytes() for pool in (*self._pools, *self._retired))

    def peak(self) -> int:
        """The most bytes that were held at the end of a batch."""
        self._peak = max(self._peak, self.held())
        return self._peak

    def give_back(self) -> None:
        """Return unused memory to the device."""
        self.synchronize()
        self._return_retired()
        self.pool.free_all_blocks()
        self.share()

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, self.cp.cuda.memory.OutOfMemoryError)

    def shortage(self, name: str, shapes: Sequence[Any], dtypes: Sequence[Any],
                 live: Sequence[Any]) -> str:
        """What to tell the user when `name` got no memory for its results: who holds it, and what to do."""
        with self.handle:
            free, total = self.cp.cuda.runtime.memGetInfo()
        made = " and ".join(f"{dtype} {tuple(shape)}" for shape, dtype in zip(shapes, dtypes, strict=True))
        arrays = sorted({id(a): a for a in live}.values(), key=lambda a: -a.nbytes)
        held = ", ".join(f"{a.dtype} {tuple(a.shape)} {a.nbytes / MIB:.1f} MiB" for a in arrays[:LARGEST])
        limit = f", of which this worker may use {self.limit / MIB:.0f}" if self.limit else ""
        return (f"{name}: the device has no memory for its result ({made}); {free / MIB:.0f} of "
                f"{total / MIB:.0f} MiB are free{limit}, this worker holds {self.held() / MIB:.0f} MiB, "
                f"{self.pool.used_bytes() / MIB:.0f} in use. Largest of {len(arrays)} live tensors: "
                f"{held or 'none'}. Use a smaller batch, delete tensors, checkpoint() or shard the model")
