"""What happens when something breaks on a mesh of Ray workers: one clear error, no orphan, and on it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import digits
import numpy as np
import psutil
import pytest
from spy import Spy

import meshtape as mt
from meshtape import nn
from meshtape.scheduler import current

pytestmark = pytest.mark.ray
F = nn.functional


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A Ray of two nodes with two slots each, which the meshes of this module use and leave running."""
    import ray
    from ray.cluster_utils import Cluster

    mt.shutdown()
    options = {"num_cpus": 2, "object_store_memory": 80 * 2 ** 20}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    cluster.add_node(**options)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def mesh(two_nodes: Any) -> Iterator[Any]:
    """Two Ray workers, one on each node."""
    yield mt.init(workers=2)
    mt.shutdown()


def places() -> list[Any]:
    return current.session().mesh.places


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Wait for a process to end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def agree(losses: list[float]) -> None:
    np.testing.assert_allclose(losses, digits.LOSSES[:len(losses)], rtol=1e-9, atol=0)


# --- as it should be --------------------------------------------------------------------------------------

def test_losses_on_two_ray_workers_are_torchs_in_one_message_per_worker_and_step(mesh: Any) -> None:
    spy = Spy(current.session())
    agree(digits.train())
    sent = spy.take()
    assert mesh.backend == "ray" and len({p.pid for p in places()} | {os.getpid()}) == 3
    assert len(sent) <= digits.STEPS + 2 and not any(b.fresh for b in sent[4:])


def test_losses_on_ray_workers_with_sharded_parameters_are_torchs(two_nodes: Any) -> None:
    with mt.init(workers=4, mesh={"data": 2, "model": 2}):
        plan = {"*": {"data": mt.Shard(0)}, "0.weight": {"model": mt.Shard(0), "data": mt.Shard(1)},
                "0.bias": {"model": mt.Shard(0)}, "2.weight": {"model": mt.Shard(1), "data": mt.Shard(0)}}
        agree(digits.train(15, prepare=lambda net: nn.parallelize(net, plan)))


def test_losses_on_two_nodes_over_tcp_are_torchs(two_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHTAPE_TRANSPORT", "tcp")
    with mt.init(workers=2, address=two_nodes.address) as mesh:
        assert len(set(mesh.nodes)) == 2
        agree(digits.train())


# --- a kernel fails ---------------------------------------------------------------------------------------

def test_a_kernel_that_fails_on_one_rank_names_everything_and_spoils_only_its_results(mesh: Any) -> None:
    kept = mt.tensor(np.arange(8.0), layout=mt.Shard(0))
    classes = np.zeros(8, np.int64)
    classes[6] = 11                                     # in the half of rank 1
    logits = mt.ones((8, 10), layout=mt.Shard(0), requires_grad=True)
    loss = F.cross_entropy(logits, mt.tensor(classes, layout=mt.Shard(0)))
    line = sys._getframe().f_lineno - 1
    loss.backward()
    after = kept.sum()                                  # recorded later in the same batch
    with pytest.raises(mt.WorkerError) as caught:
        mt.synchronize()
    text = str(caught.value)
    start = "cross_entropy((8, 10) float32 [S0], (8,) int64 [S0]) failed on rank 1: IndexError"
    assert text.startswith(start), text
    assert "target 11 is not one of 10 classes" in text and text.endswith(f"({__file__}:{line})"), text
    mt.synchronize()
    assert after.item() == 28.0
    np.testing.assert_array_equal(kept.numpy(), np.arange(8.0))
    for spoiled in (loss, loss * 2 + kept.sum(), logits.grad):
        with pytest.raises(mt.WorkerError) as again:
            spoiled.numpy()
        assert str(again.value) == text
    agree(digits.train(10))


def test_what_cannot_travel_in_a_message_is_an_error_and_no_more(mesh: Any) -> None:
    x = mt.tensor([1, 2])
    with pytest.raises(mt.WorkerError, match="too large"):
        (x + 2 ** 70).numpy()
    np.testing.assert_array_equal((x * (1 + 2j)).numpy(), [1 + 2j, 2 + 4j])
    np.testing.assert_array_equal((x + float("inf")).numpy(), [np.inf, np.inf])
    np.testing.assert_array_equal((x * True).numpy(), [1, 2])


# --- a worker is lost -------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_worker_is_named_within_five_seconds_and_a_new_mesh_works(two_nodes: Any, how: int) -> None:
    mt.init(workers=2, heartbeat_timeout=3.0)       # the default of 4 s leaves a busy machine half a second
    victim, other = places()[1], places()[0]
    spy = Spy(current.session())
    when = [0.0]

    def look(net: Any, opt: Any) -> None:
        if len(spy.batches) > 8 and not when[0]:
            os.kill(victim.pid, how)
            when[0] = time.monotonic()

    with pytest.raises(mt.WorkerLost, match=rf"worker 1 \(cpu, process {victim.pid} on ") as caught:
        digits.train(look=look)
    assert time.monotonic() - when[0] < 5.0
    assert caught.value.rank == 1 and caught.value.node == victim.node and victim.node in str(caught.value)
    with pytest.raises(mt.MeshError, match=r"init\(\)"):
        mt.ones(3).sum().item()
    mt.shutdown()
    with mt.init(workers=2):
        agree(digits.train(10))
    assert gone(victim.pid) and gone(other.pid)


def test_after_a_loss_init_makes_a_new_mesh_without_shutdown(two_nodes: Any) -> None:
    mt.init(workers=2)
    old = mt.ones(3)
    os.kill(places()[0].pid, signal.SIGKILL)
    with pytest.raises(mt.WorkerLost, match="worker 0"):
        for _ in range(1000):
            mt.synchronize()
            (old + 1).numpy()
    with mt.init(workers=3):
        assert (mt.ones(3) + 1).sum().item() == 6.0
        with pytest.raises(mt.SessionClosed, match="shut down or replaced"):
            old.numpy()


# --- the driver ends --------------------------------------------------------------------------------------

# A program that trains for ever, after saying who its workers are.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs ignore it
sys.path.insert(0, {tests!r})
import digits
import meshtape as mt
from meshtape import nn, optim
from meshtape.scheduler import current

mt.init(workers=2)
net = digits.model()
opt = optim.AdamW(net.parameters())
step = 0
while True:
    for x, y in mt.data.DataLoader(digits.data(), 100, shuffle=True):
        loss = nn.functional.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        step += 1
        if step == 20:
            loss.item()
            print(*(place.pid for place in current.session().mesh.places), flush=True)
"""


@pytest.fixture
def program(tmp_path: Any) -> Iterator[Callable[[], tuple[subprocess.Popen[str], list[int], set[int]]]]:
    """start() -> the running PROGRAM, its workers' pids, and those of all its descendants."""
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], list[int], set[int]]:
        path = tmp_path / "train.py"
        path.write_text(PROGRAM.format(tests=os.path.dirname(digits.__file__)))
        process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2, process.communicate()[1]
        family = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        return process, workers, family | set(workers)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_ctrl_c_in_the_middle_of_training_ends_everything_quietly(program: Any) -> None:
    process, _, family = program()
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)               # the whole foreground group, as a terminal does
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 10.0
    assert process.returncode != 0 and err.rstrip().endswith("KeyboardInterrupt"), err
    assert err.count("Traceback") == 1 and "Exception in thread" not in err and "raylet" not in err, err
    assert all(gone(pid) for pid in family)


def test_a_killed_driver_leaves_no_worker(program: Any) -> None:
    process, workers, _ = program()
    process.kill()
    assert all(gone(pid) for pid in workers)
