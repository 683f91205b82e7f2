"""The emulation is as strict as CuPy: what CuPy would reject, or would get wrong silently, fails here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy", reason="the emulation of a GPU asks an installed CuPy for its signatures")

import emulator
import ml_dtypes
from emulator.order import RaceError
from emulator.streams import CUDARuntimeError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def cp() -> Iterator[Any]:
    """The emulated CuPy, on a stream of its own."""
    device = emulator.device()
    with device.active():
        yield device.cp
    emulator.check()


@pytest.fixture
def x(cp: Any) -> Any:
    return cp.asarray(np.arange(12, dtype=np.float32).reshape(3, 4))


# --- arrays of the host and of the device -------------------------------------------------------------------

@pytest.mark.parametrize("mix", [
    lambda cp, x: x + np.ones(4), lambda cp, x: np.ones(4) + x, lambda cp, x: cp.add(x, np.ones(4)),
    lambda cp, x: cp.where(x > 0, x, np.ones(4)), lambda cp, x: cp.concatenate([x, np.ones((1, 4))]),
    lambda cp, x: x.__iadd__(np.ones(4)), lambda cp, x: x.__setitem__(0, np.ones(4)),
    lambda cp, x: cp.full((2,), np.ones(2)), lambda cp, x: cp.add(x, x, out=np.ones((3, 4))),
    lambda cp, x: np.asarray(x), lambda cp, x: cp.exp([1.0]), lambda cp, x: cp.arange(x.sum())])
def test_arrays_of_the_host_do_not_mix(cp: Any, x: Any, mix: Any) -> None:
    with pytest.raises(TypeError):
        mix(cp, x)


def test_numbers_of_numpy_and_python_mix(cp: Any, x: Any) -> None:
    for found in (x * 2, 2 * x, x * np.float32(2), np.float32(2) * x):
        assert found.dtype == np.float32
    assert (x * np.float64(2)).dtype == np.float64


def test_results_stay_on_the_device(cp: Any, x: Any) -> None:
    for found in (x.sum(), x[0, 0], x.max(), cp.argmax(x), (x > 0).any(), cp.count_nonzero(x), x.mean(),
                  cp.exp(x[0, 0]), cp.matmul(x[0], x[0])):
        assert type(found) is cp.ndarray and found.shape == ()


def test_values_asked_for_are_counted(cp: Any, x: Any) -> None:
    before = len(emulator.SYNCHRONISATIONS)
    bool(x[0, 0]), int(x[0, 1]), float(x.sum()), x[0, 0].item(), x.get(), x.tolist()
    assert len(emulator.SYNCHRONISATIONS) == before + 6


# --- what CuPy has --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["vecdot", "bfloat16", "nan_to_num_", "errstate", "setbufsize", "i1"])
def test_names_that_cupy_lacks_are_lacking(cp: Any, name: str) -> None:
    assert not hasattr(cp, name)


@pytest.mark.parametrize("call", [
    lambda cp, x: cp.add(x, x, where=x > 0), lambda cp, x: cp.sum(x, where=x > 0),
    lambda cp, x: cp.max(x, initial=0), lambda cp, x: cp.take(x, x, mode="clip"),
    lambda cp, x: x.sum(where=x > 0), lambda cp, x: cp.argpartition(x, 1, kind="introselect"),
    lambda cp, x: cp.where(x > 0, x), lambda cp, x: cp.multiply(x, x, out=(x, x))])
def test_calls_that_cupy_rejects_are_rejected(cp: Any, x: Any, call: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        call(cp, x)


def test_ufuncs_have_the_methods_that_cupy_has(cp: Any, x: Any) -> None:
    i = cp.asarray(np.array([0, 0, 2]))
    cp.add.at(x, i, cp.ones((3, 4), np.float32))
    np.testing.assert_array_equal(x.get()[:, 0], [2, 4, 9])
    with pytest.raises(NotImplementedError):
        cp.multiply.at(x, i, 2)
    with pytest.raises(NotImplementedError):
        cp.maximum.reduce(x)
    with pytest.raises(TypeError):
        cp.add.at(x.astype(np.int8), i, 1)


def test_dtypes_follow_cupys_loops(cp: Any, x: Any) -> None:
    b = x.astype(BFLOAT16)
    assert (b + b).dtype == cp.exp(b).dtype == b.sum().dtype == b.max().dtype == (b * 2).dtype == BFLOAT16
    # A number of Python with a point, and what CuPy has no loop of bfloat16 for.
    assert (b * 2.0).dtype == cp.where(x > 0, b, b).dtype == cp.tril(b).dtype == np.float32
    for refused in (lambda: cp.argmax(b), lambda: b.mean(), lambda: cp.sort(b), lambda: cp.negative(x > 0),
                    lambda: cp.matmul(b[None], b.T[None]), lambda: cp.subtract(x > 0, x > 0)):
        with pytest.raises(TypeError):
            refused()
    assert cp.exp(cp.ones(2, np.int8)).dtype == np.float16
    assert (cp.ones(2, np.int32) / 2).dtype == np.float64


def test_dtypes_that_no_device_array_has_are_refused(cp: Any) -> None:
    for wrong in (np.array([{}]), np.array(["a"]), np.array([(1, 2)], "i4,i4"), np.array([1], np.longdouble)):
        with pytest.raises((ValueError, TypeError)):
            cp.asarray(wrong)


def test_results_are_not_cast_into_a_narrower_kind(cp: Any, x: Any) -> None:
    i = cp.ones((3, 4), np.int32)
    with pytest.raises(TypeError):
        cp.add(x, x, out=i)
    with pytest.raises(TypeError):
        i /= 2
    with pytest.raises(ValueError, match="shape"):
        cp.add(x, x, out=cp.empty((3, 5), np.float32))
    cp.add(x.astype(np.float64), 1, out=x)
    assert x[0, 0].get() == 1


# --- indexing -------------------------------------------------------------------------------------------

def test_indices_out_of_range_wrap_around(cp: Any, x: Any) -> None:
    i = cp.asarray(np.array([3, -4]))
    np.testing.assert_array_equal(x[i].get(), x.get()[[0, 2]])
    np.testing.assert_array_equal(x.take(i, axis=0).get(), x.get()[[0, 2]])
    with pytest.raises(IndexError):
        x[3]


def test_views_share_memory_and_copies_do_not(cp: Any, x: Any) -> None:
    view = x[1:, ::2]
    assert view.base is x and view.data.ptr == x.data.ptr + x.strides[0] and view.strides == (16, 8)
    view[...] = 0
    np.testing.assert_array_equal(x.get()[1:, ::2], 0)
    assert x[cp.asarray(np.array([0]))].base is None
    assert x.reshape(4, 3).base is x and x.T.reshape(12).base is None
    assert x.T.flags.f_contiguous and not x.T.flags.c_contiguous


def test_copies_between_overlapping_memory_are_caught(cp: Any) -> None:
    line = cp.arange(8)
    with pytest.raises(AssertionError, match="overlap"):
        line[1:] = line[:-1]


# --- memory -------------------------------------------------------------------------------------------

def test_addresses_are_stable_in_a_steady_loop(cp: Any, x: Any) -> None:
    seen = set()
    for _ in range(4):
        y = x * 2
        seen.add(y.data.ptr)
        del y
    assert len(seen) == 1


def test_memory_is_poisoned_when_it_is_handed_out(cp: Any) -> None:
    assert np.isnan(cp.empty(3).get()).all() and (cp.empty(3, np.int64).get() == -1).all()


def test_pool_keeps_to_its_limit(cp: Any) -> None:
    pool = cp.cuda.MemoryPool()
    pool.set_limit(size=4096)
    with cp.cuda.using_allocator(pool.malloc):
        a = cp.empty(512, np.uint8)
        assert (pool.used_bytes(), pool.total_bytes()) == (512, 512)
        with pytest.raises(cp.cuda.memory.OutOfMemoryError):
            cp.empty(4096, np.uint8)
        del a
        assert (pool.used_bytes(), pool.total_bytes(), pool.free_bytes()) == (0, 512, 512)
        b = cp.empty(4096, np.uint8)        # the block of 512 bytes is given back for it
        assert pool.total_bytes() == b.nbytes == 4096
    pool.free_all_blocks()
    del b
    pool.free_all_blocks()
    assert pool.total_bytes() == 0


def test_device_runs_out_of_memory(cp: Any) -> None:
    from emulator.memory import HARDWARE
    before = HARDWARE.total
    emulator.set_device_memory(HARDWARE.used + 1024)
    try:
        with pytest.raises(cp.cuda.memory.OutOfMemoryError):
            cp.empty(1 << 20)
    finally:
        emulator.set_device_memory(before)


def test_writing_outside_of_an_allocation_is_found(cp: Any) -> None:
    from emulator.memory import bytes_at
    a = cp.zeros(10, np.uint8)
    bytes_at(a.data.ptr, 11)[10] = 7
    del a
    with pytest.raises(AssertionError, match="written behind"):
        emulator.check()


# --- streams and graphs -----------------------------------------------------------------------------------

def capture(stream: Any, does: Any) -> Any:
    stream.begin_capture()
    try:
        does()
    finally:
        graph = stream.end_capture()
    return graph


def test_recorded_work_is_done_at_launch_on_the_same_addresses(cp: Any, x: Any) -> None:
    stream = cp.cuda.get_current_stream()
    out = cp.zeros(4, np.float32)
    graph = capture(stream, lambda: cp.multiply(x.sum(axis=0), 2, out=out))
    np.testing.assert_array_equal(out.get(), 0)
    graph.launch()
    np.testing.assert_array_equal(out.get(), 2 * x.get().sum(0))
    x.fill(1)
    graph.launch()
    np.testing.assert_array_equal(out.get(), 6)


@pytest.mark.parametrize("forbidden", [
    lambda cp, x: x.get(), lambda cp, x: float(x[0, 0]), lambda cp, x: x[x > 0], lambda cp, x: cp.nonzero(x),
    lambda cp, x: cp.where(x > 0), lambda cp, x: cp.matmul(x, x.T), lambda cp, x: cp.asarray(np.ones(3)),
    lambda cp, x: cp.sort(x), lambda cp, x: x[[0, 1]],
    lambda cp, x: cp.cuda.get_current_stream().synchronize(), lambda cp, x: cp.einsum("ij,kj->ik", x, x),
    lambda cp, x: x.set(np.ones((3, 4), np.float32)), lambda cp, x: cp.cuda.Device().synchronize(),
    lambda cp, x: x.__setitem__(x > 0, 0), lambda cp, x: cp.unique(x)])
def test_what_waits_or_comes_from_the_host_cannot_be_recorded(cp: Any, x: Any, forbidden: Any) -> None:
    stream = cp.cuda.get_current_stream()
    stream.begin_capture()
    with pytest.raises(CUDARuntimeError):
        forbidden(cp, x)
    with pytest.raises(CUDARuntimeError, match="Invalidated"):
        stream.end_capture()
    assert not stream.is_capturing()


def test_what_takes_numbers_can_be_recorded(cp: Any, x: Any) -> None:
    out = cp.empty((3, 4), np.float32)

    def does() -> None:
        out[...] = cp.where(x > 3, x, 0) + cp.full((4,), 2.0, np.float32) + cp.asarray(1.0)
        out[0] = 5
        x[cp.arange(2), cp.arange(2)] = 0

    graph = capture(cp.cuda.get_current_stream(), does)
    graph.launch()
    assert out.get()[0, 0] == 5 and out.get()[1, 0] == 7 and x.get()[1, 1] == 0


def test_streams_join_a_capture_by_events(cp: Any, x: Any) -> None:
    first, second = cp.cuda.get_current_stream(), cp.cuda.Stream(non_blocking=True)
    out = cp.zeros_like(x)

    def fork(join: bool) -> None:
        second.wait_event(first.record())
        with second:
            assert second.is_capturing()
            cp.add(x, 1, out=out)
        if join:
            first.wait_event(second.record())

    graph = capture(first, lambda: fork(join=True))
    assert not second.is_capturing() and out.get().max() == 0
    graph.launch()
    assert out.get().max() == 12
    with pytest.raises(CUDARuntimeError, match="Unjoined"):
        capture(first, lambda: fork(join=False))


def test_default_stream_cannot_be_captured(cp: Any) -> None:
    with pytest.raises(CUDARuntimeError):
        cp.cuda.Stream.null.begin_capture()


def test_copies_to_and_from_pinned_memory(cp: Any, x: Any) -> None:
    pinned = cp.cuda.alloc_pinned_memory(x.nbytes)
    host = np.frombuffer(pinned, np.float32, x.size)
    x.data.copy_to_host_async(pinned.ptr, x.nbytes)
    cp.cuda.get_current_stream().synchronize()
    np.testing.assert_array_equal(host, x.get().ravel())
    host[:] = 3
    x.data.copy_from_host_async(pinned.ptr, x.nbytes)
    cp.cuda.get_current_stream().synchronize()
    assert float(x.min()) == 3


def test_dlpack_shares_memory(cp: Any, x: Any) -> None:
    assert cp.from_dlpack(x).data.ptr == x.data.ptr


# --- waits that are forgotten -------------------------------------------------------------------------------

ADD = 'extern "C" __global__ void add(const float* x, float* y) { y[threadIdx.x] += x[threadIdx.x]; }'


@pytest.mark.parametrize("touch", [
    lambda cp, x: x.fill(0), lambda cp, x: cp.add(x, 1, out=x), lambda cp, x: x.__setitem__(0, 1),
    lambda cp, x: cp.RawModule(code=ADD).get_function("add")((1,), (4,), (cp.zeros(4, "float32"), x)),
    lambda cp, x: x.data.memset_async(0, 4)])
def test_streams_that_share_memory_need_an_event(cp: Any, x: Any, touch: Any) -> None:
    first, second = cp.cuda.get_current_stream(), cp.cuda.Stream(non_blocking=True)
    x += 1
    with second, pytest.raises(RaceError):
        touch(cp, x)
    second.wait_event(first.record())
    with second:
        touch(cp, x)
    with pytest.raises(RaceError):
        x.sum()
    second.synchronize()
    x.sum()


def test_streams_may_read_the_same_memory(cp: Any, x: Any) -> None:
    cp.cuda.get_current_stream().synchronize()
    add = cp.RawModule(code=ADD).get_function("add")
    x.sum()
    with cp.cuda.Stream(non_blocking=True):
        x.sum()
        add((1,), (4,), (x, cp.zeros(4, "float32")))


def test_memory_that_another_stream_still_uses_must_not_be_freed(cp: Any, x: Any) -> None:
    y = x * 2
    other = cp.cuda.Stream(non_blocking=True)
    other.wait_event(cp.cuda.get_current_stream().record())
    with other:
        y.sum()
    del y
    with pytest.raises(RaceError):
        x * 3


def test_replays_touch_what_was_recorded(cp: Any, x: Any) -> None:
    out = cp.empty_like(x)
    graph = capture(cp.cuda.get_current_stream(), lambda: cp.add(x, 1, out=out))
    other = cp.cuda.Stream(non_blocking=True)
    with pytest.raises(RaceError):
        graph.launch(other)
    cp.cuda.get_current_stream().synchronize()
    graph.launch(other)
    with pytest.raises(RaceError):
        out.get()


def test_copies_arrive_on_the_host_when_it_has_waited(cp: Any, x: Any) -> None:
    stream, pinned = cp.cuda.get_current_stream(), cp.cuda.alloc_pinned_memory(x.nbytes)
    host = np.frombuffer(pinned, np.float32, x.size)
    x.data.copy_to_host_async(pinned.ptr, x.nbytes)
    event = stream.record()
    assert np.isnan(host).all()
    event.synchronize()
    assert host[5] == 5
    x.data.copy_from_host_async(pinned.ptr, x.nbytes)
    host[:] = 9
    stream.synchronize()
    with pytest.raises(AssertionError, match="under way"):
        emulator.check()
