"""Arrays of other libraries come in and go out, without a copy where they can; names of devices."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from beside_torch import torch
from meshes import on
from spy import blocks, watched

import meshtape as mt
from meshtape.cluster.local import InlineMesh
from meshtape.runtime.dlpack import CUDA
from meshtape.scheduler import current
from meshtape.scheduler.session import Session

DTYPES = ["bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64"]
A = np.arange(12).reshape(3, 4)


def address(x: Any) -> int:
    return int(x.__array_interface__["data"][0])


# --- hosts --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2)])
def test_values_go_to_torch_and_come_back(dtype: str, shape: Any, workers: int) -> None:
    x = mt.tensor(np.resize(A, shape), layout=mt.Shard(0) if shape else None).astype(dtype)
    there = torch.from_dlpack(x)
    assert str(there.dtype) == f"torch.{dtype}" and tuple(there.shape) == shape
    for back in (mt.from_dlpack(there), mt.tensor(there), mt.asarray(there)):
        assert back.dtype == x.dtype and back.shape == shape
        np.testing.assert_array_equal(back.numpy(), x.numpy())


def test_a_worker_in_this_process_shares_its_memory() -> None:
    x = mt.tensor(A.astype(np.float32)) * 2.0
    first, second = np.from_dlpack(x), np.from_dlpack(x)
    assert address(first) == address(second) and not first.flags.writeable
    t = torch.from_dlpack(x)
    assert t.data_ptr() == address(first) and np.shares_memory(first, t.numpy())
    assert address(np.from_dlpack(x, copy=True)) != address(first)
    low = x.astype(mt.bfloat16)
    assert torch.from_dlpack(low).data_ptr() == torch.from_dlpack(low).data_ptr()


def test_shared_values_stay_when_the_tensor_goes_and_programs_run_on() -> None:
    with watched(1) as (session, made):
        x = mt.tensor(A.astype(np.float32)) + 1.0
        t, low = torch.from_dlpack(x), torch.from_dlpack(x.astype(mt.bfloat16))
        for _ in range(4):
            x = x * 3.0 + 1.0           # over the old values, if nobody else has them
            mt.flush()
        del x
        np.testing.assert_array_equal(t.numpy(), A + 1)
        np.testing.assert_array_equal(low.float().numpy(), A + 1)
        held = blocks(session, made)[0]
        del t, low
        gc.collect()
        assert blocks(session, made)[0] == held - 2


def test_several_workers_give_a_copy(workers: int) -> None:
    x = mt.tensor(A.astype(np.float32), layout=mt.Shard(0)) * 2.0
    if workers == 1:
        np.from_dlpack(x, copy=False)
        return
    assert address(np.from_dlpack(x)) != address(np.from_dlpack(x))
    with pytest.raises(BufferError, match="must be copied"):
        np.from_dlpack(x, copy=False)


def test_readers_that_take_no_read_only_memory_get_a_copy_of_their_own() -> None:
    x = mt.ones((2, 2))
    first, second = (np.from_dlpack(Old(x.__dlpack__())) for _ in range(2))
    assert not np.shares_memory(first, second) and not np.shares_memory(first, np.from_dlpack(x))
    with pytest.raises(BufferError, match="no read-only memory"):
        x.__dlpack__(copy=False)
    with pytest.raises(BufferError, match=r"asked for on \(2, 0\)"):
        x.__dlpack__(dl_device=(CUDA, 0))


class Old:
    """A capsule, and no more than the first version of the protocol."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **asked: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_what_comes_in_is_copied_and_off_the_tape(workers: int) -> None:
    t = torch.arange(6.0).reshape(2, 3)
    made = [mt.from_dlpack(t), mt.tensor(t), mt.tensor(t.T), mt.from_dlpack(t.to(torch.bfloat16))]
    t += 100.0
    assert [x.sum().item() for x in made] == [15.0] * 4
    np.testing.assert_array_equal(made[2].numpy(), np.arange(6.0).reshape(2, 3).T)
    p = torch.nn.Parameter(torch.ones(3))
    assert not mt.from_dlpack(p).requires_grad and mt.tensor(p, requires_grad=True).requires_grad
    assert mt.tensor(torch.ones(4), dtype="float64", layout=mt.Shard(0)).dtype == np.float64
    assert mt.from_dlpack(A).dtype == np.int64 and mt.from_dlpack(mt.ones(2)).shape == (2,)
    assert (mt.ones((2, 3)) + torch.ones(3)).sum().item() == 12.0
    with pytest.raises(BufferError, match="always copied"):
        mt.from_dlpack(t, copy=False)
    with pytest.raises(mt.MeshError, match="tensors live where the workers do"):
        mt.from_dlpack(t, device="cuda:3")


