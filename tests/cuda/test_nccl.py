"""Collectives by NCCL, on an emulation of it between threads."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import collective_cases as cases
from device_ranks import ByHost, on_devices, succeed
from emulator import nccl as emulated

from meshtape.runtime.collectives import nccl
from meshtape.runtime.collectives.device import OneDevice
from meshtape.runtime.collectives.nccl import NcclCommunicator
from meshtape.runtime.errors import CommAborted, CommError, CommTimeout, PeerLost, ShapeError


@pytest.mark.parametrize("size", [2, 3, 4])
def test_mixed_collectives_in_a_row_give_exact_results(size: int) -> None:
    programme = [cases.random_case(seed, size, 3000) for seed in range(250)]

    def body(comm: Any) -> None:
        for case in programme:
            cases.run(ByHost(comm), case)

    succeed(size, NcclCommunicator, body)


@pytest.mark.parametrize("verb", ["all_reduce", "all_reduce_many", "reduce_scatter", "reduce_scatter_many"])
@pytest.mark.parametrize("whole", [0, 1 << 40])
def test_every_reduction_of_every_dtype(verb: str, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of it NCCL has; what is reduced here, at once and by shares."""
    monkeypatch.setattr(nccl, "WHOLE_BYTES", whole)
    programme = [cases.Case(verb, 3, dtype, op, ((5, 0, 17), (5, 0, 17), (5, 0, 17)), 0, False, seed)
                 for seed, (dtype, op) in enumerate((d, o) for d in cases.DTYPES for o in cases.OPS)]

    def body(comm: Any) -> None:
        for case in programme:
            cases.run(ByHost(comm), case)

    succeed(3, NcclCommunicator, body)


def test_maxima_keep_nans() -> None:
    def body(comm: Any) -> Any:
        x = comm.device.cp.empty(4, "float32")
        x.set(np.array([np.nan if comm.rank == 1 else 1, 2, comm.rank, -1], np.float32))
        return comm.all_reduce(x, "max").get()

    for got in succeed(2, NcclCommunicator, body):
        assert np.isnan(got[0]) and got[1:].tolist() == [2, 1, -1]


def test_equal_parts_take_one_native_call_each_and_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    spy(monkeypatch, made)

    def body(comm: Any) -> None:
        cp = comm.device.cp
        x, y = cp.ones((4, 3), "float32"), cp.ones(8, "float32")
        made.clear()
        comm.barrier()
        parts = comm.reduce_scatter_many([x, y], [0, 0])
        comm.all_gather_many(parts, [0, 0], [(4, 3), (8,)])
        comm.all_reduce_many([x, y])

    succeed(2, NcclCommunicator, body)
    assert sorted(made) == sorted(2 * ["group", "reduceScatter", "reduceScatter", "group", "allGather",
                                       "allGather", "group", "allReduce", "allReduce"])


def spy(monkeypatch: pytest.MonkeyPatch, made: list[Any]) -> None:
    """Note the calls of NCCL, and copies between arrays as "pack"."""
    call, start = emulated.NcclCommunicator._call, emulated.groupStart
    monkeypatch.setattr(emulated.NcclCommunicator, "_call",
                        lambda self, verb, *a, **k: (made.append(verb), call(self, verb, *a, **k)))
    monkeypatch.setattr(emulated, "groupStart", lambda: (made.append("group"), start()))
    for name in ("pack", "unpack"):
        monkeypatch.setattr(nccl, name, lambda *args: made.append("copy"))


def test_verbs_are_recorded_in_a_graph_and_replayed() -> None:
    def body(comm: Any) -> Any:
        cp = comm.device.cp
        x, y = cp.zeros((3, 4), "float32"), cp.zeros((5, 2), "float32")
        stream, pool = comm.device.stream, cp.cuda.MemoryPool()
        stream.begin_capture()
        with cp.cuda.using_allocator(pool.malloc):
            total = comm.all_reduce_many([x], out=[cp.empty_like(x)])
            part = comm.reduce_scatter_many([x], [1])
            whole = comm.all_gather_many(part, [1], [(3, 4)])
            largest = comm.all_reduce(y, "max", out=cp.empty_like(y))
        graph = stream.end_capture()
        got = []
        for k in range(3):
            x[...] = float(k + comm.rank)
            y[...] = float(k - comm.rank)
            graph.launch(stream)
            comm.launched(4, 0)
            stream.synchronize()
            comm.check()
            got.append((total[0].get().max(), whole[0].get().min(), largest.get().max()))
        return got

    for got in succeed(2, NcclCommunicator, body):
        assert got == [(2 * k + 1, 2 * k + 1, k) for k in range(3)]


