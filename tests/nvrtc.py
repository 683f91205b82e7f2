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
            for part in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(part))      # which NVRTC looks for by name
            return ctypes.CDLL(str(path))
    return pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")


def compiled(code: str, *options: str) -> str:
    """The compiler's log. Raises AssertionError with it if the text does not compile."""
    return _run(code, "Log", *options)


def ptx(code: str, *options: str) -> str:
    """What the text becomes, for a virtual architecture. Raises AssertionError if it does not compile."""
    return _run(code, "PTX", *options)


def _run(code: str, wanted: str, *options: str) -> str:
    lib, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None) == 0
    given = [option.encode() for option in (*OPTIONS, *options)]
    status = lib.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    found = {}
    for name, what in (("Log", "ProgramLog"), ("PTX", "PTX")):
        getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        found[name] = ctypes.create_string_buffer(size.value)
        getattr(lib, f"nvrtcGet{what}")(program, found[name])
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, found["Log"].value.decode()
    return found[wanted].value.decode()
