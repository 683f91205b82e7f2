"""cupy.cuda and cupy.cuda.runtime of the emulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from emulator import memory, streams
from emulator.array import LOCAL
from emulator.order import READ, WRITE, span


class Device:
    """cupy.cuda.Device: there is one, number 0."""

    def __init__(self, device: Any = None) -> None:
        self.id = 0 if device is None else int(device)
        if self.id != 0:
            raise streams.CUDARuntimeError("cudaErrorInvalidDevice", f"there is one device, not {self.id}")

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def use(self) -> Device:
        return self

    def synchronize(self) -> None:
        streams.forbidden("Device.synchronize")
        streams.synchronises("Device.synchronize", streams.everything())

    @property
    def mem_info(self) -> tuple[int, int]:
        return mem_get_info()

    @property
    def compute_capability(self) -> str:
        return "90"

    @property
    def pci_bus_id(self) -> str:
        return "0000:01:00.0"

    @property
    def attributes(self) -> dict[str, Any]:
        return {"MultiProcessorCount": 4, "MaxSharedMemoryPerBlockOptin": 232448, "WarpSize": 32}


def mem_get_info() -> tuple[int, int]:
    return memory.HARDWARE.total - memory.HARDWARE.used, memory.HARDWARE.total


def properties(device: int) -> dict[str, Any]:
    Device(device)
    return {"name": b"Emulated", "totalGlobalMem": memory.HARDWARE.total, "multiProcessorCount": 4,
            "major": 9, "minor": 0, "warpSize": 32, "sharedMemPerBlock": 49152,
            "sharedMemPerBlockOptin": 232448, "maxThreadsPerBlock": 1024, "regsPerBlock": 65536,
            "pciBusID": 1, "pciDeviceID": 0,
            "pciDomainID": 0, "uuid": bytes(16), "l2CacheSize": 50 << 20, "maxThreadsPerMultiProcessor": 2048,
            "sharedMemPerMultiprocessor": 233472, "memoryClockRate": 2619000, "memoryBusWidth": 5120}


def memcpy_async(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    to, come = memory.bytes_at(dst, size), memory.bytes_at(src, size)
    target, source = memory.pinned_at(dst), memory.pinned_at(src)
    copy: Any = np.copyto
    if target is not None and source is None:
        copy = partial(memory.copy_to_host, owner=target)
    elif source is not None and target is None:
        copy = partial(memory.copy_from_host, owner=source)
    streams.work(lambda: copy(to, come), _stream(stream), [span(come, READ), span(to, WRITE)])


def memset_async(ptr: int, value: int, size: int, stream: int) -> None:
    to = memory.bytes_at(ptr, size)
    streams.work(lambda: to.fill(value), _stream(stream), [span(to, WRITE)])


def _stream(ptr: int) -> streams.Stream:
    """The stream with a handle: the current one, or one that is entered or captured nowhere here."""
    found = streams.current_stream()
    if found.ptr == ptr:
        return found
    return streams.by_handle(ptr)


@contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    LOCAL.allocator.stack.append(allocator or LOCAL.allocator.default.malloc)
    try:
        yield
    finally:
        LOCAL.allocator.stack.pop()


def set_allocator(allocator: Any = None) -> None:
    if LOCAL.allocator.stack:
        raise ValueError("cannot set the allocator inside using_allocator")
    LOCAL.allocator.stack[:] = [] if allocator is None else [allocator]


def runtime() -> Any:
    return SimpleNamespace(
        CUDARuntimeError=streams.CUDARuntimeError, getDeviceCount=lambda: 1, getDevice=lambda: 0,
        setDevice=lambda device: Device(device), getDeviceProperties=properties, memGetInfo=mem_get_info,
        deviceGetPCIBusId=lambda device: "0000:01:00.0", memcpyAsync=memcpy_async, memsetAsync=memset_async,
        deviceSynchronize=lambda: Device().synchronize(), runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13000, memcpyHostToHost=0, memcpyHostToDevice=1, memcpyDeviceToHost=2,
        memcpyDeviceToDevice=3, memcpyDefault=4, streamCaptureModeGlobal=0, streamCaptureModeThreadLocal=1,
        streamCaptureModeRelaxed=2, is_hip=False,
        deviceGetAttribute=lambda attribute, device: {16: 4, 97: 232448}[attribute],
        cudaDevAttrMultiProcessorCount=16, cudaDevAttrMaxSharedMemoryPerBlockOptin=97)


def cuda() -> Any:
    """cupy.cuda."""
    return SimpleNamespace(
        Device=Device, Stream=streams.Stream, Event=streams.Event, Graph=streams.Graph,
        get_current_stream=streams.current_stream, get_elapsed_time=streams.get_elapsed_time,
        get_device_id=lambda: 0, is_available=lambda: True, runtime=runtime(),
        MemoryPool=memory.MemoryPool, MemoryPointer=memory.MemoryPointer, UnownedMemory=memory.UnownedMemory,
        Memory=memory.Memory, PinnedMemoryPointer=memory.PinnedMemoryPointer,
        alloc=lambda size: LOCAL.allocator(size), alloc_pinned_memory=memory.PinnedMemoryPointer,
        using_allocator=using_allocator, set_allocator=set_allocator,
        get_allocator=lambda: LOCAL.allocator.current,
        stream=SimpleNamespace(Stream=streams.Stream, Event=streams.Event,
                               get_current_stream=streams.current_stream),
        memory=SimpleNamespace(OutOfMemoryError=memory.OutOfMemoryError, MemoryPool=memory.MemoryPool,
                               MemoryPointer=memory.MemoryPointer, UnownedMemory=memory.UnownedMemory),
        nccl=SimpleNamespace(available=False))
