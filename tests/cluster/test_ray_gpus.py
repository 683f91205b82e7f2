"""Slots with GPUs, on a Ray that believes to have one."""

from __future__ import annotations

import pytest

from meshtape.cluster import ray_mesh
from meshtape.cluster.mesh import fraction_for
from meshtape.runtime.errors import MeshError
from meshtape.runtime.gpu import device_count

pytestmark = [pytest.mark.ray,
              pytest.mark.skipif(device_count() > 0, reason="workers would find the GPU of this machine")]


@pytest.fixture(scope="module")
def one_gpu():
    import ray

    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", object_store_memory=80 * 2**20)
    yield ray
    ray.shutdown()


def test_workers_share_a_gpu_if_told_and_need_one_each_otherwise(one_gpu):
    with pytest.raises(MeshError, match="each needs 1 CPU and 1 GPU, and this Ray has room for 1 on 1 nodes"):
        ray_mesh.start(2, devices="gpu")
    with pytest.raises(MeshError, match=r'devices="gpu", but on .* cupy'):  # they were placed, and looked
        ray_mesh.start(2, devices="gpu", gpus_per_worker=0.5)


def test_gpus_that_cannot_be_used_are_declined_unless_asked_for(one_gpu):
    with ray_mesh.start(2, gpus_per_worker=0.5) as mesh:
        assert mesh.devices == ["cpu", "cpu"] and mesh.links == ["shm"] and mesh.reasons == [""]


def test_workers_that_share_a_gpu_share_its_memory():
    assert fraction_for(None, 1.0) is None and fraction_for(0.3, 0.5) == 0.3
    assert fraction_for(None, 0.5) == 0.45
