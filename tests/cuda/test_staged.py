"""Collectives of device arrays by way of the host."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import collective_cases as cases
from device_ranks import ByHost, on_devices, succeed

from meshtape.runtime.collectives.staged import StagedCommunicator
from meshtape.runtime.errors import CommAborted, CommError


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_mixed_collectives_in_a_row_give_exact_results(size: int, opens: Any) -> None:
    programme = [cases.random_case(seed, size, 3000) for seed in range(250)]

    def body(comm: Any) -> None:
        for case in programme:
            if size > 1 or case.verb != "send":
                cases.run(ByHost(comm), case)

    succeed(size, StagedCommunicator, body, opens)


def test_ranks_in_different_calls_get_an_error(opens: Any) -> None:
    def body(comm: Any) -> None:
        comm.all_reduce(comm.device.cp.ones(3 + comm.rank, "float32"))

    for result in on_devices(2, StagedCommunicator, body, opens=opens):
        assert isinstance(result, CommError)
        assert "different collectives" in str(result) or "a test failed" in str(result)


def test_an_abort_reaches_the_others_and_their_next_call(opens: Any) -> None:
    def body(comm: Any) -> Any:
        if comm.rank == 1:
            comm.abort("enough")
            return None
        with pytest.raises(CommAborted, match="enough"):
            comm.all_reduce(comm.device.cp.ones(3, "float32"))
        with pytest.raises(CommAborted, match="enough"):
            comm.check()
        return "done"

    assert on_devices(2, StagedCommunicator, body, opens=opens)[0] == "done"


def test_a_verb_waits_for_its_stream_once_and_copies_no_more_than_it_must(opens: Any) -> None:
    def body(comm: Any) -> Any:
        cp = comm.device.cp
        xs = [cp.ones(n, "float32") for n in (3, 40, 500)]
        comm.all_reduce_many(xs)
        room = comm._given._bytes
        comm.all_reduce_many(xs)
        assert comm._given._bytes is room
        return [x.get()[0] for x in xs]

    assert succeed(2, StagedCommunicator, body, opens) == [[4.0] * 3] * 2


def test_it_says_that_it_cannot_be_recorded_and_what_it_stands_on(opens: Any) -> None:
    def body(comm: Any) -> Any:
        assert not comm.capturable
        x = comm.device.cp.ones(3, "float32")
        comm.device.stream.begin_capture()
        with pytest.raises(RuntimeError):
            comm.all_reduce(x)
        with pytest.raises(RuntimeError):
            comm.device.stream.end_capture()
        return comm.kind

    assert "staged+threads" in on_devices(2, StagedCommunicator, body, opens=opens)


def test_results_on_the_device_stay_when_the_pinned_memory_is_used_again(opens: Any) -> None:
    def body(comm: Any) -> Any:
        cp = comm.device.cp
        a = comm.all_reduce(cp.ones(10, "float32"))
        comm.all_gather(cp.zeros(10, "float32"), [10, 10])
        return float(a.get().sum())

    assert succeed(2, StagedCommunicator, body, opens) == [20.0, 20.0]
