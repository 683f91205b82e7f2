"""Memory of a GPU worker: a limit, one more try after giving back what is unused, and an error that helps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import meshtape as mt
from meshtape.cluster.local import InlineMesh
from meshtape.runtime.collectives.threads import ThreadGroup
from meshtape.runtime.errors import WorkerError
from meshtape.runtime.worker import Worker
from meshtape.scheduler import current
from meshtape.scheduler.session import Session

MIB = 1 << 20
LIMIT = 9 * MIB


@pytest.fixture
def worker(opens: Any) -> Iterator[Any]:
    """A worker that may use 9 MiB of the device, beside the workspace of cuBLAS, as the current mesh."""
    mt.shutdown()
    free = opens()
    fraction = (LIMIT + free.held()) / free.cp.cuda.runtime.memGetInfo()[1]
    free.close()
    device = opens(memory_fraction=fraction)
    made = Worker(0, (1,), [ThreadGroup(1).communicator(0)], device)
    current.use(Session(InlineMesh(worker=lambda *args: made)))
    yield made
    mt.shutdown()
    device.close()


def test_an_error_names_the_op_and_the_largest_tensors(worker: Any) -> None:
    big = mt.ones((MIB,), dtype=mt.float32)
    small = mt.ones((MIB // 8,), dtype=mt.float32)
    mt.synchronize()
    with pytest.raises(WorkerError) as caught:
        mt.concat([big, big]).numpy()
    text = str(caught.value)
    assert "no memory for its result (float32 (2097152,))" in text
    assert "float32 (1048576,) 4.0 MiB, float32 (131072,) 0.5 MiB" in text
    assert f"may use {worker.device.limit / MIB:.0f}" in text and "smaller batch" in text
    np.testing.assert_array_equal(small.numpy(), 1)         # the session goes on
    del big, small
    np.testing.assert_array_equal((mt.ones((MIB,), dtype=mt.float32) + 0).numpy(), 1)


def test_memory_that_is_free_but_held_is_given_back_before_giving_up(worker: Any) -> None:
    for size in (MIB // 16, MIB // 8, MIB // 4, MIB // 2, MIB):     # none fits where one before it was
        t = mt.ones((size,), dtype=mt.float32)
        mt.synchronize()
        del t
    assert worker.device.pool.free_bytes() > 3 * MIB            # the largest goes with the next batch
    np.testing.assert_array_equal(mt.ones((MIB + MIB // 2,), dtype=mt.float32).numpy(), 1)


def test_a_program_that_is_repeated_recovers_as_well(worker: Any) -> None:
    """The generated function stops at a step without memory, and the rest of the batch is still done."""
    x = mt.ones((MIB,), dtype=mt.float32)
    for n in (1, 1, 1, 1):
        y, z = mt.flip(x) * n, x.sum()
        mt.flush()
        del y
        assert z.item() == MIB
    held = mt.ones((MIB // 2,), dtype=mt.float32)
    mt.flush()
    y, z = mt.flip(x) * n, x.sum()
    mt.flush()
    with pytest.raises(WorkerError, match="no memory"):
        y.numpy()
    del y, held
    assert z.item() == MIB


def test_the_fraction_is_checked() -> None:
    for wrong in (0, -0.5, 1.5, "half", True):
        with pytest.raises(mt.MeshError, match="memory_fraction"):
            mt.init(memory_fraction=wrong)


def test_stats_tell_the_devices_memory(worker: Any) -> None:
    kept = mt.ones((MIB // 4,), dtype=mt.float32)
    mt.synchronize()
    assert MIB <= mt.stats()["peak_memory"][0] <= worker.device.limit
    del kept


def test_graphs_are_given_up_when_memory_is_short(worker: Any) -> None:
    x = mt.ones((MIB // 2,), dtype=mt.float32)
    for _ in range(4):
        y = (mt.flip(x) * 3 + mt.roll(x, 1)).sum()
        value = y.item()
        del y
    assert mt.stats()["graphs"][0]["captured"] == 1
    held = mt.ones((3 * MIB // 2,), dtype=mt.float32)
    assert held.sum().item() == 3 * MIB // 2
    assert mt.stats()["graphs"][0]["captured"] == 0
    del held
    y = (mt.flip(x) * 3 + mt.roll(x, 1)).sum()
    assert y.item() == value


def test_a_pool_that_is_given_up_stays_until_its_last_array_has_gone(device: Any) -> None:
    pool = device.new_graph_pool()
    with device.cp.cuda.using_allocator(pool.malloc):
        kept = device.cp.zeros(1024, np.uint8)
    before = device.held()
    device.retire(pool)
    assert device.held() == before
    del kept
    device.give_back()
    assert device.held() <= before - 1024 and pool.total_bytes() == 0


def test_a_graphs_pool_gives_nothing_back_where_memory_is_short(worker: Any) -> None:
    """Else kernels that were recorded before would write to memory that is somebody else's."""
    device = worker.device
    with device.active():
        pool = device.new_graph_pool()
        with device.cp.cuda.using_allocator(pool.malloc):
            first = device.cp.zeros(4 * MIB, np.uint8)
            address = first.data.ptr
            del first
            with pytest.raises(device.cp.cuda.memory.OutOfMemoryError):
                device.cp.zeros(device.limit - device.held() + MIB, np.uint8)
            assert device.cp.zeros(4 * MIB, np.uint8).data.ptr == address
        device.retire(pool)


def test_a_graphs_pool_says_so_where_the_device_has_no_memory(device: Any) -> None:
    with device.cp.cuda.using_allocator(device.new_graph_pool().malloc):
        kept = device.cp.zeros(MIB, np.uint8)
        with pytest.raises(device.cp.cuda.memory.OutOfMemoryError):
            device.cp.zeros(1 << 44, np.uint8)
        assert kept.sum() == 0
