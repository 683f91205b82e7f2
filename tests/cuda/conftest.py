"""The fixture `device`: every test that takes it runs on the emulated device, and on a real one if there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("cupy", reason="the emulation asks the installed CuPy for its signatures")


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
