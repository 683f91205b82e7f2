"""Every CUDA source compiles with all its variants, by NVRTC, for sm_80 and sm_90: no GPU is needed."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import meshtape.runtime.cuda
from meshtape.runtime.cuda.source import OPTIONS, SOURCES, Source, text

for found in pkgutil.walk_packages(meshtape.runtime.cuda.__path__, "meshtape.runtime.cuda."):
    importlib.import_module(found.name)

VARIANTS = [pytest.param(source, macros, id="-".join((source.name, *map(str, macros.values()))))
            for source in SOURCES.values() for macros in source.variants]


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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "macros"), VARIANTS)
def test_source_compiles_for_the_device_and_keeps_its_variables_in_registers(
        source: Source, macros: Any, arch: str) -> None:
    log = compiled(text(source, macros), f"--gpu-architecture={arch}", "--ptxas-options=-v")
    functions = re.findall(r"Compiling entry function '(\w+)'", log)
    assert sorted(functions) == sorted(source.functions), log
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(functions), log
    # On sm_90 ptxas saves a few registers around exp of float64, however few are used.
    most = 64 if "double" in macros.values() else 0
    assert all(int(stores) <= most and int(loads) <= most for _, stores, loads in spills), log


def test_a_wrong_source_is_refused_with_the_compilers_words() -> None:
    with pytest.raises(AssertionError, match="undefined"):
        compiled('extern "C" __global__ void f(float* x) { x[0] = undeclared; }', "--gpu-architecture=sm_80")
