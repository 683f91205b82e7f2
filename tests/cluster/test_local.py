"""Meshes inside the driver's process."""

import threading

import pytest

from meshtape.cluster.local import InlineMesh, ThreadMesh
from meshtape.cluster.mesh import mesh_axes
from meshtape.runtime.errors import MeshError, SessionClosed, WorkerLost


def test_axes_default_to_data_and_must_fit_the_workers():
    assert mesh_axes(3) == (("data",), (3,))
    assert mesh_axes(8, {"data": 4, "model": 2}) == (("data", "model"), (4, 2))
    with pytest.raises(MeshError, match="has 6 places, but there are 8 workers"):
        mesh_axes(8, {"data": 3, "model": 2})
    for wrong in ({"data": 0}, {"": 1}, {"data": -1, "model": -1}):
        with pytest.raises(MeshError, match="each axis needs a name"):
            mesh_axes(1, wrong)
    with pytest.raises(MeshError, match="at least 1 worker"):
        mesh_axes(0)


def test_an_interrupted_batch_of_an_inline_mesh_is_answered_as_failed(standin):
    class Interrupted(standin.StandIn):
        def run(self, run):
            if run.scalars:
                raise KeyboardInterrupt
            return super().run(run._replace(scalars=["echo"]))

    mesh = InlineMesh(worker=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        mesh.send(standin.runs(1, "anything", batch=4))
    reply = mesh.collect()
    assert (reply.batch, reply.failures[0].kind) == (4, "KeyboardInterrupt")
    mesh.send(standin.runs(1, batch=5))
    assert mesh.collect().batch == 5


def test_closing_a_thread_mesh_ends_its_threads_even_inside_a_collective(standin):
    before = threading.active_count()
    mesh = ThreadMesh(2, worker=standin.StandIn, timeout=60.0)
    import numpy as np
    runs = standin.runs(2, "sum", feeds=[[np.ones(2)]] * 2)
    mesh.send([runs[0], runs[1]._replace(scalars=["echo"])])        # rank 0 waits for rank 1 in vain
    assert mesh.collect().rank == 1
    mesh.close()
    assert threading.active_count() == before


def test_a_thread_that_cannot_start_its_worker_is_lost():
    def cannot(rank, mesh_shape, communicators, device):
        raise OSError("no room")

    mesh = ThreadMesh(2, worker=cannot)
    with pytest.raises(WorkerLost, match="OSError: no room"):
        mesh.collect()
    with pytest.raises(SessionClosed, match="no room"):
        mesh.collect()
