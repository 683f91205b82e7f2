"""Every CUDA source compiles with all its variants, by NVRTC, for sm_80 and sm_90: no GPU is needed."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

import pytest
from nvrtc import compiled

import meshtape.runtime.cuda
from meshtape.runtime.cuda.source import SOURCES, Source, text

for found in pkgutil.walk_packages(meshtape.runtime.cuda.__path__, "meshtape.runtime.cuda."):
    importlib.import_module(found.name)

VARIANTS = [pytest.param(source, macros, id="-".join((source.name, *map(str, macros.values()))))
            for source in SOURCES.values() for macros in source.variants]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "macros"), VARIANTS)
def test_source_compiles_for_the_device_and_keeps_its_variables_in_registers(
        source: Source, macros: Any, arch: str) -> None:
    log = compiled(text(source, macros), f"--gpu-architecture={arch}", "--ptxas-options=-v")
    functions = re.findall(r"Compiling entry function '(\w+)'", log)
    assert sorted(functions) == sorted(source.functions), log
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(functions), log
    # For sm_90 ptxas saves a few registers around slow paths (of division, sqrt, exp), however few are used.
    assert all(int(stores) <= 64 and int(loads) <= 64 for _, stores, loads in spills), log


def test_a_wrong_source_is_refused_with_the_compilers_words() -> None:
    with pytest.raises(AssertionError, match="undefined"):
        compiled('extern "C" __global__ void f(float* x) { x[0] = undeclared; }', "--gpu-architecture=sm_80")
