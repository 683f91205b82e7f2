"""Every kind of mesh carries the same messages and gives the same answers."""

import numpy as np
import pytest

from meshtape.runtime.errors import SessionClosed, WorkerLost


def replies(mesh, count):
    return sorted(mesh.collect() for _ in range(count))


def test_a_mesh_echoes_arrays_reduces_along_its_axes_and_keeps_order(any_mesh, standin):
    mesh = any_mesh(4, {"data": 2, "model": 2})
    n = mesh.size
    assert (len(mesh.nodes), len(mesh.devices), mesh.names) == (n, n, ("data", "model"))
    assert mesh.links == [{"inline": "self", "threads": "threads"}.get(mesh.kind, "shm")] * 2

    feeds = [[np.arange(6, dtype=np.float32).reshape(2, 3).T * r, None, np.array(r), np.zeros((0, 3))]
             for r in range(n)]
    mesh.send(standin.runs(n, "echo", batch=7, feeds=feeds))
    for reply, given in zip(replies(mesh, n), feeds, strict=True):
        assert (reply.batch, reply.failures, reply.values[1]) == (7, [], None)
        for got, sent in zip(reply.values, given, strict=True):
            assert sent is None or (got.dtype == sent.dtype and np.array_equal(got, sent))

    mesh.send(standin.runs(n, "sum", feeds=[[np.full(3, 10.0**r)] for r in range(n)]))
    for reply in replies(mesh, n):
        assert np.array_equal(reply.values[0], np.full(3, sum(10.0**r for r in range(n))))

    for batch in range(20):
        mesh.send(standin.runs(n, "echo", batch=batch))
    order = {rank: [] for rank in range(n)}
    for _ in range(20 * n):
        reply = mesh.collect()
        order[reply.rank].append(reply.batch)
    assert all(batches == list(range(20)) for batches in order.values())
    assert mesh.collect(timeout=0) is None
    assert mesh.collect(timeout=0.05) is None

    mesh.close()
    mesh.close()
    assert mesh.closed
    with pytest.raises(SessionClosed, match="shut down"):
        mesh.collect()


def test_large_arrays_travel_both_ways_while_neither_side_waits_for_the_other(any_mesh, standin):
    mesh = any_mesh(2)
    feeds = [[np.arange(500_000, dtype=np.float64) + r] for r in range(mesh.size)]
    for batch in range(3):      # replies pile up unread while more is sent
        mesh.send(standin.runs(mesh.size, "echo", batch=batch, feeds=feeds))
    for _ in range(3 * mesh.size):
        reply = mesh.collect()
        assert np.array_equal(reply.values[0], feeds[reply.rank][0])


def test_a_worker_that_breaks_is_lost_and_the_mesh_is_closed(any_mesh, standin):
    mesh = any_mesh(2)
    if mesh.kind == "inline":
        with pytest.raises(ValueError, match="on purpose"):
            mesh.send(standin.runs(1, "break"))
        return
    mesh.send(standin.runs(2, "break"))
    with pytest.raises(WorkerLost, match="ValueError: broken on purpose"):
        mesh.collect()
    with pytest.raises(SessionClosed, match="broken on purpose"):
        mesh.send(standin.runs(2, "echo"))
