"""Device memory of the emulation: real bytes with guards around them, handed out and taken back by pools.

A block is filled with 0xFF when it is handed out (NaN in every float, -1 in every integer), so that a result
shows whether something was read before it was written. Bytes before and behind what was asked for are
guards; `check()` says which blocks were written outside of their bounds.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from functools import partial
from typing import Any

import numpy as np

from emulator import order
from emulator.order import READ, WRITE, span

GUARD = 512
ALIGN = 512
CANARY = 0xA5
POISON = 0xFF


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory.OutOfMemoryError."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        text = f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes"
        super().__init__(text + (f", limit set to: {limit:,} bytes)." if limit else ")."))


def out_of_memory() -> Any:
    """What cudaMalloc says."""
    from emulator.streams import CUDARuntimeError
    return CUDARuntimeError("cudaErrorMemoryAllocation", "out of memory", status=2)


class Hardware:
    """What all pools of the emulated device share: its bytes."""

    def __init__(self) -> None:
        self.total = 64 << 30
        self.damage: list[str] = []
        self.gone: deque[tuple[int, int, object]] = deque()     # finalisers take no locks
        self._used = 0
        self._lock = threading.RLock()

    @property
    def used(self) -> int:
        with self._lock:
            while self.gone:
                start, size, token = self.gone.popleft()
                order.remove_block(start, token)
                self._used -= size
            return self._used

    def take(self, size: int) -> None:
        with self._lock:
            if self.used + size > self.total:
                raise out_of_memory()
            self._used += size


HARDWARE = Hardware()


def set_device_memory(total: int) -> None:
    """Let the device have so many bytes, over all pools."""
    HARDWARE.total = total


def check() -> None:
    """Raise AssertionError if something was written outside of an allocation since the last call."""
    found = HARDWARE.damage[:]
    HARDWARE.damage.clear()
    assert not found, "; ".join(found)


class Memory:
    """`size` bytes of device memory at address `ptr`, given back to the device when it goes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.device_id = 0
        HARDWARE.take(size)
        self._raw = np.empty(size + 2 * GUARD + ALIGN, np.uint8)
        start = GUARD + -(self._raw.ctypes.data + GUARD) % ALIGN
        self._raw[:] = CANARY
        self.bytes = self._raw[start:start + size]
        self._before, self._behind = self._raw[start - GUARD:start], self._raw[start + size:][:GUARD]
        self.ptr = int(self.bytes.ctypes.data) if size else int(self._raw.ctypes.data) + start
        self.asked = size
        self._token = order.add_block(self.ptr, size)

    def hand_out(self, asked: int) -> None:
        from emulator.streams import current_stream
        if current_stream().is_capturing():
            asked = self.size       # a graph's replays write to blocks that its pool has handed out again
        self.asked = asked
        self.bytes[:asked] = POISON
        self.bytes[asked:] = CANARY

    def inspect(self) -> None:
        """Note damage to the guards."""
        for where, guard in (("before", self._before), ("behind", self._behind),
                             ("behind", self.bytes[self.asked:])):
            if guard.size and not (guard == CANARY).all():
                HARDWARE.damage.append(f"{self.asked} bytes at {self.ptr:#x}: written {where} them")
                guard[:] = CANARY

    def __del__(self) -> None:
        # It may have gone back to its pool before, and into use: garbage is finalised one by one.
        if hasattr(self, "asked"):
            HARDWARE.gone.append((self.ptr, self.size, self._token))


class PooledMemory:
    """A block of a pool, which takes it back when the last array that uses it goes."""

    def __init__(self, memory: Memory, pool: MemoryPool, arena: Any) -> None:
        self._memory, self._pool, self._arena = memory, pool, arena
        self.ptr, self.size, self.device_id, self.bytes = memory.ptr, memory.size, 0, memory.bytes

    def free(self) -> None:
        memory, self._memory = self._memory, None  # type: ignore[assignment]
        if memory is not None:
            memory.inspect()
            self._pool._returned.append((memory, self._arena))

    def __del__(self) -> None:
        self.free()


class UnownedMemory:
    """cupy.cuda.UnownedMemory: bytes at an address that `owner` keeps alive."""

    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        self.ptr, self.size, self.device_id = int(ptr), size, max(device_id, 0)
        self._owner = owner
        self.bytes = bytes_at(self.ptr, size)