def test_a_call_that_only_some_ranks_record_is_noticed_by_the_emulation() -> None:
    """NCCL requires that ranks record the same calls; they can agree on it."""
    def body(comm: Any) -> Any:
        x, stream = comm.device.cp.ones(3, "float32"), comm.device.stream
        assert comm.agree(2 - comm.rank) == 1
        if comm.rank == 0:
            comm.all_reduce(x)
        else:
            stream.begin_capture()
            comm.all_reduce(x)
            stream.end_capture().launch(stream)

    results = on_devices(2, NcclCommunicator, body)
    assert any(isinstance(r, AssertionError) and "different calls" in str(r) for r in results)


def test_ranks_in_different_calls_are_noticed_by_the_emulation() -> None:
    def body(comm: Any) -> None:
        comm.all_reduce(comm.device.cp.ones(3 + comm.rank, "float32"))

    results = on_devices(2, NcclCommunicator, body)
    assert any(isinstance(r, AssertionError) and "different calls" in str(r) for r in results)


def test_a_rank_that_does_not_come_is_a_timeout_and_its_later_calls_fail() -> None:
    away = threading.Event()

    def body(comm: Any) -> Any:
        comm._watch._timeout = 0.3
        x = comm.device.cp.ones(3, "float32")
        if comm.rank == 0:
            try:
                comm.all_reduce(x)              # the emulation waits in here, a device would later
                comm.check()
            finally:
                away.set()
            return None
        away.wait(10)
        time.sleep(0.3)
        return comm.all_reduce(x)

    first, second = on_devices(2, NcclCommunicator, body)
    assert type(first) is CommTimeout
    assert "all_reduce sum of 3 float32 made no progress for 0.3 s" in str(first)
    assert type(second) is CommAborted and "no progress" in str(second)


def test_an_abort_ends_collectives_everywhere_within_a_second() -> None:
    begun: list[float] = []

    def body(comm: Any) -> Any:
        if comm.rank == 1:
            time.sleep(0.3)
            begun.append(time.monotonic())
            comm.abort("enough")
            return None
        comm.all_reduce(comm.device.cp.ones(3, "float32"))
        taken = time.monotonic() - begun[0]
        with pytest.raises(CommAborted, match="enough"):
            comm.check()
        with pytest.raises(CommAborted, match="enough"):
            comm.all_reduce(comm.device.cp.ones(3, "float32"))
        return taken

    taken = on_devices(2, NcclCommunicator, body)[0]
    assert taken < 1


def test_a_peer_that_leaves_is_lost_to_those_who_need_it() -> None:
    def body(comm: Any) -> Any:
        if comm.rank == 1:
            comm.close()
            return None
        comm.all_reduce(comm.device.cp.ones(3, "float32"))
        comm.check()
        return None

    assert type(on_devices(2, NcclCommunicator, body)[0]) is PeerLost


def test_an_asynchronous_error_ends_what_is_under_way() -> None:
    def body(comm: Any) -> Any:
        if comm.rank == 0:
            emulated.fail(comm._comm)
        comm.all_reduce(comm.device.cp.ones(3, "float32"))
        comm.check()
        return "no error"

    results = on_devices(2, NcclCommunicator, body)
    assert type(results[0]) is CommError and "NCCL failed" in str(results[0])


def test_wrong_arguments_raise_before_anything_is_sent() -> None:
    def body(comm: Any) -> None:
        cp = comm.device.cp
        with pytest.raises(Exception, match="needs a"):
            comm.all_reduce(np.ones(3, np.float32))
        with pytest.raises(ShapeError, match="not C-contiguous"):
            comm.all_reduce(cp.ones((2, 3), "float32").T)
        with pytest.raises(ShapeError, match="does not fit counts"):
            comm.all_gather(cp.ones(3, "float32"), [1, 1])
        with pytest.raises(ShapeError, match="out overlaps x"):
            x = cp.ones(4, "float32")
            comm.all_to_all(x, [2, 2], [2, 2], out=x)
        comm.all_reduce(cp.ones(3, "float32"))

    succeed(2, NcclCommunicator, body)


def test_calls_and_bytes_sent_are_counted() -> None:
    def body(comm: Any) -> Any:
        cp = comm.device.cp
        x = cp.ones((3, 4), "float32")
        comm.all_reduce(x)
        part, = comm.reduce_scatter_many([x], [1])
        comm.all_gather_many([part], [1], [(3, 4)])
        return comm.calls, comm.bytes_sent

    assert succeed(2, NcclCommunicator, body) == [(3, 48 + 24 + 24)] * 2


def test_a_group_of_one_copies(device: Any) -> None:
    comm = OneDevice(device)
    x = device.cp.arange(4)
    for got in (comm.all_reduce(x), comm.reduce_scatter(x, [4]), comm.all_gather(x, [4]),
                comm.all_to_all(x, [4], [4]), comm.broadcast(x, 0)):
        assert got.get().tolist() == [0, 1, 2, 3] and got.data.ptr != x.data.ptr
