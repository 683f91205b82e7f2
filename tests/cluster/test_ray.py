"""Meshes of Ray actors: starting, joining, refusing, and leaving nothing behind."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from meshtape.cluster import ray_connect
from meshtape.runtime.errors import MeshError, WorkerLost

pytestmark = pytest.mark.ray

# A driver that starts two workers, says who they are, and then does `then`.
DRIVER = """
import os, ray, standin
import numpy as np
from meshtape.cluster import launch, ray_mesh
ray.cloudpickle.register_pickle_by_value(standin)
mesh = ray_mesh.start(2, make_worker=standin.StandIn)
launch._close_at_exit(mesh)
mesh.send(standin.runs(2, "sum", feeds=[[np.ones(2)], [np.ones(2)]]))
assert all(mesh.collect().values[0].sum() == 4 for _ in range(2))
print(*(place.pid for place in mesh.places), flush=True)
print(mesh._processes.connection._directory.path, flush=True)
mesh.send(standin.runs(2, {then}))
for _ in range(2):
    print(*(value.tolist() for value in mesh.collect().values))
"""


@pytest.fixture
def driver(tmp_path, standin, vanishes):
    """driver(then): a DRIVER as a process group of its own, its workers, and all its descendants."""
    started = []

    def start(then):
        path = tmp_path / "driver.py"
        path.write_text(DRIVER.format(then=then))
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(standin.__file__)}
        process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   bufsize=0, env=environment, start_new_session=True)
        started.append(process)
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        process.directory = process.stdout.readline().decode().strip()
        others = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        return process, workers, {*workers, *others}

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def two_nodes():
    """The address of a cluster of two nodes, with one slot each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def join(standin, two_nodes):
    """join(workers, **options): a stand-in mesh on the two nodes; closed at the end."""
    import ray

    from meshtape.cluster import ray_mesh

    ray.cloudpickle.register_pickle_by_value(standin)
    made = []

    def start(workers, **options):
        made.append(ray_mesh.start(workers, address=two_nodes.address, make_worker=standin.StandIn,
                                   **options))
        return made[-1]

    yield start
    for mesh in reversed(made):
        mesh.close()


def total(mesh, standin):
    """What all ranks get when rank r brings r + 1."""
    mesh.send(standin.runs(mesh.size, "sum", feeds=[[np.array([r + 1.0])] for r in range(mesh.size)]))
    return {float(mesh.collect().values[0][0]) for _ in range(mesh.size)}


def test_a_program_that_ends_without_closing_is_quiet_and_leaves_nothing(driver, vanishes):
    process, _, family = driver('"where"')
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == b""
    settings = out.decode().splitlines()[0].split("] [")[1].strip("]").split(", ")
    assert len(set(settings)) == 1 and int(settings[0]) >= 1, "BLAS threads are set for every worker"
    assert all(vanishes(pid) for pid in family)
    assert not os.path.exists(process.directory)


def test_ctrl_c_while_waiting_ends_the_program_and_its_workers(driver, vanishes):
    process, _, family = driver('"sleep", 600.0')
    os.killpg(process.pid, signal.SIGINT)       # the whole foreground group, as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.rstrip().endswith(b"KeyboardInterrupt") and b"raylet" not in err
    assert all(vanishes(pid) for pid in family)


def test_workers_do_not_outlive_a_killed_driver(driver, vanishes):
    process, workers, family = driver('"sleep", 600.0')
    agents = [psutil.Process(pid) for pid in family if pid not in workers]
    process.kill()
    assert all(vanishes(pid) for pid in workers)
    # Two agents of Ray's own would stay for another minute, trying to report the loss of their raylet.
    for agent in agents:
        if agent.is_running():
            agent.kill()
    shutil.rmtree(process.directory)


def test_ctrl_c_while_ray_starts_takes_effect_when_it_has_started():
    done = []
    with pytest.raises(KeyboardInterrupt), ray_connect.interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), ray_connect.interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert len(done) == 1


