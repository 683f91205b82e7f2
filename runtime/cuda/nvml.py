"""What the NVIDIA driver's own library knows, without CUDA: all GPUs of the machine, and their links.

libnvidia-ml comes with the driver; its functions are called by ctypes (nvml.h, version 12). Unlike CUDA it
heeds no CUDA_VISIBLE_DEVICES, so that an actor that is given one GPU can see how it is joined to the others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

LIBRARY = "libnvidia-ml.so.1"
SUCCESS = 0
# nvmlGpuP2PCapsIndex_t
_NVLINK = 2


class Card(NamedTuple):
    """A GPU: its PCI bus id as CUDA writes it ("0000:3B:00.0"), memory in bytes, and the PCI bus ids of those
    that NVLink joins it with.
    """

    pci: str
    name: str
    memory: int
    linked: tuple[str, ...] = ()


class Driver(NamedTuple):
    """The driver's version, the newest CUDA that it runs (13000 for 13.0), and the GPUs, in order of PCI bus.

    `trouble` says why they are not known, if they are not.
    """

    version: str = ""
    cuda: int = 0
    cards: tuple[Card, ...] = ()
    trouble: str = ""


class _Pci(ctypes.Structure):
    """nvmlPciInfo_t"""

    _fields_ = (("legacy", ctypes.c_char * 16), ("domain", ctypes.c_uint), ("bus", ctypes.c_uint),
                ("device", ctypes.c_uint), ("id", ctypes.c_uint), ("subsystem", ctypes.c_uint),
                ("name", ctypes.c_char * 32))


class _Memory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def driver(library: Any = None) -> Driver:
    """What is there; `library` stands in for libnvidia-ml in tests."""
    if library is None:
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError:
            return Driver(trouble="there is no NVIDIA driver")
    with _initialised(library) as trouble:
        if trouble:
            return Driver(trouble=trouble)
        version, cuda, count = ctypes.create_string_buffer(96), ctypes.c_int(), ctypes.c_uint()
        library.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
        library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        found = {}
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == SUCCESS:
                card = _card(library, handle)
                found[card.pci] = card, handle
        cards = tuple(card._replace(linked=_linked(library, handle, found)) for card, handle in
                      (found[pci] for pci in sorted(found)))
        return Driver(version.value.decode(), cuda.value, cards)


@contextmanager
def _initialised(library: Any) -> Iterator[str]:
    """Yields what is wrong, if anything."""
    status = library.nvmlInit_v2()
    if status != SUCCESS:
        library.nvmlErrorString.restype = ctypes.c_char_p
        yield str(library.nvmlErrorString(status).decode())
        return
    try:
        yield ""
    finally:
        library.nvmlShutdown()


def _card(library: Any, handle: Any) -> Card:
    pci, name, memory = _Pci(), ctypes.create_string_buffer(96), _Memory()
    library.nvmlDeviceGetPciInfo_v3(handle, ctypes.byref(pci))
    library.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return Card(f"{pci.domain:04X}:{pci.bus:02X}:{pci.device:02X}.0", name.value.decode(), memory.total)


def _linked(library: Any, handle: Any, found: dict[str, Any]) -> tuple[str, ...]:
    """Those that this GPU reaches by NVLink, through switches as well."""
    out = []
    for pci, (_, other) in sorted(found.items()):
        status = ctypes.c_int(1)
        if other is not handle:
            done = library.nvmlDeviceGetP2PStatus(handle, other, ctypes.c_int(_NVLINK), ctypes.byref(status))
            if done == SUCCESS and status.value == 0:       # NVML_P2P_STATUS_OK
                out.append(pci)
    return tuple(out)
