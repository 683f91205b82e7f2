"""DLPack on hosts: NumPy's, and bfloat16, which NumPy does not know there.

A capsule holds a C struct whose layout the standard fixes (dmlc/dlpack, dlpack.h); bfloat16 passes as 16-bit
integers whose type code is exchanged.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from meshtape.runtime.dtypes import bfloat16
from meshtape.runtime.errors import MeshError

CPU, CUDA = 1, 2
ON_HOST = (CPU, 3, 13)          # ordinary memory, pinned, managed
UINT, BFLOAT = 1, 4             # type codes
# Where the type code lies: behind data, device and ndim; in capsules with a version, behind 32 bytes more.
CODE_AT = {b"dltensor": 20, b"dltensor_versioned": 52}

_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _code(capsule: Any) -> ctypes.c_uint8:
    """The type code of a capsule that nobody has taken yet, to be read and written."""
    name = _name(capsule)
    if name not in CODE_AT:
        raise BufferError(f"{name!r} is no DLPack capsule, or one that was taken before")
    return ctypes.c_uint8.from_address(_pointer(capsule, name) + CODE_AT[name])


class _Capsule:
    """A capsule, as from_dlpack() wants it."""

    def __init__(self, capsule: Any, device: tuple[int, int]) -> None:
        self._capsule, self._device = capsule, device

    def __dlpack__(self, **asked: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


def host_array(x: Any) -> np.ndarray[Any, Any]:
    """A NumPy array in the memory of another library's array `x`, which has __dlpack__.

    Raises MeshError for one on a device.
    """
    device = tuple(int(n) for n in x.__dlpack_device__())
    if device[0] not in ON_HOST:
        raise MeshError(f"an array on a device (DLPack's type {device[0]}) given where workers have no such "
                        f"device in this process; copy it to the host first: .cpu() or .get()")
    if getattr(x, "requires_grad", False):
        x = x.detach()
    capsule = x.__dlpack__()
    code = _code(capsule)
    low = code.value == BFLOAT
    if low:
        code.value = UINT
    found = np.from_dlpack(_Capsule(capsule, (CPU, 0)))
    return found.view(bfloat16()) if low else found


def capsule_of(array: np.ndarray[Any, Any], max_version: tuple[int, int] | None) -> Any:
    """array.__dlpack__(), also for bfloat16. Raises BufferError for a read-only array without a version."""
    if array.dtype.name != "bfloat16":
        return array.__dlpack__(max_version=max_version)
    capsule = array.view(np.uint16).__dlpack__(max_version=max_version)
    _code(capsule).value = BFLOAT
    return capsule


class _Lent:
    """An array's memory, read-only, and what must live as long as somebody looks at it."""

    def __init__(self, array: np.ndarray[Any, Any], keeps: Any) -> None:
        found = array.__array_interface__
        self.__array_interface__ = {**found, "data": (found["data"][0], True)}
        self._keeps = array, keeps


def lent(array: np.ndarray[Any, Any], keeps: Any) -> np.ndarray[Any, Any]:
    """`array`, read-only, in the same memory; `keeps` lives as long as the result and what is made of it."""
    low = array.dtype.name == "bfloat16"
    found = np.asarray(_Lent(array.view(np.uint16) if low else array, keeps))
    return found.view(array.dtype) if low else found