def bytes_at(ptr: int, size: int) -> np.ndarray[Any, Any]:
    """The memory at an address, as an array of bytes."""
    if not size:
        return np.empty(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * size).from_address(ptr), np.uint8)


class MemoryPointer:
    """cupy.cuda.MemoryPointer: a place in a block of memory."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    def __int__(self) -> int:
        return int(self.ptr)

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def __sub__(self, offset: int) -> MemoryPointer:
        return self + -offset

    def _bytes(self, size: int) -> np.ndarray[Any, Any]:
        start = self.ptr - self.mem.ptr
        if start < 0 or start + size > self.mem.size:
            raise AssertionError(f"{size} bytes at byte {start} of a block of {self.mem.size}: outside of it")
        found: np.ndarray[Any, Any] = self.mem.bytes[start:start + size]
        return found

    def copy_from_device_async(self, src: MemoryPointer, size: int, stream: Any = None) -> None:
        to, come = self._bytes(size), src._bytes(size)
        _work(lambda: np.copyto(to, come), stream, [span(come, READ), span(to, WRITE)])

    def copy_from_host_async(self, mem: Any, size: int, stream: Any = None) -> None:
        to, come, owner = self._bytes(size), bytes_at(_address(mem), size), pinned_at(_address(mem))
        copy = np.copyto if owner is None else partial(copy_from_host, owner=owner)
        _work(lambda: copy(to, come), stream, [span(to, WRITE)])

    def copy_to_host_async(self, mem: Any, size: int, stream: Any = None) -> None:
        come, to, owner = self._bytes(size), bytes_at(_address(mem), size), pinned_at(_address(mem))
        copy = np.copyto if owner is None else partial(copy_to_host, owner=owner)
        _work(lambda: copy(to, come), stream, [span(come, READ)])

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        to = self._bytes(size)
        _work(lambda: to.fill(value), stream, [span(to, WRITE)])

    def copy_from_device(self, src: MemoryPointer, size: int) -> None:
        self.copy_from_device_async(src, size)

    def copy_from_host(self, mem: Any, size: int) -> None:
        self.copy_from_host_async(mem, size)
        _sync("MemoryPointer.copy_from_host")

    def copy_to_host(self, mem: Any, size: int) -> None:
        self.copy_to_host_async(mem, size)
        _sync("MemoryPointer.copy_to_host")

    def memset(self, value: int, size: int) -> None:
        self.memset_async(value, size)


def _address(mem: Any) -> int:
    """CuPy takes an integer or a ctypes.c_void_p for a host address."""
    if isinstance(mem, ctypes.c_void_p):
        return mem.value or 0
    if isinstance(mem, int):
        return mem
    raise TypeError(f"a host address is an int or a ctypes.c_void_p, got {type(mem).__name__}")


def _work(does: Any, stream: Any, touches: Any) -> None:
    from emulator.streams import work
    work(does, stream, touches)


def copy_to_host(to: np.ndarray[Any, Any], come: np.ndarray[Any, Any], owner: object = None) -> None:
    """What the device does of a copy: the values arrive when the host has waited for the stream."""
    stream, values = executing_stream(), come.copy()
    if to.flags.c_contiguous and to.ndim:
        to.view(np.uint8)[...] = POISON

    def arrive(owner: object = owner) -> None:
        np.copyto(to, values)

    order.arrives(stream.ptr, stream._clock[stream.ptr], arrive)


def copy_from_host(to: np.ndarray[Any, Any], come: np.ndarray[Any, Any], owner: object = None) -> None:
    """A copy from memory that must stay as it is until the host has waited for the stream."""
    stream, values = executing_stream(), come.copy()
    np.copyto(to, values)

    def check(owner: object = owner) -> None:
        if not np.array_equal(come, values):
            HARDWARE.damage.append(f"{values.nbytes} bytes of the host were written while a copy from them "
                                   f"was under way")

    order.arrives(stream.ptr, stream._clock[stream.ptr], check)


def executing_stream() -> Any:
    from emulator.streams import executing
    return executing()


def pinned_at(address: int) -> PinnedMemoryPointer | None:
    """The page-locked memory that an address lies in."""
    return next((p for p in order.living(_PINNED) if p.ptr <= address < p.ptr + p.size()), None)


def _sync(what: str) -> None:
    from emulator.streams import synchronises
    synchronises(what)


class MemoryPool:
    """cupy.cuda.MemoryPool: freed blocks stay, by stream and size, and the last one freed is reused first.

    Like CuPy's, it takes no weak references.
    """

    __slots__ = ("_allocator", "_free", "_limit", "_lock", "_returned", "_total", "_used")

    def __init__(self, allocator: Any = None) -> None:
        self._allocator = allocator or (lambda size: MemoryPointer(Memory(size), 0))
        self._free: dict[Any, dict[int, list[Memory]]] = {}
        self._returned: deque[tuple[Memory, Any]] = deque()      # finalisers take no locks
        self._total = self._used = self._limit = 0
        self._lock = threading.RLock()

    def malloc(self, size: int) -> MemoryPointer:
        """A block for `size` bytes, rounded up to 512; none for 0 bytes."""
        from emulator.streams import current_stream
        if size == 0:
            return MemoryPointer(UnownedMemory(0, 0, None), 0)
        rounded = -(-size // ALIGN) * ALIGN
        arena = current_stream().ptr
        with self._lock:
            self._take_back()
            free = self._free.setdefault(arena, {}).get(rounded)
            memory = free.pop() if free else self._grow(rounded)
            self._used += rounded
        memory.hand_out(size)
        return MemoryPointer(PooledMemory(memory, self, arena), 0)

    def _grow(self, size: int) -> Memory:
        if self._limit and self._total + size > self._limit:
            self.free_all_blocks()
            if self._total + size > self._limit:
                raise OutOfMemoryError(size, self._total, self._limit)
        self._total += size             # CuPy counts what it is about to ask for
        try:
            return self._asked(size)
        except BaseException:
            self._total -= size
            raise

    def _asked(self, size: int) -> Memory:
        """What the allocator has; where that has nothing, after giving unused blocks back."""
        found: Memory
        for last in (False, True):
            try:
                found = self._allocator(size).mem
                break
            except RuntimeError as error:
                if getattr(error, "status", 0) != out_of_memory().status:
                    raise
                if last:
                    raise OutOfMemoryError(size, self._total - size, self._limit) from error
                self.free_all_blocks()
        return found

    def _take_back(self) -> None:
        with self._lock:
            while self._returned:
                memory, arena = self._returned.popleft()
                self._used -= memory.size
                self._free.setdefault(arena, {}).setdefault(memory.size, []).append(memory)

    def free_all_blocks(self, stream: Any = None) -> None:
        with self._lock:
            self._take_back()
            for arena in [stream.ptr] if stream is not None else list(self._free):
                for blocks in self._free.pop(arena, {}).values():
                    self._total -= sum(b.size for b in blocks)

    def free_all_free(self) -> None:
        self.free_all_blocks()

    def n_free_blocks(self) -> int:
        self._take_back()
        return sum(len(blocks) for sizes in self._free.values() for blocks in sizes.values())

    def used_bytes(self) -> int:
        self._take_back()
        return self._used

    def free_bytes(self) -> int:
        return self._total - self.used_bytes()

    def total_bytes(self) -> int:
        return self._total

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        if (size is None) == (fraction is None):
            if size is None:
                size = 0
            else:
                raise ValueError("size and fraction cannot be specified at the same time")
        if fraction is not None:
            if not 0 <= fraction <= 1:
                raise ValueError(f"memory limit fraction out of range: {fraction}")
            size = int(fraction * HARDWARE.total)
        assert size is not None
        if size < 0:
            raise ValueError(f"memory limit size out of range: {size}")
        self._limit = size

    def get_limit(self) -> int:
        return self._limit


_PINNED: weakref.WeakValueDictionary[int, PinnedMemoryPointer] = weakref.WeakValueDictionary()


class PinnedMemoryPointer(bytearray):
    """Page-locked host memory; NumPy reads it as a buffer: np.frombuffer(pointer, dtype, count)."""

    def __init__(self, size: int) -> None:
        super().__init__(bytes([POISON]) * size)
        self._held = (ctypes.c_char * size).from_buffer(self)
        self.ptr = ctypes.addressof(self._held)
        self.mem = self
        _PINNED[id(self)] = self

    def size(self) -> int:
        return len(self)
