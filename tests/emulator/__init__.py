"""A strict stand-in for CuPy over NumPy memory: what runs here uses only what CuPy 14 has, as CuPy has it.

libraries()   the libraries of one emulated device, for runtime.cuda.device.Device
device()      a Device on them
work(f, stream, touches)   do a piece of device work, or record it in the capture of its stream
check()       raise if something was written outside of an allocation, or to memory that was being copied from
SYNCHRONISATIONS   what made the host wait, in order

The installed CuPy is asked for names, signatures and the loops of its ufuncs and reductions; arithmetic is
NumPy's. Where it differs from the real one:
* Work is done at once. order.RaceError stands for what a forgotten wait would do, for memory that arrays,
  copies, kernels' pointers and libraries' operands name; pointers in tables that kernels read are not seen.
* A graph is a list of work in the order of recording; it keeps the memory that it names alive.
* Pools reuse blocks of exactly one size (CuPy's splits larger ones); there is one device; peers and IPC lack.
* argmax, mean, var and sorts refuse bfloat16; some of CuPy's may take it in float32.
* Sums are in NumPy's order; 16-bit floats are summed in float32, as CuPy does, but rounded once.
* Views that NumPy makes read-only (broadcast_to, diagonal) are read-only, which CuPy's are not.
* There is no cupy.random, fft, linalg, ElementwiseKernel, RawKernel, or fuse.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import Any

from emulator.memory import check, set_device_memory
from emulator.streams import SYNCHRONISATIONS, work

__all__ = ["SYNCHRONISATIONS", "check", "device", "libraries", "set_device_memory", "work"]


@lru_cache(maxsize=1)
def libraries() -> Any:
    """The emulated libraries, as runtime.cuda.libraries.Libraries; the same object every time."""
    from emulator import special
    from meshtape.runtime.cuda.libraries import Libraries
    cupy = module()
    nccl, cudnn, cublas, modules = part("nccl"), part("cudnn"), part("cublas"), part("modules")
    cupy.cuda.nccl = nccl

    def load(code: str, options: tuple[str, ...]) -> Any:
        return modules.RawModule(code=code, options=options)

    return Libraries(cupy, cublas.Cublas(), special, load, nccl, part("cublaslt"), cudnn)


def part(name: str) -> Any:
    """The module emulator.<name>, which stands for a library, or None where it is not there."""
    if importlib.util.find_spec(f"emulator.{name}") is None:
        return None
    return importlib.import_module(f"emulator.{name}")


def device(**options: Any) -> Any:
    """A Device on the emulated libraries."""
    from meshtape.runtime.cuda.device import Device
    return Device(libraries(), **options)


def module() -> Any:
    """The emulated module `cupy`."""
    from emulator import functions, methods, reductions, runtime
    from emulator.array import ndarray
    from emulator.ufuncs import UFUNCS, ufunc
    cupy: Any = ModuleType("cupy")
    found = functions.table()
    cupy.__dict__.update(found | reductions.table(found))
    cupy.lib = functions.lib()
    cupy.__dict__.update(UFUNCS)
    methods.install(cupy.__dict__)
    cupy.ndarray, cupy.ufunc, cupy.cuda = ndarray, ufunc, runtime.cuda()
    cupy.get_default_memory_pool = lambda: runtime.LOCAL.allocator.default
    modules = part("modules")
    if modules is not None:
        cupy.RawModule = modules.RawModule
    return cupy
