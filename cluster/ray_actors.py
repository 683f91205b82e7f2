"""The actors of a mesh: where Ray puts them, how they are prepared, ranked, watched and ended."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from math import floor
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from meshtape.cluster.actor import Order, Site, WorkerActor
from meshtape.cluster.placement import ranking
from meshtape.cluster.ray_connect import RayConnection, first_line
from meshtape.runtime.errors import MeshError

# Placement on a cluster with room is immediate; longer means that somebody else holds the slots.
PLACEMENT_SECONDS = 15.0
# A worker's process has to start, and to import NumPy from a possibly cold network disk.
PREPARE_SECONDS = 120.0
CLOSE_SECONDS = 5.0
HEALTH = "health"
# How the lines start in which Ray says why an actor died.
TELLING = ("The actor is dead", "The actor died", "Task was killed")


class RayActors:
    """One actor per worker. Implements the mesh's `Processes`."""

    def __init__(self, connection: RayConnection) -> None:
        self.connection = connection
        self.handles: list[Any] = []
        self.sites: list[Site] = []
        self._group: Any = None
        self._running: list[Any] = []       # rank's run() call, which ends only with its worker
        self._processes: list[int] = []     # pidfds, where the workers are ours alone and on this machine
        self._killed = False

    def spawn(self, workers: int, gpus: float, environment: dict[str, str], health: bool) -> None:
        """Reserve a slot per worker, with so many GPUs in it, and start the actors there; `health` gives
        beat() a thread of its own.
        """
        bundle = {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}
        check_slots(workers, bundle, self.connection.started)
        # One CPU worker per node is there to use that node's cores; otherwise neighbours share memory.
        # Strict: plain SPREAD doubles up on a node while slots of a mesh just closed are being given back.
        able = sum(node["Resources"].get("CPU", 0) >= 1 for node in alive_nodes())
        strategy = "STRICT_SPREAD" if not gpus and workers == able > 1 else "PACK"
        self._group = placement_group([bundle] * workers, strategy=strategy)
        if not self._group.wait(timeout_seconds=PLACEMENT_SECONDS):
            free = ray.available_resources()  # type: ignore[no-untyped-call]
            raise MeshError(f"workers={workers}: the cluster has as many slots, but others use them (free: "
                            f"{free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU); end other jobs or ask "
                            "for fewer workers")
        # With concurrency groups Ray makes no call on the actor's main thread, so only where they are needed.
        groups: dict[str, Any] = {"concurrency_groups": {HEALTH: 1}} if health else {"num_cpus": 1}
        actor = ray.remote(**groups)(WorkerActor)
        self.handles = [
            actor.options(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0,
                          scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
                          runtime_env={"env_vars": environment}).remote()
            for index in range(workers)]

    def prepare(self, order: Order, inner: int = 1) -> None:
        """Let every worker listen; afterwards handles and sites are in order of rank. `inner` is the extent
        of the last mesh axis.
        """
        sites = self.get([handle.prepare.remote(order) for handle in self.handles], PREPARE_SECONDS)
        order_of = ranking(sites, ray.get_runtime_context().get_node_id(), inner)
        self.handles = [self.handles[i] for i in order_of]
        self.sites = [sites[i] for i in order_of]
        if self.connection.started:
            self._processes = [os.pidfd_open(site.pid) for site in self.sites]

    def watch(self, calls: Sequence[Any]) -> None:
        """Watch these calls (one per rank), which end only when their actors do."""
        self._running = list(calls)

    def get(self, references: Sequence[Any], timeout: float) -> list[Any]:
        """Results of calls made while starting up; MeshError says what to do if they fail."""
        try:
            return list(ray.get(list(references), timeout=timeout))
        except GetTimeoutError as error:
            raise MeshError(f"the workers did not start within {timeout:g} s; look at the cluster's load and "
                            "at Ray's logs, /tmp/ray/session_latest/logs on their nodes") from error
        except (RayError, RuntimeError) as error:
            raise MeshError(explain(error)) from error

    def ended(self) -> int | None:
        if self._running and ray.is_initialized():
            ready, _ = ray.wait(self._running, timeout=0)
            if ready:
                return self._running.index(ready[0])
        return None

    def cause(self, rank: int) -> str:
        if not self._running or not ray.is_initialized():
            return ""
        ready, _ = ray.wait([self._running[rank]], timeout=0.2)
        if ready:
            try:
                ray.get(ready[0])
            except RayError as error:
                return cause_of(error)
        return ""

    def kill(self) -> None:
        if self._killed or not ray.is_initialized():
            return
        self._killed = True
        for handle in self.handles:
            with suppress(RayError, ValueError):        # ValueError: Ray has forgotten a dead actor
                ray.kill(handle, no_restart=True)

    def close(self) -> None:
        self.kill()
        if self._group is not None and ray.is_initialized():
            if self._running:
                ray.wait(self._running, num_returns=len(self._running), timeout=CLOSE_SECONDS)
            remove_placement_group(self._group)
            self._group = None
        end_processes(self._processes)
        self._processes = []
        self.connection.close()


def alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def check_slots(workers: int, bundle: dict[str, float], started: bool) -> None:
    """MeshError if the cluster cannot hold the workers even when it is idle."""
    nodes = [node["Resources"] for node in alive_nodes()]
    slots = sum(min(floor(node.get(name, 0) / amount) for name, amount in bundle.items()) for node in nodes)
    if slots < workers:
        what = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        more = "" if started else "add nodes to the cluster, "
        if not slots and "GPU" in bundle:
            raise MeshError(f"workers={workers}: each needs {what}, and this Ray has room for 0, since no "
                            f'node has a GPU to give; {more}or use devices="cpu"')
        raise MeshError(f"workers={workers}: each needs {what}, and this Ray has room for {slots} on "
                        f'{len(nodes)} nodes; use workers={max(slots, 1)}, {more}or use backend="local" for '
                        "threads of this process")


def explain(error: BaseException) -> str:
    """Why actors did not come up, in one sentence that says what to do."""
    text = str(error)
    if "No module named 'meshtape" in text:
        return ("a node of the cluster cannot import meshtape; install the same version on every node, or "
                'call ray.init(address, runtime_env={"pip": ["meshtape"]}) before init()')
    if "No module named" in text:
        line = next(line.strip() for line in text.splitlines() if "No module named" in line)
        return f"a worker cannot start ({line}); install the same packages on every node"
    return f"the workers did not start: {cause_of(error)}"


def cause_of(error: BaseException) -> str:
    """The telling line of one of Ray's long errors."""
    if isinstance(error, RayTaskError):
        return f"it broke with {type(error.cause).__name__}: {error.cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(TELLING)]
    line = telling[-1] if telling else first_line(error)
    return line.partition(" Some common causes")[0].rstrip(".")


def end_processes(pidfds: Sequence[int]) -> None:
    """Wait for processes to end; those that do not (a stopped one cannot) are killed."""
    deadline = time.monotonic() + CLOSE_SECONDS
    for pidfd in pidfds:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
