"""Collectives between processes, over shared memory and TCP. Run as a script, this file is such a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshtape.runtime.collectives.endpoint import Endpoint
from meshtape.runtime.errors import CommAborted, CommError, CommTimeout, MeshError, PeerLost, ShapeError

sys.path.insert(0, str(Path(__file__).parent))
import collective_cases as cases

SECRET = b"known to all"
KINDS = ["shm", "tcp"]


def endpoint_of(kind: str, secret: bytes = SECRET, timeout: float = 20.0) -> Endpoint:
    """An endpoint that uses shared memory, or pretends to be on a machine of its own."""
    endpoint = Endpoint(secret=secret, timeout=timeout)
    if kind == "tcp":
        endpoint.address["machine"] = endpoint.address["unix"]
    return endpoint


# -- the process


def serve() -> None:
    """Obey one JSON command a line, and answer each with one line."""
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    endpoints = {kind: endpoint_of(kind) for kind in KINDS}
    answer({kind: endpoint.address for kind, endpoint in endpoints.items()})
    addresses = json.loads(sys.stdin.readline())
    for kind in KINDS:
        endpoints[kind].connect(rank, [addresses[r][kind] for r in range(size)])
    answer("connected")
    comm: Any = None
    for line in sys.stdin:
        verb, *args = json.loads(line)
        try:
            if verb == "group":
                kind, ranks, timeout = args
                comm = endpoints[kind].group(ranks, timeout)
                answer(comm.kind)
            else:
                answer(COMMANDS[verb](comm, *args))
        except Exception as error:
            if not isinstance(error, CommError) and comm is not None:
                comm.abort(f"a test failed: {error!r}")
            answer({"error": type(error).__name__, "text": str(error), "at": time.monotonic()})


def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


def run_cases(comm: Any, first: int, last: int, largest: int) -> int:
    for seed in range(first, last):
        cases.run(comm, cases.random_case(seed, comm.size, largest))
    return last - first


def loop(comm: Any) -> None:
    """Collectives of all kinds until one fails."""
    small, large = np.ones(256, np.float32), np.ones(200_000, np.float32)
    while True:
        comm.all_reduce(small)
        comm.all_reduce(large)
        comm.broadcast(small, 0)
        comm.all_gather(small, [small.size] * comm.size)
        parts = comm.reduce_scatter_many([small, large], [0, 0])
        comm.all_gather_many(parts, [0, 0], [small.shape, large.shape])
        comm.barrier()


def keep_results(comm: Any, count: int) -> bool:
    """Results stay what they were while the communicator reuses its memory."""
    x = np.ones(count, np.float32)
    first, gathered = comm.all_reduce(x), comm.all_gather(x, [count] * comm.size)
    x[:] = 7
    for _ in range(3):
        comm.all_reduce(x)
        comm.all_gather(x, [count] * comm.size)
    return bool((first == comm.size).all() and (gathered == 1).all())


def both_ways(comm: Any, count: int) -> bool:
    """Everybody sends a large array to everybody at once; nobody may wait for another's buffer."""
    counts = [count] * comm.size
    got = comm.all_to_all(np.full(count * comm.size, comm.rank, np.uint8), counts, counts)
    return bool((got.reshape(comm.size, count) == np.arange(comm.size)[:, None]).all())


def close(comm: Any) -> None:
    comm.close()


COMMANDS: dict[str, Callable[..., Any]] = {
    "cases": run_cases, "loop": loop, "keep": keep_results, "both ways": both_ways, "close": close}


# -- the tests


