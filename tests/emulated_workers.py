"""A pytest plugin: workers inside the tests' process compute on a device instead of with NumPy.

    PYTHONPATH=tests pytest -p emulated_workers tests/front tests/acceptance                  emulated
    PYTHONPATH=tests pytest -p emulated_workers --workers-on gpu tests/front tests/acceptance real, GPU 0

That is one worker in the calling thread, and threads, which all share the device. Ray workers and programs
that a test starts are as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meshtape.cluster.local import InlineMesh, ThreadMesh

# What a device does otherwise, by the end of a test's name without its parameters.
OTHERWISE: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers-on", choices=("emulated", "gpu"), default="emulated",
                     help="the device of workers inside the tests' process")


def pytest_configure(config: pytest.Config) -> None:
    """Meshes made without a device get one from here on."""
    device = Devices(config.getoption("--workers-on"))
    given(InlineMesh, device.of_this_thread)
    given(ThreadMesh, device.of_this_thread, gpus=1)


def given(mesh: Any, open_device: Callable[[int], Any], **options: Any) -> None:
    """`mesh` opens devices so, unless it is told another way."""
    begin = mesh.__init__

    def init(self: Any, *args: Any, **named: Any) -> None:
        told = named.get("open_device") is not None
        begin(self, *args, **named if told else {**named, "open_device": open_device, **options})

    mesh.__init__ = init


class Devices:
    """One device for each thread, kept while the thread lives."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._local = threading.local()

    def of_this_thread(self, number: int) -> Any:
        if not hasattr(self._local, "device"):
            self._local.device = self._open()
        return self._local.device

    def _open(self) -> Any:
        if self.kind == "gpu":
            from meshtape.runtime.gpu import open_device
            return open_device(0)
        import emulator
        return emulator.device()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.nodeid.split("[")[0]
        for end, reason in OTHERWISE.items():
            if name.endswith(end):
                item.add_marker(pytest.mark.skip(reason=f"on a device: {reason}"))


@pytest.fixture(autouse=True)
def checked_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels of the test wrote where they may."""
    yield
    if request.config.getoption("--workers-on") == "emulated":
        import emulator
        emulator.check()
