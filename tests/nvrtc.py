"""NVRTC from NVIDIA's wheel: CUDA sources compile in tests without a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from meshtape.runtime.cuda.source import OPTIONS


@cache
def nvrtc() -> Any:
    """NVRTC's library, from NVIDIA's wheel; the tests are skipped without it."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).rglob("libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    return pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")


def compiled(code: str, *options: str) -> str:
    """The compiler's log. Raises AssertionError with it if the text does not compile."""
    lib, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None) == 0
    given = [option.encode() for option in (*OPTIONS, *options)]
    status = lib.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log.value.decode()
    return log.value.decode()
