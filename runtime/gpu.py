"""GPUs of this process: how many there are, what one of them is, and taking it.

CuPy is imported only when asked.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from meshtape.runtime.cuda import nvml
from meshtape.runtime.errors import MeshError

# Where Linux describes what sits on the PCI bus.
PCI_DEVICES = Path("/sys/bus/pci/devices")


class Gpu(NamedTuple):
    """A GPU as its worker finds it. `number` counts what CUDA shows to the process, `pci` names it in its
    machine, `numa` is the memory node it is next to (-1: unknown), `linked` are those that NVLink joins it
    with, and `nccl` is the version of NCCL (22803 for 2.28.3; 0: none).
    """

    number: int
    name: str
    pci: str
    memory: int
    capability: str
    numa: int = -1
    linked: tuple[str, ...] = ()
    nccl: int = 0


def gpu_here(index: int = 0) -> tuple[str, str]:
    """The name of a CUDA device and "", or "" and the reason why there is none."""
    try:
        import cupy  # type: ignore[import-not-found]
    except ImportError as error:
        return "", f"cupy cannot be imported ({error})"
    if not cupy.cuda.is_available():
        return "", "cupy finds no CUDA device"
    if index >= cupy.cuda.runtime.getDeviceCount():
        return "", f"there is no CUDA device {index}"
    name = cupy.cuda.runtime.getDeviceProperties(index)["name"]
    return name.decode(), ""


def device_count() -> int:
    """How many GPUs CUDA shows to this process; 0 without CuPy, and without a driver."""
    if importlib.util.find_spec("cupy") is None:
        return 0
    import cupy
    return int(cupy.cuda.runtime.getDeviceCount()) if cupy.cuda.is_available() else 0


def describe(index: int = 0) -> Gpu:
    """What GPU `index` is, which must be there (see gpu_here); makes no CUDA context."""
    import cupy
    from cupy.cuda import nccl  # type: ignore[import-not-found]
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    pci = cupy.cuda.runtime.deviceGetPCIBusId(index).upper()
    cards = {card.pci: card for card in nvml.driver().cards}
    return Gpu(index, properties["name"].decode(), pci, int(properties["totalGlobalMem"]),
               f"{properties['major']}.{properties['minor']}", numa_node(pci),
               cards[pci].linked if pci in cards else (), nccl.get_version() if nccl.available else 0)


def numa_node(pci: str, devices: Path = PCI_DEVICES) -> int:
    """The memory node that a PCI device is next to, -1 where the system does not say."""
    file = devices / pci.lower() / "numa_node"
    return int(file.read_text()) if file.exists() else -1


def open_device(index: int = 0, memory_fraction: float | None = None) -> Any:
    """GPU `index` of this process as a runtime.cuda.device.Device, for work of the calling thread.

    memory_fraction: of the GPU's memory, the most that its pool holds. Raises MeshError if there is no such
    GPU.
    """
    from meshtape.runtime.cuda.device import Device
    from meshtape.runtime.cuda.libraries import load
    name, reason = gpu_here(index)
    if not name:
        raise MeshError(f"no GPU can be used here: {reason}; run `meshtape doctor` for what to install")
    return Device(load(), index, memory_fraction)
