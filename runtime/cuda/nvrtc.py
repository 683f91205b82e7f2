"""CUDA C++ compiled by NVRTC and loaded, with a cache on disk that all workers of a machine share.

cupy.RawModule does the same, except that it always compiles with -ftz=true: numbers of float32 and bfloat16
below 1e-38 would become 0, which they are not with NumPy.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from meshtape.runtime.errors import MeshtapeError


class CompileError(MeshtapeError):
    """NVRTC does not take a source."""


def module(code: str, options: tuple[str, ...]) -> Any:
    """The code, loaded on the current device: get_function(name)(grid, block, args, shared_mem=0) launches.

    Raises CompileError.
    """
    import cupy
    device = cupy.cuda.Device()
    return _loaded(code, options, device.id, int(device.compute_capability))


@cache
def _loaded(code: str, options: tuple[str, ...], index: int, capability: int) -> Any:
    """Kept as long as the process: functions may still be needed when a device has been closed."""
    import cupy
    made = cupy.cuda.Module()
    made.load(cubin(code, options, capability))
    return made


def folder() -> Path:
    """Where CuPy keeps compiled code."""
    return Path(os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache")))


def cubin(code: str, options: Sequence[str], capability: int) -> bytes:
    """Machine code for a compute capability (90 for 9.0), or PTX for one that NVRTC does not know yet."""
    from cupy_backends.cuda.libs import nvrtc
    options = (*options, *_target(capability))
    words = "\0".join((code, *options, str(nvrtc.getVersion()))).encode()
    path = folder() / f"meshtape_{hashlib.sha256(words).hexdigest()[:40]}.cubin"
    if path.exists():
        return path.read_bytes()
    made = _compiled(code, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(made)
    os.replace(file.name, path)
    return made


def _target(capability: int) -> tuple[str, ...]:
    from cupy_backends.cuda.libs import nvrtc
    known = nvrtc.getSupportedArchs()
    return (f"-arch=sm_{capability}" if capability in known else f"-arch=compute_{max(known)}",)


def _compiled(code: str, options: tuple[str, ...]) -> bytes:
    from cupy_backends.cuda.libs import nvrtc
    program = nvrtc.createProgram(code, "meshtape.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise CompileError(f"{error}: {nvrtc.getProgramLog(program)}") from error
        whole = any(option.startswith("-arch=sm_") for option in options)
        return bytes(nvrtc.getCUBIN(program) if whole else nvrtc.getPTX(program))
    finally:
        nvrtc.destroyProgram(program)
