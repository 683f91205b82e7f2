"""Compiling by NVRTC, with a cache on disk; without a GPU nothing can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshtape.runtime.cuda import nvrtc
from meshtape.runtime.cuda.source import OPTIONS

pytest.importorskip("cupy", reason="CuPy's binding of NVRTC is used")
PRODUCT = 'extern "C" __global__ void f(float* x) { x[0] = x[1] * x[2]; }'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_machine_code_is_compiled_once_and_found_on_disk_then(folder: Path) -> None:
    made = nvrtc.cubin(PRODUCT, OPTIONS, 90)
    assert made.startswith(b"\x7fELF")
    file, = folder.iterdir()
    file.write_bytes(b"what is on disk")
    assert nvrtc.cubin(PRODUCT, OPTIONS, 90) == b"what is on disk"
    assert nvrtc.cubin(PRODUCT, OPTIONS, 80) != made
    assert len(list(folder.iterdir())) == 2


def test_a_device_that_nvrtc_does_not_know_gets_text_that_its_driver_compiles(folder: Path) -> None:
    made = nvrtc.cubin(PRODUCT, OPTIONS, 999).decode()
    assert ".target sm_" in made
    assert "mul.f32" in made                # and not mul.ftz.f32: small numbers stay


def test_a_wrong_source_is_refused_with_the_compilers_words(folder: Path) -> None:
    with pytest.raises(nvrtc.CompileError, match="undeclared"):
        nvrtc.cubin("void f() { undeclared = 1; }", OPTIONS, 90)
    assert not folder.exists()
