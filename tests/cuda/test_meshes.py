"""Whole sessions on GPU workers inside this process: one in the calling thread, several as threads."""

from __future__ import annotations

from typing import Any

import emulator
import numpy as np
import pytest

import meshtape as mt
from meshtape.cluster import launch, local
from meshtape.cluster.launch import make_mesh
from meshtape.cluster.local import InlineMesh, ThreadMesh
from meshtape.runtime.errors import MeshError
from meshtape.scheduler import current
from meshtape.scheduler.session import Session


@pytest.fixture(autouse=True)
def no_session() -> Any:
    yield
    mt.shutdown()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """What was opened: (number, memory fraction)."""
    opened: list[tuple[int, Any]] = []

    def open_device(number: int, memory_fraction: float | None = None) -> Any:
        opened.append((number, memory_fraction))
        return emulator.device(memory_fraction=memory_fraction)

    monkeypatch.setattr(launch, "gpu_here", lambda: ("Emulated", ""))
    monkeypatch.setattr(launch, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "open_device", open_device)
    return opened


def train(mesh: Any, steps: int = 3) -> list[float]:
    """Losses of a small network."""
    current.use(Session(mesh))
    mt.manual_seed(1)
    rng = np.random.default_rng(0)
    model = mt.nn.Sequential(mt.nn.Linear(6, 5), mt.nn.ReLU(), mt.nn.Linear(5, 3))
    opt = mt.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = mt.tensor(rng.standard_normal((8, 6)).astype(np.float32), layout=mt.Shard(0))
    y = mt.tensor(rng.integers(0, 3, 8), layout=mt.Shard(0))
    losses = []
    for _ in range(steps):
        loss = mt.nn.functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.item()))
    return losses


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_training_on_gpu_workers_gives_what_cpu_workers_give(workers: int, opens: Any) -> None:
    want = train(ThreadMesh(workers, timeout=20.0))
    mt.shutdown()
    mesh = ThreadMesh(workers, timeout=20.0, gpus=2, open_device=opens)
    assert mesh.devices == ["gpu0", "gpu1", "gpu0"][:workers]
    assert mesh.links == (["staged+threads"] if workers > 1 else ["self"])
    np.testing.assert_allclose(train(mesh), want, rtol=1e-5)


@pytest.mark.parametrize("workers", [2, 3])
def test_training_by_nccl_replays_its_collectives_in_graphs(workers: int,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    want = train(ThreadMesh(workers, timeout=20.0), 8)
    mt.shutdown()
    join = local.join_devices
    made: list[Any] = []

    def by_nccl(inner: Any, device: Any, transport: str) -> Any:
        made.append(join(inner, device, "nccl"))
        return made[-1]

    monkeypatch.setattr(local, "join_devices", by_nccl)
    mesh = ThreadMesh(workers, timeout=20.0, gpus=workers, open_device=lambda number: emulator.device())
    np.testing.assert_allclose(train(mesh, 8), want, rtol=1e-5)
    assert {type(c).__name__ for c in made} == {"NcclCommunicator"} and made[0].calls
    assert all(found["replays"] >= 4 for found in mt.stats()["graphs"])


def test_one_worker_in_the_calling_thread(opens: Any) -> None:
    want = train(InlineMesh())
    mt.shutdown()
    mesh = InlineMesh(open_device=opens)
    assert mesh.devices == ["gpu0"]
    np.testing.assert_allclose(train(mesh), want, rtol=1e-5)


def test_explain_says_how_collectives_travel_and_why(opens: Any) -> None:
    current.use(Session(ThreadMesh(2, timeout=20.0, gpus=1, open_device=opens)))
    assert mt.ones((4,), layout=mt.Shard(0)).sum().item() == 4.0
    assert "data: staged+threads (threads of one process)" in mt.explain(show=False)


def test_threads_take_the_gpus_in_turn_and_share_their_memory(two_gpus: list[tuple[int, Any]]) -> None:
    with make_mesh(4, backend="local", devices="gpu") as mesh:
        assert mesh.devices == ["gpu0", "gpu1", "gpu0", "gpu1"]
        current.use(Session(mesh))
        assert mt.ones((4,), layout=mt.Shard(0)).sum().item() == 4.0
    assert sorted(two_gpus) == [(0, 0.45), (0, 0.45), (1, 0.45), (1, 0.45)]
    two_gpus.clear()
    with make_mesh(devices="gpu", memory_fraction=0.25) as mesh:
        assert mesh.kind == "inline"
    with make_mesh(backend="local", devices="gpu") as mesh:
        assert mesh.size == 2
    assert sorted(two_gpus, key=str) == [(0, 0.25), (0, None), (1, None)]


@pytest.mark.parametrize("arguments", [
    {"memory_fraction": 0}, {"memory_fraction": 1.5}, {"memory_fraction": "half"}, {"memory_fraction": True},
    {"gpus_per_worker": 2}, {"gpus_per_worker": None}, {"gpus_per_worker": -0.5}])
def test_parts_of_gpus_must_be_above_0_and_at_most_1(arguments: dict[str, Any]) -> None:
    with pytest.raises(MeshError, match="needed a number above 0, at most 1"):
        make_mesh(devices="gpu", **arguments)


def test_without_a_gpu_the_reason_is_given_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gpu_here", lambda: ("", "cupy finds no CUDA device"))
    for arguments in ({}, {"workers": 2, "backend": "local"}):
        with pytest.raises(MeshError, match='devices="gpu": cupy finds no CUDA device; run `meshtape doc'):
            make_mesh(devices="gpu", **arguments)      # type: ignore[arg-type]