def test_arrays_on_devices_are_refused_where_workers_have_none() -> None:
    with pytest.raises(mt.MeshError, match="copy it to the host first"):
        mt.tensor(Elsewhere(None))
    with pytest.raises(mt.MeshError, match=r"as_cupy: the tensor is on 'cpu' .* use \.numpy\(\)"):
        mt.as_cupy(mt.ones(3))
    with pytest.raises(mt.MeshError, match="from_cupy: no worker in this process has a GPU"):
        mt.from_cupy(np.ones(3))


class Elsewhere(Old):
    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0


def test_a_failed_value_raises_when_it_is_shared() -> None:
    logits, target = mt.ones((2, 3)), mt.tensor([0, 7])
    bad = mt.nn.functional.nll_loss(logits, target, reduction="none")
    with pytest.raises(mt.WorkerError, match="target 7"):
        np.from_dlpack(bad)
    with pytest.raises(mt.WorkerError, match="target 7"):
        np.from_dlpack(bad)


def test_a_tensor_names_its_device(workers: int) -> None:
    assert mt.ones(3).device == "cpu" and mt.ones(3).__dlpack_device__() == (1, 0)


def test_devices_of_several_workers_have_one_name() -> None:
    with on(2) as session:
        session.mesh.devices = ["gpu0", "gpu1"]
        assert mt.ones(3).device == "gpu"
        session.mesh.devices = ["cuda:0", "cuda:1"]
        assert mt.ones(3).device == "cuda"
        session.mesh.devices = ["gpu0", "gpu0"]
        assert mt.ones(3).device == "gpu0"


# --- devices ------------------------------------------------------------------------------------------------

@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A session with one worker in this process, on an emulated device, and on a real one if there is one."""
    if request.param == "cuda":
        from meshtape.runtime.gpu import gpu_here, open_device
        name, reason = gpu_here()
        if not name:
            pytest.skip(f"no GPU: {reason}")
        found = open_device(0)
    else:
        pytest.importorskip("cupy", reason="the emulation asks the installed CuPy for its signatures")
        import emulator
        found = emulator.device()
    mt.shutdown()
    current.use(Session(InlineMesh(open_device=lambda index: found)))
    yield found


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "float16"])
def test_a_worker_shares_its_device_memory_with_cupy(device: Any, dtype: str) -> None:
    x = mt.tensor(A).astype(dtype)
    a, b = mt.as_cupy(x), mt.as_cupy(x)
    assert a.data.ptr == b.data.ptr and a.shape == x.shape and a.dtype == x.dtype
    np.testing.assert_array_equal(a.get(), A.astype(dtype))
    assert x.device == "gpu0" and x.__dlpack_device__() == (CUDA, 0)
    assert mt.as_cupy(mt.zeros((0, 3))).shape == (0, 3)


def test_device_memory_stays_while_cupy_looks_at_it(device: Any) -> None:
    x = mt.tensor(A.astype(np.float32)) + 1.0
    a = mt.as_cupy(x)
    for _ in range(5):
        x = x * 3.0 + 1.0               # replayed as a graph from the third time on
        mt.flush()
    late = mt.as_cupy(x)
    wanted = x.numpy()
    for _ in range(3):
        x = x * 3.0 + 1.0
        mt.flush()
    del x
    np.testing.assert_array_equal(a.get(), A + 1)
    np.testing.assert_array_equal(late.get(), wanted)


def test_device_arrays_are_fed_without_the_host(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = device.cp.asarray(A.astype(np.float32))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a copy to the host")

    with monkeypatch.context() as patch:
        if type(a).__module__.startswith("emulator"):       # CuPy's own class cannot be patched
            patch.setattr(type(a), "get", refuse)
        made = [mt.from_cupy(a), mt.from_dlpack(a), mt.tensor(a), mt.from_cupy(a.T)]
        a[...] = 0
        totals = [(x * 2.0).sum() for x in made]
        mt.flush()
    assert [t.item() for t in totals] == [132.0] * 4
    np.testing.assert_array_equal(made[3].numpy(), A.T)
    assert mt.tensor(device.cp.asarray(A), dtype="float16").dtype == np.float16


def test_an_array_of_another_device_is_refused(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = device.cp.asarray(A)
    monkeypatch.setattr(device, "index", 1)
    with pytest.raises(mt.MeshError, match="the array is on GPU 0, the worker's is 1"):
        mt.from_cupy(a)


def test_values_on_a_device_go_to_hosts_as_copies(device: Any) -> None:
    x = mt.tensor(A.astype(np.float32))
    np.testing.assert_array_equal(np.from_dlpack(x, device="cpu"), A)
    with pytest.raises(BufferError, match="must be copied"):
        x.__dlpack__(dl_device=(1, 0), copy=False, max_version=(1, 0))
