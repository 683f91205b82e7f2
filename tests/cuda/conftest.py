"""The fixture `device`: tests that take it run on the emulated device, and on a real one if there is."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("cupy") is None:
    # Without CuPy, which the emulation asks for signatures, only test_emulator.py is collected: it says why.
    collect_ignore_glob = sorted({path.name for path in Path(__file__).parent.glob("test_*.py")}
                                 - {"test_emulator.py", "test_without_gpu.py"})


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A runtime.cuda.device.Device, active in this thread. Writes outside of allocations fail the test."""
    if request.param == "cuda":
        from meshtape.runtime.gpu import gpu_here
        name, reason = gpu_here()
        if not name:
            pytest.skip(f"no GPU: {reason}")
        from meshtape.runtime.cuda.device import Device
        from meshtape.runtime.cuda.libraries import load
        real = Device(load())
        with real.active():
            yield real
        return
    import emulator
    emulated = emulator.device()
    with emulated.active():
        yield emulated
    emulator.check()
