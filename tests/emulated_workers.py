"""A pytest plugin: workers inside the tests' process compute on a device instead of with NumPy.

    PYTHONPATH=tests pytest -p emulated_workers tests/front tests/acceptance                  emulated
    PYTHONPATH=tests pytest -p emulated_workers --workers-on gpu tests/front tests/acceptance real, GPU 0

That is one worker in the calling thread, and threads. Ray workers, and programs that a test starts, are as
they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meshtape.cluster.local import InlineMesh, ThreadMesh
from meshtape.runtime.gpu import gpu_here, open_device

# What a device does otherwise, by a part of a test's full name.
_UNREPORTED = "indices out of range are not reported, as that would mean to wait for the device"
OTHERWISE = {
    "test_a_class_out_of_range_is_reported": _UNREPORTED,
    "test_what_only_a_worker_can_see_raises_at_the_next_wait": _UNREPORTED,
    "test_a_spoiled_gradient_spoils_the_model": _UNREPORTED,
    "test_one_bad_batch_in_a_steady_loop": _UNREPORTED,
    "test_spoiled_values_that_are_let_go": _UNREPORTED,
    "test_a_failing_kernel_is_named_and_training_goes_on": _UNREPORTED,
    "test_an_error_of_a_worker_names_the_line_of_step": "a division by zero among numbers is no error",
    "test_a_profile_shows_driver_and_workers_on_one_clock": "spans name a chain's ops together",
    "test_a_timeline_shows_collectives_beside_kernels": "collectives through the host run by themselves",
    "test_an_op_by_op_loop_with_neither_fetch_nor_step": "a batch holds 16384 operations",
    "test_a_step_of_more_operations_than_a_batch_holds": "a batch holds 16384 operations",
    "test_stats_count": "peak_memory is the device's, not the process's",
    "test_visualize_names_every_slice_and_its_holders": "holders have other names",
    "front/test_dlpack.py": "it is about hosts' memory; its cases on devices open them themselves",
}
# What would take the emulation minutes.
LONG = {"acceptance/test_long_graphs.py": "too many operations for the emulation"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers-on", choices=tuple(OPEN), default="emulated",
                     help="the device of workers inside the tests' process")


def pytest_configure(config: pytest.Config) -> None:
    """Meshes made without a device get one from here on."""
    opens = OPEN[config.getoption("--workers-on")]
    given(InlineMesh, opens)
    given(ThreadMesh, opens, gpus=1)


def given(mesh: Any, opens: Callable[[int], Any], **options: Any) -> None:
    """`mesh` opens devices so, unless it is told another way."""
    begin = mesh.__init__

    def init(self: Any, *args: Any, **named: Any) -> None:
        told = named.get("open_device") is not None
        begin(self, *args, **named if told else {**named, "open_device": opens, **options})

    mesh.__init__ = init


def emulated(number: int) -> Any:
    import emulator
    return emulator.device()


OPEN = {"emulated": emulated, "gpu": open_device}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    real = config.getoption("--workers-on") == "gpu"
    lacking = gpu_here()[1] if real else ""
    left_out = OTHERWISE if real else {**OTHERWISE, **LONG}
    for item in items:
        if lacking:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {lacking}"))
        for part, reason in left_out.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"on a device: {reason}"))


@pytest.fixture(autouse=True)
def checked_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels of the test wrote where they may."""
    yield
    if request.config.getoption("--workers-on") == "emulated":
        import emulator
        emulator.check()
