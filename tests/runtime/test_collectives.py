"""Collectives between threads, and what holds for every communicator before anything is sent."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshtape.runtime.collectives.call import describe, encode
from meshtape.runtime.collectives.host import SelfCommunicator
from meshtape.runtime.collectives.reduction import BLOCK, reduce_into
from meshtape.runtime.collectives.threads import LEND_ABOVE, ThreadGroup
from meshtape.runtime.errors import (
    CommAborted,
    CommError,
    CommTimeout,
    DTypeError,
    PeerLost,
    ShapeError,
)

sys.path.insert(0, str(Path(__file__).parent))
import collective_cases as cases


def on_threads(size: int, body: Callable[[Any], Any], timeout: float = 20.0) -> list[Any]:
    """body(communicator) on one thread per rank: what each returned, or the exception it raised."""
    group = ThreadGroup(size, timeout)
    results: list[Any] = [None] * size

    def target(rank: int) -> None:
        comm = group.communicator(rank)
        try:
            results[rank] = body(comm)
        except Exception as error:
            results[rank] = error
            if isinstance(error, AssertionError):
                comm.abort("a test failed")

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def succeed(size: int, body: Callable[[Any], Any]) -> list[Any]:
    results = on_threads(size, body)
    failed = [result for result in results if isinstance(result, Exception)]
    for error in sorted(failed, key=lambda error: isinstance(error, CommError)):
        raise error
    return results


@st.composite
def any_case(draw: st.DrawFn) -> cases.Case:
    size = draw(st.integers(1, 4))
    chunk = st.one_of(st.just(0), st.integers(1, 9), st.integers(LEND_ABOVE // 16, LEND_ABOVE))
    counts = draw(st.lists(st.lists(chunk, min_size=size, max_size=size), min_size=size, max_size=size))
    verbs = cases.VERBS if size > 1 else [v for v in cases.VERBS if v != "send"]
    return cases.Case(draw(st.sampled_from(verbs)), size, draw(st.sampled_from(cases.DTYPES)),
                      draw(st.sampled_from(cases.OPS)), tuple(map(tuple, counts)),
                      draw(st.integers(0, size - 1)), draw(st.booleans()), draw(st.integers(0, 2**31)))


@settings(max_examples=150, deadline=None)
@given(any_case())
def test_every_collective_gives_the_exact_result(case: cases.Case) -> None:
    succeed(case.size, lambda comm: cases.run(comm, case))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_thousand_mixed_collectives_in_a_row(size: int) -> None:
    programme = [cases.random_case(seed, size, 3000) for seed in range(1000)]

    def body(comm: Any) -> None:
        for case in programme:
            cases.run(comm, case)

    succeed(size, body)


@pytest.mark.parametrize("count", [4, LEND_ABOVE])
def test_a_result_is_not_changed_by_what_follows(count: int) -> None:
    def body(comm: Any) -> None:
        x = np.ones(count, np.float32)
        first = comm.all_reduce(x)
        x[:] = 7
        for _ in range(3):
            comm.all_reduce(x)
        assert (first == 2).all() and not np.may_share_memory(first, x)

    succeed(2, body)


@settings(max_examples=60, deadline=None)
@given(n=st.sampled_from([0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]), parts=st.integers(1, 5),
       dtype=st.sampled_from(cases.DTYPES), op=st.sampled_from(cases.OPS), into=st.integers(-1, 4),
       seed=st.integers(0, 1000))
def test_reductions_do_not_depend_on_where_the_result_goes(n: int, parts: int, dtype: Any, op: str, into: int,
                                                           seed: int) -> None:
    case = cases.Case("all_reduce", parts, dtype, op, (), 0, False, seed)
    arrays = [cases.values(case, r, n) for r in range(parts)]
    want = cases.reduced(arrays, op)
    out = arrays[into] if 0 <= into < parts else np.empty_like(want)
    reduce_into(out, arrays, op)
    assert out.tobytes() == want.tobytes()


def test_sixteen_bit_sums_accumulate_in_float32() -> None:
    """1 + 2**-11 three times: each addition alone would round back to 1."""
    addends = [1.0, 2.0**-11, 2.0**-11, 2.0**-11]
    got = succeed(4, lambda comm: comm.all_reduce(np.array([addends[comm.rank]], np.float16)))
    assert all(g[0] == np.float16(1 + 3 * 2.0**-11) > 1 for g in got)


def test_overflow_is_a_result_not_a_warning() -> None:
    with np.errstate(all="raise"):
        got = succeed(2, lambda comm: comm.all_reduce(np.array([60000], np.float16)))
    assert all(np.isinf(g[0]) for g in got)


def test_a_missing_rank_ends_in_a_timeout_that_names_it() -> None:
    def body(comm: Any) -> None:
        if comm.rank != 1:
            comm.all_reduce(np.ones(3))

    start = time.monotonic()
    first, _, third = on_threads(3, body, timeout=0.3)
    assert 0.25 < time.monotonic() - start < 2
    for error in (first, third):
        assert type(error) is CommTimeout
        assert "all_reduce sum of 3 float64" in str(error) and "[1]" in str(error)


def test_who_comes_after_a_timeout_is_told_at_once() -> None:
    def body(comm: Any) -> None:
        if comm.rank == 1:
            time.sleep(0.5)
        comm.barrier()

    start = time.monotonic()
    first, second = on_threads(2, body, timeout=0.2)
    assert type(first) is CommTimeout and type(second) is CommAborted and "waited 0.2 s" in str(second)
    assert time.monotonic() - start < 1.5


def test_abort_reaches_those_who_wait_and_those_who_come_later() -> None:
    def body(comm: Any) -> None:
        if comm.rank == 0:
            time.sleep(0.1)
            comm.abort("the step failed")
        if comm.rank == 2:
            time.sleep(0.3)
            comm.recv(np.empty(1), 1)
        comm.barrier()

    start = time.monotonic()
    for error in on_threads(3, body):
        assert type(error) is CommAborted and str(error) == "the step failed"
    assert time.monotonic() - start < 1.5


def test_a_rank_that_closes_is_lost_to_those_who_need_it() -> None:
    def body(comm: Any) -> None:
        comm.barrier()
        if comm.rank == 1:
            comm.close()
            comm.close()
        comm.barrier()

    first, second = on_threads(2, body)
    assert type(first) is PeerLost and "rank 1" in str(first)
    assert isinstance(second, CommError) and "closed" in str(second)


def test_what_was_sent_before_closing_still_arrives() -> None:
    def body(comm: Any) -> Any:
        if comm.rank == 0:
            comm.send(np.arange(3), 1)
            comm.close()
            return None
        time.sleep(0.1)
        return comm.recv(np.empty(3, int), 0)

    assert succeed(2, body)[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("second", "named"), [
    (lambda comm: comm.barrier(), "barrier"),
    (lambda comm: comm.all_reduce(np.ones(4, np.float32)), "all_reduce sum of 4 float32"),
    (lambda comm: comm.all_reduce(np.ones(3, np.float64)), "all_reduce sum of 3 float64"),
    (lambda comm: comm.all_reduce(np.ones(3, np.float32), "max"), "all_reduce max of 3 float32"),
    (lambda comm: comm.all_reduce_many([np.ones(3, np.float32)]), "all_reduce_many sum of 3 float32"),
])
def test_different_calls_name_each_other(second: Callable[[Any], Any], named: str) -> None:
    def body(comm: Any) -> None:
        second(comm) if comm.rank else comm.all_reduce(np.ones(3, np.float32))

    for error in on_threads(2, body):
        assert type(error) is CommError
        assert named in str(error) and "all_reduce sum of 3 float32" in str(error)


def test_counts_that_differ_are_noticed() -> None:
    for error in on_threads(2, lambda comm: comm.reduce_scatter(
            np.ones(4), [2, 2] if comm.rank else [1, 3])):
        assert type(error) is CommError and "with other counts" in str(error)
    for error in on_threads(2, lambda comm: comm.reduce_scatter_many([np.ones((4, 4))], [comm.rank])):
        assert type(error) is CommError and "with other counts" in str(error)
    first, second = on_threads(2, lambda comm: comm.all_to_all(
        np.ones(2), [1, 1], [1, 1] if comm.rank else [1, 2]))
    assert type(first) is CommError and "rank 1 sends 1 elements to rank 0, which expects 2" in str(first)
    assert isinstance(second, np.ndarray)


def test_an_interrupted_rank_frees_the_others() -> None:
    def body(comm: Any) -> None:
        if comm.rank == 1:
            comm._all_reduce = lambda *args: 1 // 0
        comm.all_reduce(np.ones(3))

    first, second = on_threads(2, body)
    assert isinstance(second, ZeroDivisionError)
    assert type(first) is CommAborted and "rank 1 failed in all_reduce: ZeroDivisionError" in str(first)


@pytest.mark.parametrize(("error", "call"), [
    (DTypeError, lambda c: c.all_reduce([1.0])),
    (DTypeError, lambda c: c.all_reduce(np.array([object()]))),
    (ShapeError, lambda c: c.all_reduce(np.ones((4, 4)).T)),
    (ShapeError, lambda c: c.all_reduce(np.ones(3), "mean")),
    (ShapeError, lambda c: c.all_reduce(np.ones(3), out=np.ones(4))),
    (ShapeError, lambda c: c.all_reduce(np.ones(3), out=np.ones(3, np.float32))),
    (ShapeError, lambda c: c.all_reduce(np.ones(3), out=np.ones(3)[::-1])),
    (ShapeError, lambda c: c.recv(np.frombuffer(bytes(8)), 1)),
    (DTypeError, lambda c: c.all_reduce(np.ones(3, ">f4"))),
    (DTypeError, lambda c: c.all_reduce(np.ones(3, "M8[s]"))),
    (ShapeError, lambda c: c.reduce_scatter(np.ones(3), [1, 1])),
    (ShapeError, lambda c: c.reduce_scatter(np.ones(3), [4, -1])),
    (ShapeError, lambda c: c.reduce_scatter(np.ones((2, 2)), [2, 2])),
    (ShapeError, lambda c: c.all_gather(np.ones(3), [2, 2])),
    (ShapeError, lambda c: c.all_gather(np.ones(3), [3])),
    (ShapeError, lambda c: c.all_to_all(np.ones(4), [2, 2], [1, 2])),
    (ShapeError, lambda c: c.broadcast(np.ones(4), 2)),
    (ShapeError, lambda c: c.send(np.ones(4), 0)),
    (ShapeError, lambda c: c.recv(np.ones(4), 5)),
    (DTypeError, lambda c: c.all_reduce_many([])),
    (DTypeError, lambda c: c.all_reduce_many([[1.0]])),
    (DTypeError, lambda c: c.all_reduce_many([np.ones(3), np.ones(3, np.float32)])),
    (ShapeError, lambda c: c.all_reduce_many([np.ones((4, 4)).T])),
    (ShapeError, lambda c: c.all_reduce_many([np.ones(3)], "mean")),
    (ShapeError, lambda c: c.all_reduce_many([np.frombuffer(bytes(8))])),
    (ShapeError, lambda c: c.all_reduce_many([np.ones(3)], out=[])),
    (ShapeError, lambda c: c.all_reduce_many([np.ones(3)], out=[np.ones(4)])),
    (ShapeError, lambda c: c.reduce_scatter_many([np.ones(3)], [1])),
    (ShapeError, lambda c: c.reduce_scatter_many([np.ones(())], [0])),
    (ShapeError, lambda c: c.reduce_scatter_many([np.ones(3)], [0, 0])),
    (ShapeError, lambda c: c.reduce_scatter_many([np.ones(3)], [0], out=[np.ones(3)])),
    (ShapeError, lambda c: c.all_gather_many([np.ones(1)], [0], [(3,)])),
    (ShapeError, lambda c: c.all_gather_many([np.ones(2)], [0], [(3,), (2,)])),
])
def test_wrong_arguments_raise_before_anything_is_sent(error: type[Exception],
                                                       call: Callable[[Any], Any]) -> None:
    comm = ThreadGroup(2, timeout=0.1).communicator(0)
    with pytest.raises(error):
        call(comm)
    assert comm._failure is None


def test_a_group_of_one_copies() -> None:
    comm = ThreadGroup(1).communicator(0)
    assert isinstance(comm, SelfCommunicator) and (comm.rank, comm.size, comm.kind) == (0, 1, "self")
    x = np.arange(4)
    for got in (comm.all_reduce(x), comm.reduce_scatter(x, [4]), comm.all_gather(x, [4]),
                comm.all_to_all(x, [4], [4]), comm.broadcast(x, 0)):
        assert got.tolist() == x.tolist() and not np.may_share_memory(got, x)
    comm.abort("enough")
    with pytest.raises(CommAborted, match="enough"):
        comm.barrier()


@pytest.mark.parametrize("size", [1, 3])
def test_calls_and_bytes_sent_are_counted(size: int) -> None:
    """Sums over the ranks of what the usual formulas give, for whole arrays of 12 float32."""
    def body(comm: Any) -> list[int]:
        x, sent = np.ones((3, 4), np.float32), []
        part = np.ones((3, 4 // size + (comm.rank < 4 % size)), np.float32)
        for call in (lambda: comm.all_reduce(x), lambda: comm.all_reduce_many([x]),
                     lambda: comm.reduce_scatter_many([x], [1]),
                     lambda: comm.all_gather_many([part], [1], [(3, 4)]),
                     lambda: comm.broadcast(x, 0), lambda: comm.barrier()):
            before = comm.bytes_sent
            call()
            sent.append(comm.bytes_sent - before)
        assert comm.calls == 6
        return sent

    total = np.sum(succeed(size, body), axis=0) / 48 / max(1, size - 1)
    assert total.tolist() == ([0] * 6 if size == 1 else [2, 2, 1, 1, 1, 0])


def test_a_call_word_reads_back() -> None:
    word = encode("all_reduce", "max", np.dtype(np.float16), 12345678901)
    assert describe(word) == "all_reduce max of 12345678901 float16" and word < 2**64
    flag = np.dtype(bool)
    assert encode("broadcast", "", flag, 1, (0,)) != encode("broadcast", "", flag, 1, (1,))
