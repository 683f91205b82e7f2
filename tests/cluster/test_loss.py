"""A worker that dies or stops is noticed; one that only works for long is not mistaken for it."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from meshtape.runtime.errors import SessionClosed, WorkerLost

LONGER_THAN_THE_TIMEOUT = 4.0
PARENT = """
import json, subprocess, sys
child = subprocess.Popen([sys.executable, sys.argv[1]], stdin=subprocess.PIPE, text=True)
print(json.dumps({"secret": "00", "host": None, "connect_within": 600}), file=child.stdin, flush=True)
print(child.pid, flush=True)
input()
"""


def collect_all(mesh):
    return [mesh.collect() for _ in range(mesh.size)]


@pytest.fixture(params=["processes", pytest.param("ray", marks=pytest.mark.ray),
                        pytest.param("ray calls", marks=pytest.mark.ray)])
def mesh_of(request, standin):
    """make(workers, heartbeat_timeout): processes reached by sockets, with Ray or without, or by calls."""
    made = []

    def make(workers, heartbeat_timeout):
        if request.param == "processes":
            mesh = request.getfixturevalue("process_mesh")(workers, heartbeat_timeout=heartbeat_timeout)
        else:
            request.getfixturevalue("ray_here")
            from meshtape.cluster import ray_mesh
            mesh = ray_mesh.start(workers, channel="ray" if request.param == "ray calls" else "socket",
                                  make_worker=standin.StandIn, heartbeat_timeout=heartbeat_timeout)
        made.append(mesh)
        return mesh

    yield make
    for mesh in made:
        mesh.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_worker_is_named_and_the_others_end(mesh_of, standin, vanishes, how):
    mesh = mesh_of(2, heartbeat_timeout=2.0)
    mesh.send(standin.runs(2, "echo"))
    collect_all(mesh)
    os.kill(mesh.places[1].pid, how)
    with pytest.raises(WorkerLost, match=r"worker 1 .*was lost") as caught:
        mesh.collect()
    assert (caught.value.rank, caught.value.node) == (1, mesh.nodes[1])
    assert str(mesh.places[1].pid) in str(caught.value)
    with pytest.raises(SessionClosed, match=r"worker 1 .*was lost"):
        mesh.send(standin.runs(2, "echo"))
    assert vanishes(mesh.places[0].pid)
    mesh.close()
    assert vanishes(mesh.places[1].pid)


def test_a_worker_that_dies_inside_a_collective_is_blamed_rather_than_its_peers(mesh_of, standin):
    mesh = mesh_of(2, heartbeat_timeout=4.0)
    batch = standin.runs(2, "sum", feeds=[[np.ones(3)]] * 2)
    mesh.send([batch[0]._replace(scalars=["sum"]), batch[1]._replace(scalars=["sum"])])
    collect_all(mesh)
    os.kill(mesh.places[1].pid, signal.SIGSTOP)
    mesh.send(batch)
    time.sleep(0.3)             # rank 0 is now waiting for rank 1
    os.kill(mesh.places[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerLost) as caught:
        mesh.collect()
    assert caught.value.rank == 1


@pytest.mark.parametrize("mesh_of", ["processes", pytest.param("ray calls", marks=pytest.mark.ray)],
                         indirect=True)
def test_long_kernels_and_a_busy_driver_raise_no_false_alarm(mesh_of, standin):
    mesh = mesh_of(2, heartbeat_timeout=3.0)
    mesh.send(standin.runs(2, "spin", LONGER_THAN_THE_TIMEOUT))
    collect_all(mesh)
    time.sleep(LONGER_THAN_THE_TIMEOUT)
    assert mesh.collect(timeout=1.0) is None


def test_sending_to_a_stopped_worker_does_not_block_for_ever(process_mesh, standin):
    mesh = process_mesh(2, heartbeat_timeout=1.5)
    os.kill(mesh.places[0].pid, signal.SIGSTOP)
    feeds = [[np.zeros(4_000_000)]] * 2
    with pytest.raises(WorkerLost, match="no heartbeat") as caught:
        for batch in range(3):
            mesh.send(standin.runs(2, "echo", batch=batch, feeds=feeds))
    assert caught.value.rank == 0


def test_workers_that_answer_at_length_do_not_block_a_driver_that_sends(process_mesh, standin):
    mesh = process_mesh(1)
    feeds = [[np.zeros(4_000_000)]]
    for batch in range(4):
        mesh.send(standin.runs(1, "echo", batch=batch, feeds=feeds))
    assert [mesh.collect().batch for _ in range(4)] == [0, 1, 2, 3]


def test_a_worker_leaves_when_its_driver_hangs_up_even_inside_a_kernel(process_mesh, standin, vanishes):
    mesh = process_mesh(2)
    mesh.send([standin.runs(1, "sleep", 600.0)[0], standin.runs(1, "sum", feeds=[[np.ones(2)]])[0]])
    time.sleep(0.2)
    mesh._hang_up()
    assert all(vanishes(place.pid) for place in mesh.places)


def test_a_worker_leaves_when_the_process_that_started_it_is_gone(standin, vanishes):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, standin.__file__], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.stdout.readline()        # the child's addresses: it is up
    writing_end = os.open(f"/proc/{child}/fd/0", os.O_WRONLY)   # or it would end because its input does
    parent.kill()
    parent.wait()
    try:
        assert vanishes(child)
    finally:
        os.close(writing_end)
        parent.stdin.close()
        parent.stdout.close()


def test_a_worker_that_no_driver_connects_to_leaves(standin, vanishes):
    child = subprocess.Popen([sys.executable, standin.__file__], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    print('{"secret": "00", "host": null, "connect_within": 0.5}', file=child.stdin, flush=True)
    assert child.wait(20) == 1
    child.communicate()


def test_ctrl_c_interrupts_waiting_and_leaves_the_mesh_usable(any_mesh, standin):
    mesh = any_mesh(2)
    if mesh.kind == "inline":
        return
    mesh.send(standin.runs(2, "sleep", 1.5))
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        mesh.collect()
    collect_all(mesh)
    mesh.send(standin.runs(2, "echo", batch=3))
    assert [reply.batch for reply in collect_all(mesh)] == [3, 3]