def test_directories_of_killed_drivers_are_swept(tmp_path, monkeypatch):
    living, killed = (ray_connect.Directory(str(tmp_path)) for _ in range(2))
    killed._lock.close()
    monkeypatch.setattr(ray_connect, "SWEEP_AFTER_SECONDS", -1.0)
    new = ray_connect.Directory(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {os.path.basename(d.path) for d in (living, new)}
    living.remove()
    new.remove()
    assert not list(tmp_path.iterdir())


def test_more_workers_than_slots_is_an_error_that_says_what_to_do(join):
    with pytest.raises(MeshError, match=r"workers=5: each needs 1 CPU, .* room for 2 on 2 nodes; use"):
        join(5)
    with pytest.raises(MeshError, match="each needs 1 CPU and 1 GPU, and this Ray has room for 0"):
        join(1, devices="gpu")


def test_slots_that_others_use_are_an_error_after_a_while(join, monkeypatch):
    from meshtape.cluster import ray_actors

    monkeypatch.setattr(ray_actors, "PLACEMENT_SECONDS", 1.0)
    join(2)
    with pytest.raises(MeshError, match="others use them"):
        join(1)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_an_address_without_a_ray_head_is_one_sentence(address, monkeypatch, tmp_path):
    from meshtape.cluster import ray_mesh

    stale = tmp_path / "ray_current_cluster"
    stale.write_text("127.0.0.1:1")
    monkeypatch.setattr(ray_connect, "CURRENT_CLUSTER", stale)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(MeshError, match=r"no Ray head answers there .*; start one with"):
        ray_mesh.start(2, address=address)


def test_two_nodes_meet_over_tcp_and_the_cluster_stays(join, standin, monkeypatch):
    monkeypatch.setenv("MESHTAPE_TRANSPORT", "tcp")
    with join(2) as mesh:
        assert len(set(mesh.nodes)) == 2 and mesh.links == ["tcp"]
        assert total(mesh, standin) == {3.0}
        sites = mesh._processes.sites
        assert all(isinstance(site.channel, tuple) for site in sites), "workers listen on TCP"
        assert sites[0].ip == sites[1].ip and sites[0].node_id != sites[1].node_id
    with join(2, channel="ray") as mesh:
        assert total(mesh, standin) == {3.0}


def test_a_joined_cluster_defaults_to_one_worker_per_node(join, standin):
    with join(None) as mesh:
        assert mesh.size == 2 and len(set(mesh.nodes)) == 2
        assert total(mesh, standin) == {3.0}


def test_a_ray_that_the_user_initialised_is_used_and_left_running(two_nodes, join, standin):
    import ray

    ray.init(address=two_nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        with join(1) as mesh:
            assert total(mesh, standin) == {1.0}
        assert ray.is_initialized()
        with pytest.raises(MeshError, match="already connected to the Ray at"):
            ray_connect.connect("127.0.0.1:1")
    finally:
        ray.shutdown()


def test_a_worker_that_cannot_be_made_is_explained(two_nodes, standin):
    from meshtape.cluster import ray_mesh

    with pytest.raises(MeshError, match="TypeError: needs_nothing"):
        ray_mesh.start(1, address=two_nodes.address, make_worker=_needs_nothing())
    with pytest.raises(MeshError, match="TypeError: needs_nothing"):
        ray_mesh.start(1, address=two_nodes.address, make_worker=_needs_nothing(), channel="ray")


def _needs_nothing():
    def make(*args):
        raise TypeError("needs_nothing")
    return make


def test_a_worker_whose_raylet_is_killed_leaves_and_is_noticed(two_nodes, join, standin, vanishes):
    """Last in this module: it takes a node away."""
    mesh = join(2)
    worker = mesh.places[1].pid
    os.kill(psutil.Process(worker).ppid(), signal.SIGKILL)
    with pytest.raises(WorkerLost, match="worker 1"):
        mesh.collect()
    assert vanishes(worker)
