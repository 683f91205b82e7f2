"""Meshes of every kind, made of stand-in workers."""

from __future__ import annotations

import importlib.util
import json
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshtape.cluster.channel import dial
from meshtape.cluster.feed import FeedMemory
from meshtape.cluster.local import InlineMesh, ThreadMesh
from meshtape.cluster.mesh import mesh_axes
from meshtape.cluster.process_mesh import Place
from meshtape.cluster.socket_mesh import SocketMesh

STANDIN = Path(__file__).with_name("standin.py")


def _load():
    spec = importlib.util.spec_from_file_location("cluster_standin", STANDIN)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def standin():
    return sys.modules.get("cluster_standin") or _load()


class Children:
    """Stand-in processes; what Ray is to a real mesh."""

    def __init__(self):
        self.processes = []
        self.killed = self.closed = False

    def start(self, told):
        self.processes.append(subprocess.Popen([sys.executable, str(STANDIN)], stdin=subprocess.PIPE,
                                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        self.tell(-1, told)

    def tell(self, rank, what):
        print(json.dumps(what), file=self.processes[rank].stdin, flush=True)

    def ended(self):
        return next((r for r, p in enumerate(self.processes) if p.poll() is not None), None)

    def cause(self, rank):
        return ""

    def kill(self):
        """Hanging up must be enough for a worker that is not stopped, so this kills nothing yet."""
        self.killed = True

    def close(self):
        self.closed = True
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


@pytest.fixture
def process_mesh():
    """make(workers, axes=None, host=None, heartbeat_timeout=4.0): a mesh of processes without Ray."""
    made = []

    def make(workers, axes=None, host=None, heartbeat_timeout=4.0):
        names, shape = mesh_axes(workers, axes)
        secret, children = secrets.token_bytes(16), Children()
        made.append(children)
        for _ in range(workers):
            children.start({"secret": secret.hex(), "host": host, "connect_within": 30.0})
        told = [json.loads(process.stdout.readline()) for process in children.processes]
        for rank in range(workers):
            children.tell(rank, [rank, shape, [t["endpoint"] for t in told]])
        addresses = [t["channel"] if isinstance(t["channel"], str) else tuple(t["channel"]) for t in told]
        memory = FeedMemory()
        channels = [dial(address, secret, 10.0, memory) for address in addresses]
        places = [Place(r, f"node{r}", p.pid, "cpu") for r, p in enumerate(children.processes)]
        mesh = SocketMesh("processes", names, shape, places, channels, children, heartbeat_timeout,
                          memory)
        mesh.wait_until_ready(30.0)
        mesh.children = children
        return mesh

    yield make
    for children in made:
        children.close()


@pytest.fixture(scope="module")
def ray_here(standin):
    """A Ray with slots for four workers, which meshes use and leave running."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             object_store_memory=80 * 2**20)
    ray.cloudpickle.register_pickle_by_value(standin)
    yield ray
    ray.shutdown()


@pytest.fixture(params=["inline", "threads", "processes", "tcp", pytest.param("ray", marks=pytest.mark.ray),
                        pytest.param("ray calls", marks=pytest.mark.ray)])
def any_mesh(request, standin):
    """make(workers, axes=None): a mesh of the kind under test (always one worker if inline)."""
    made = []

    def make(workers, axes=None):
        match request.param:
            case "inline":
                mesh = InlineMesh(tuple(axes or ["data"]), standin.StandIn)
            case "threads":
                mesh = ThreadMesh(workers, axes, 30.0, standin.StandIn)
            case "processes" | "tcp" as kind:
                host = "127.0.0.1" if kind == "tcp" else None
                mesh = request.getfixturevalue("process_mesh")(workers, axes, host)
            case kind:
                request.getfixturevalue("ray_here")
                from meshtape.cluster import ray_mesh
                mesh = ray_mesh.start(workers, axes, channel="ray" if kind == "ray calls" else "socket",
                                      make_worker=standin.StandIn, timeout=30.0)
        made.append(mesh)
        return mesh

    yield make
    for mesh in made:
        mesh.close()


def alive(pid):
    """True if the process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def vanishes():
    """vanishes(pid, seconds=20): wait for a process to end; False if it does not."""
    def wait(pid, seconds=20.0):
        end = time.monotonic() + seconds
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.05)
        return not alive(pid)
    return wait
