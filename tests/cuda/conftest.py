"""Tests of device code run on the emulated device, and on a real GPU, marked `gpu`, where there is one.

device    a Device, active in this thread
opens     opens(number=0, memory_fraction=None) makes a Device for the calling thread, as meshes ask for one

What takes neither is about the emulation, or needs no device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from meshtape.runtime.gpu import gpu_here, open_device

pytest.importorskip("cupy", reason="the emulation asks the installed CuPy for its signatures")
BOTH = ("emulated", pytest.param("cuda", marks=pytest.mark.gpu))


def one_by_one(device: Any) -> Any:
    """Inside, if MESHTAPE_EXACT_MEMORY is set, arrays are no parts of a pool's blocks: compute-sanitizer then
    sees where each of them ends.
    """
    return device.cp.cuda.using_allocator(None) if os.environ.get("MESHTAPE_EXACT_MEMORY") else nullcontext()


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The first GPU, for all tests of a module; they are skipped where there is none."""
    name, reason = gpu_here()
    if not name:
        pytest.skip(f"no GPU: {reason}")
    made = open_device()
    yield made
    made.close()


@pytest.fixture(params=BOTH)
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A runtime.cuda.device.Device, active in this thread. Writes outside of allocations fail the test."""
    if request.param == "cuda":
        real = request.getfixturevalue("gpu")
        with real.active(), one_by_one(real):
            yield real
        if real.stream.is_capturing():          # the test failed in the middle of a capture
            real.stream.end_capture()
        real.synchronize()
        return
    import emulator
    emulated = emulator.device()
    with emulated.active():
        yield emulated
    emulator.check()


@pytest.fixture(params=BOTH)
def opens(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes devices; whoever asks for one closes it."""
    if request.param == "cuda":
        name, reason = gpu_here()
        if not name:
            pytest.skip(f"no GPU: {reason}")
        yield lambda number=0, memory_fraction=None: open_device(0, memory_fraction)
        return
    import emulator
    yield lambda number=0, memory_fraction=None: emulator.device(memory_fraction=memory_fraction)
    emulator.check()
