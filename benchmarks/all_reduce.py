"""all_reduce among processes of one machine, size by size: our transports beside torch's gloo, in one run.

    python benchmarks/all_reduce.py [--ranks 2] [--kinds threads shm tcp gloo] [--largest 67108864]

Every figure is the median over rounds of the time of one float32 all_reduce in place, as rank 0 sees it. The
contestants take turns at each size, so that all meet the same machine. A ratio above 1: faster than gloo.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from meshtape.runtime.collectives.endpoint import Endpoint
from meshtape.runtime.collectives.threads import ThreadGroup

SIZES = [1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26]
SECRET = b"benchmark"
ROUNDS = 5


def repetitions(size: int) -> int:
    return max(3, min(1000, (64 << 20) // size // 4))


def timed(reduce: Callable[[], Any], count: int) -> float:
    """Seconds per call, after a few calls to warm up."""
    for _ in range(min(3, count)):
        reduce()
    start = time.perf_counter()
    for _ in range(count):
        reduce()
    return (time.perf_counter() - start) / count


def gloo(rank: int, ranks: int, port: int) -> Callable[[int], Callable[[], Any]]:
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)

    def reducer(size: int) -> Callable[[], Any]:
        tensor = torch.zeros(size // 4)
        return lambda: dist.all_reduce(tensor)

    return reducer


def ours(comm: Any) -> Callable[[int], Callable[[], Any]]:
    def reducer(size: int) -> Callable[[], Any]:
        x = np.zeros(size // 4, np.float32)
        return lambda: comm.all_reduce(x, out=x)

    return reducer


def serve(rank: int, ranks: int, port: int, kinds: list[str]) -> None:
    """One process: make the communicators, then time what the parent asks for, line by line."""
    contestants = {}
    for kind in kinds:
        if kind == "gloo":
            contestants[kind] = gloo(rank, ranks, port)
            continue
        endpoint = Endpoint(secret=SECRET)
        if kind == "tcp":
            endpoint.address["machine"] = f"pretended {rank}"
        print(json.dumps(endpoint.address), flush=True)
        endpoint.connect(rank, json.loads(sys.stdin.readline()))
        contestants[kind] = ours(endpoint.group(range(ranks)))
    for line in sys.stdin:
        kind, size = json.loads(line)
        print(json.dumps(timed(contestants[kind](size), repetitions(size))), flush=True)
    if "gloo" in kinds:
        import torch.distributed as dist
        dist.destroy_process_group()


class Processes:
    def __init__(self, ranks: int, kinds: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen([sys.executable, __file__, "--serve", str(rank), "--port", str(port), "--ranks",
                              str(ranks), "--kinds", *kinds], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True, env=environment) for rank in range(ranks)]
        for kind in kinds:
            if kind != "gloo":
                self.tell(self.answers())

    def tell(self, message: Any) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

    def answers(self) -> list[Any]:
        return [json.loads(process.stdout.readline()) for process in self.processes if process.stdout]

    def time(self, kind: str, size: int) -> float:
        self.tell([kind, size])
        return float(self.answers()[0])

    def stop(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def time_threads(ranks: int, size: int) -> float:
    group, times = ThreadGroup(ranks), [0.0] * ranks

    def target(rank: int) -> None:
        times[rank] = timed(ours(group.communicator(rank))(size), repetitions(size))

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times[0]


def measure(ranks: int, kinds: list[str], largest: int) -> None:
    processes = Processes(ranks, [kind for kind in kinds if kind != "threads"])
    print(f"all_reduce of float32, {ranks} ranks, {os.cpu_count()} processors: microseconds (times gloo's "
          "speed)")
    print("bytes".rjust(10) + "".join(kind.rjust(20) for kind in kinds))
    for size in [s for s in SIZES if s <= largest]:
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(ROUNDS):
            for kind in kinds:
                alone = kind == "threads"
                times[kind].append(time_threads(ranks, size) if alone else processes.time(kind, size))
        median = {kind: statistics.median(t) * 1e6 for kind, t in times.items()}
        cells = []
        for kind in kinds:
            ratio = f" ({median['gloo'] / median[kind]:.1f}x)" if "gloo" in kinds and kind != "gloo" else ""
            cells.append(f"{median[kind]:.1f}{ratio}".rjust(20))
        print(str(size).rjust(10) + "".join(cells), flush=True)
    processes.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["threads", "shm", "tcp", "gloo"])
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, args.ranks, args.port, args.kinds)
        return
    kinds = [kind for kind in args.kinds if kind != "gloo" or importlib.util.find_spec("torch")]
    measure(args.ranks, kinds, args.largest)


if __name__ == "__main__":
    main()