class Fleet:
    """Processes that serve(), one a rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen([sys.executable, __file__, str(rank), str(size)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, env=environment) for rank in range(size)]
        addresses = self.answers(range(size))
        for rank in range(size):
            self.write(rank, addresses)
        assert self.answers(range(size)) == ["connected"] * size

    def write(self, rank: int, message: Any) -> None:
        stdin = self.processes[rank].stdin
        assert stdin is not None
        stdin.write(json.dumps(message) + "\n")
        stdin.flush()

    def answers(self, ranks: Any) -> list[Any]:
        out = []
        for rank in ranks:
            stdout = self.processes[rank].stdout
            assert stdout is not None
            out.append(json.loads(stdout.readline()))
        return out

    def all(self, ranks: Any, *command: Any) -> list[Any]:
        for rank in ranks:
            self.write(rank, command)
        return self.answers(ranks)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    fleet = Fleet(4)
    yield fleet
    fleet.stop()


@pytest.fixture(scope="module")
def pair() -> Iterator[Fleet]:
    fleet = Fleet(2)
    yield fleet
    fleet.stop()


@pytest.fixture
def doomed() -> Iterator[Fleet]:
    fleet = Fleet(3)
    yield fleet
    fleet.stop()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [(0, 1), (3, 0, 2), (0, 1, 2, 3)], ids=str)
def test_every_collective_gives_the_exact_result_between_processes(fleet: Fleet, kind: str,
                                                                   ranks: tuple[int, ...]) -> None:
    assert fleet.all(ranks, "group", kind, ranks, 20) == [kind] * len(ranks)
    assert fleet.all(ranks, "cases", 0, 1000, 1000) == [1000] * len(ranks)
    assert fleet.all(ranks, "cases", 1000, 1100, 300_000) == [100] * len(ranks)
    for count in (10, 100_000):
        assert fleet.all(ranks, "keep", count) == [True] * len(ranks)
    assert fleet.all(ranks, "both ways", 3_000_000) == [True] * len(ranks)
    fleet.all(ranks, "close")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_a_processor_each(pair: Fleet, kind: str) -> None:
    """No more ranks than processors: waits spin, where those of the larger fleet sleep at once."""
    assert pair.all((0, 1), "group", kind, (0, 1), 20) == [kind] * 2
    assert pair.all((0, 1), "cases", 5000, 7000, 1000) == [2000] * 2
    assert pair.all((0, 1), "cases", 7000, 7100, 300_000) == [100] * 2
    pair.all((0, 1), "close")


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_rank_is_lost_to_the_others_within_a_second(doomed: Fleet, kind: str) -> None:
    before = set(os.listdir("/dev/shm"))
    assert doomed.all(range(3), "group", kind, [0, 1, 2], 30) == [kind] * 3
    for rank in range(3):
        doomed.write(rank, ["loop"])
    time.sleep(0.3)
    doomed.processes[1].kill()
    killed = time.monotonic()
    for error in doomed.answers([0, 2]):
        assert error["error"] == "PeerLost" and "rank 1 " in error["text"], error
        assert error["at"] - killed < 1
    assert set(os.listdir("/dev/shm")) <= before
    for rank in (0, 2):
        doomed.processes[rank].stdin.close()  # type: ignore[union-attr]
        assert doomed.processes[rank].wait(timeout=5) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_rank_times_the_others_out(doomed: Fleet, kind: str) -> None:
    assert doomed.all(range(3), "group", kind, [0, 1, 2], 1.0) == [kind] * 3
    for rank in range(3):
        doomed.write(rank, ["loop"])
    time.sleep(0.3)
    doomed.processes[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    for error in doomed.answers([0, 2]):
        assert error["error"] == "CommTimeout" and "for ranks [1" in error["text"], error
        assert 0.8 < error["at"] - stopped < 2.5


def on_endpoints(kind: str, size: int, body: Callable[[Any], Any], timeout: float = 20.0) -> list[Any]:
    """body(communicator) on one thread per rank, each with an endpoint: results, or exceptions raised."""
    endpoints = [endpoint_of(kind) for _ in range(size)]
    addresses = [endpoint.address for endpoint in endpoints]
    results: list[Any] = [None] * size

    def target(rank: int) -> None:
        endpoints[rank].connect(rank, addresses)
        comm = endpoints[rank].group(range(size), timeout)
        try:
            results[rank] = body(comm)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for endpoint in endpoints:
        endpoint.close()
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_abort_reaches_waiting_and_late_ranks(kind: str) -> None:
    def body(comm: Any) -> None:
        comm.barrier()
        if comm.rank == 0:
            time.sleep(0.1)
            comm.abort("the step failed")
        if comm.rank == 2:
            time.sleep(0.3)
            comm.recv(np.empty(1), 1)
        comm.all_reduce(np.ones(100_000))

    start = time.monotonic()
    for error in on_endpoints(kind, 3, body):
        assert type(error) is CommAborted and str(error) == "the step failed"
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("kind", KINDS)
def test_abort_from_another_thread_frees_the_own_rank(kind: str) -> None:
    def body(comm: Any) -> None:
        if comm.rank == 0:
            threading.Timer(0.1, comm.abort, ("stop",)).start()
        comm.recv(np.empty(1), 1 - comm.rank)

    for error in on_endpoints(kind, 2, body):
        assert type(error) is CommAborted and str(error) == "stop"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("other", "named"), [
    (lambda comm: comm.barrier(), "barrier"),
    (lambda comm: comm.broadcast(np.ones(3, np.float32), 0), "broadcast of 3 float32"),
    (lambda comm: comm.all_reduce(np.ones(70_000, np.float32)), "all_reduce sum of 70000 float32"),
    (lambda comm: comm.all_reduce(np.ones(3, np.float32), "max"), "all_reduce max of 3 float32"),
    (lambda comm: comm.reduce_scatter_many([np.ones(3, np.float32)], [0]), "reduce_scatter_many sum of 3"),
])
def test_different_calls_name_each_other_instead_of_hanging(kind: str, other: Callable[[Any], Any],
                                                            named: str) -> None:
    def body(comm: Any) -> None:
        other(comm) if comm.rank == 1 else comm.all_reduce(np.ones(3, np.float32))

    for error in on_endpoints(kind, 3, body):
        assert isinstance(error, CommError) and not isinstance(error, CommTimeout | PeerLost)
        assert named in str(error) and "all_reduce sum of 3 float32" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_uneven_exchanges_name_the_ranks(kind: str) -> None:
    def body(comm: Any) -> None:
        comm.all_to_all(np.ones(2, np.uint8), [1, 1], [1, 1] if comm.rank else [1, 2])
        comm.barrier()

    first, second = on_endpoints(kind, 2, body)
    assert type(first) is CommError and "rank 1 sends 1" in str(first) and "expects 2" in str(first)
    assert isinstance(second, CommError) and "rank 1 sends 1" in str(second)


def test_resident_arrays_stand_one_behind_the_other_as_long_as_there_is_room() -> None:
    def body(comm: Any) -> None:
        via = comm.resident([(3, 5), (), (7,)], np.float32, 100)
        assert [x.shape for x in via.arrays] == [(3, 5), (), (7,)] and via.arrays[0].dtype == np.float32
        ends = [start + x.nbytes for start, x in zip(via.starts, via.arrays, strict=True)]
        assert via.starts[0] >= 100 and via.starts[1] >= ends[0] and via.starts[2] >= ends[1]
        assert via.stop == ends[2]
        assert comm.resident([(1 << 40,)], np.float32) is None
        with pytest.raises(ShapeError, match="make it for these"):
            comm.all_reduce_many([np.ones(3, np.float32)], via=via)
        comm.barrier()

    assert on_endpoints("shm", 2, body) == [None, None]
    assert on_endpoints("tcp", 2, lambda comm: comm.resident([(1,)], np.float32)) == [None, None]


def test_resident_arrays_in_different_places_are_noticed() -> None:
    def body(comm: Any) -> None:
        via = comm.resident([(4,)], np.float32, 128 * comm.rank)
        comm.reduce_scatter_many(via.arrays, [0], via=via)

    for error in on_endpoints("shm", 2, body):
        assert type(error) is CommError and "in different collectives" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_after_the_last_collective_disturbs_nobody(kind: str) -> None:
    def body(comm: Any) -> float:
        total = comm.all_reduce(np.ones(300_000))
        if comm.rank == 0:
            comm.send(total[:5], 1)
        if comm.rank == 1:
            time.sleep(0.2)
            comm.recv(total[:5], 0)
        comm.close()
        return float(total[0])

    assert on_endpoints(kind, 3, body) == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_rank_is_lost(kind: str) -> None:
    def body(comm: Any) -> None:
        if comm.rank == 1:
            comm.close()
        comm.barrier()

    first, second = on_endpoints(kind, 2, body)
    assert type(first) is PeerLost and "rank 1" in str(first) and "rank 0" in str(first)
    assert "closed" in str(second)


def test_a_wrong_secret_is_refused_on_both_sides() -> None:
    right, wrong = endpoint_of("shm", timeout=0.5), endpoint_of("shm", secret=b"guessed", timeout=0.5)
    addresses = [right.address, wrong.address]
    right.connect(0, addresses)
    wrong.connect(1, addresses)
    with pytest.raises(CommError, match=r"rank 0 at 127.0.0.1:\d+ does not know this session's secret"):
        wrong.group([0, 1])
    with pytest.raises(CommTimeout, match=r"rank 1 did not join group 0\.1#0 .* refused meanwhile: a caller"):
        right.group([0, 1])
    right.close()
    wrong.close()


def test_strangers_do_no_harm() -> None:
    """A caller that talks nonsense, one that says nothing, one that hangs up."""
    import socket
    first, second = endpoint_of("shm"), endpoint_of("shm")
    strangers = []
    for text in (b"GET / HTTP/1.1\r\n\r\n" * 9, b"", b"mesh"):
        sock = socket.create_connection(("127.0.0.1", first.address["port"]))
        sock.sendall(text)
        strangers.append(sock)
    strangers[-1].close()
    addresses = [first.address, second.address]
    first.connect(0, addresses)
    second.connect(1, addresses)
    other = threading.Thread(target=lambda: second.group([0, 1]).barrier())
    other.start()
    first.group([0, 1]).barrier()
    other.join()
    strangers[0].close()
    strangers[1].close()
    first.close()
    second.close()


def test_a_dead_address_and_wrong_ranks_are_told_apart() -> None:
    dead, alive = endpoint_of("shm"), endpoint_of("shm", timeout=0.3)
    addresses = [dead.address, alive.address]
    dead.close()
    with pytest.raises(ShapeError, match="call connect"):
        alive.group([1])
    with pytest.raises(ShapeError, match="not this endpoint's address"):
        alive.connect(0, addresses)
    alive.connect(1, addresses)
    with pytest.raises(ShapeError, match="no rank twice"):
        alive.group([0])
    with pytest.raises(PeerLost, match=r"rank 0 at .* refused rank 1's connection"):
        alive.group([0, 1])
    assert alive.group([1]).kind == "self"
    alive.close()
    with pytest.raises(MeshError, match="needs the session's secret"):
        Endpoint()


def test_peers_that_only_seem_to_share_a_machine_use_tcp() -> None:
    """One member's unix socket is out of one other's reach: all must agree on what works for all."""
    endpoints = [endpoint_of("shm") for _ in range(3)]
    endpoints[1].address["unix"] = "meshtape-nowhere"
    addresses = [endpoint.address for endpoint in endpoints]
    kinds = [""] * 3

    def target(rank: int) -> None:
        endpoints[rank].connect(rank, addresses)
        comm = endpoints[rank].group([0, 1, 2])
        kinds[rank] = comm.kind if comm.all_reduce(np.ones(1))[0] == 3 else "wrong"

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for endpoint in endpoints:
        endpoint.close()
    assert kinds == ["tcp"] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_that_died_before_is_lost_to_those_who_wait_for_its_call(kind: str) -> None:
    alive, dead = endpoint_of(kind), endpoint_of(kind)
    alive.connect(0, [alive.address, dead.address])
    dead.close()
    start = time.monotonic()
    with pytest.raises(PeerLost, match=r"rank 1 died or was closed before it joined group 0\.1#0"):
        alive.group([0, 1])
    assert time.monotonic() - start < 1.5
    alive.close()


def test_addresses_are_plain_values() -> None:
    endpoint = endpoint_of("shm")
    assert json.loads(json.dumps(endpoint.address)) == endpoint.address
    endpoint.close()


if __name__ == "__main__":
    serve()
