"""Ray actors on real GPUs: two on one, by way of the host or by NCCL, and one on each of several."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import digits
import numpy as np
import pytest

import meshtape as mt
from meshtape import nn
from meshtape.runtime.collectives.choice import SHARING_NCCL, version_text
from meshtape.runtime.gpu import device_count, gpu_here
from meshtape.scheduler import current

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.ray, pytest.mark.timeout(300),
              pytest.mark.skipif(bool(gpu_here()[1]), reason=f"no GPU: {gpu_here()[1]}")]


@pytest.fixture(autouse=True)
def no_session() -> Iterator[None]:
    mt.shutdown()
    yield
    mt.shutdown()


def nccl_version() -> int:
    """That of the NCCL which CuPy loads; 0 without one."""
    from cupy.cuda import nccl
    return int(nccl.get_version()) if nccl.available else 0


def assert_digits_are_learned(steps: int = 20) -> None:
    np.testing.assert_allclose(digits.train(steps), digits.LOSSES[:steps], rtol=1e-8)


def test_two_workers_share_a_gpu_by_way_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
    with mt.init(workers=2, gpus_per_worker=0.5, devices="gpu") as mesh:
        assert mesh.devices == ["gpu0", "gpu0"]
        assert_digits_are_learned()
        assert "2 workers share GPU" in mt.explain(show=False)
        links = mt.stats()["links"]["data"]
        assert links["kind"] == "staged+shm" and min(links["collectives"]) > 0
        assert all(found["replays"] == 0 or found["reasons"] for found in mt.stats()["graphs"])


def test_two_workers_on_one_gpu_exchange_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    found = nccl_version()
    if found < SHARING_NCCL:
        pytest.skip(f"NCCL {version_text(found)}: ranks can share a GPU from {version_text(SHARING_NCCL)} on")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
    monkeypatch.setenv("MESHTAPE_TRANSPORT", "nccl")
    with mt.init(workers=2, gpus_per_worker=0.5, devices="gpu"):
        assert_digits_are_learned()
        assert mt.stats()["links"]["data"]["kind"] == "nccl"
        assert all(made["replays"] >= 10 for made in mt.stats()["graphs"])


@pytest.mark.skipif(device_count() < 2, reason=f"needs two GPUs, there are {device_count()}")
def test_a_gpu_for_each_of_two_workers_means_nccl() -> None:
    with mt.init(workers=2) as mesh:
        assert mesh.devices == ["gpu0", "gpu1"] and mt.stats()["links"]["data"]["kind"] == "nccl"
        assert_digits_are_learned()
        assert all(made["replays"] >= 10 for made in mt.stats()["graphs"])


@pytest.mark.parametrize("workers, axes", [(2, {"data": 2}), (2, {"model": 2}), (4, {"data": 2, "model": 2})])
def test_split_models_learn_the_same(workers: int, axes: dict[str, int]) -> None:
    """Parameters sharded over "data", layers split over "model"."""
    outputs, inputs = {"model": mt.Shard(0)}, {"model": mt.Shard(1)}
    plan = {"0.weight": outputs, "0.bias": outputs, "2.weight": inputs} if "model" in axes else {
        "*": {"data": mt.Shard(0)}}
    with mt.init(workers=workers, mesh=axes, gpus_per_worker=1 / workers, devices="gpu"):
        losses = digits.train(12, prepare=lambda net: nn.parallelize(net, plan))
        np.testing.assert_allclose(losses, digits.LOSSES[:12], rtol=1e-8)


def test_a_gpu_is_taken_where_there_is_one_and_declined_where_told() -> None:
    with mt.init(workers=1) as mesh:
        assert mesh.devices == ["gpu0"]
        assert_digits_are_learned(6)
    with mt.init(workers=1, devices="cpu") as mesh:
        assert mesh.devices == ["cpu"]
        assert_digits_are_learned(3)


def test_without_memory_one_batch_fails_and_the_workers_go_on() -> None:
    with mt.init(workers=2, gpus_per_worker=0.5, devices="gpu", memory_fraction=0.02):
        small = mt.ones((10,), layout=mt.Shard(0))
        huge = mt.zeros((1 << 36,), layout=mt.Shard(0))
        with pytest.raises(mt.WorkerError, match="no memory for its result"):
            (huge + 1.0).sum().item()
        assert small.sum().item() == 10.0


def test_a_worker_that_is_killed_is_noticed_and_its_gpu_can_be_used_again() -> None:
    with mt.init(workers=2, gpus_per_worker=0.5, devices="gpu"):
        assert_digits_are_learned(3)
        places = current.session().mesh.places              # type: ignore[attr-defined]
        os.kill(places[1].pid, signal.SIGKILL)
        with pytest.raises(mt.WorkerLost):
            for _ in range(1000):
                mt.ones((4,), layout=mt.Shard(0)).sum().item()
    with mt.init(workers=1):
        assert_digits_are_learned(3)
