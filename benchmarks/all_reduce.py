"""all_reduce among processes of one machine, size by size: our transports beside torch's gloo, in one run.

    python benchmarks/all_reduce.py [--rounds 7] [--ranks 2] [--contenders threads,shm,tcp,gloo]
                                    [--largest 67108864]

Microseconds of one float32 all_reduce in place, medians over rounds of the mean over a few to a thousand
calls, as the slowest rank sees it. The contenders take turns at each size. Ratios above 1: faster than gloo.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import _runner
import numpy as np

from meshtape.runtime.collectives.endpoint import Endpoint
from meshtape.runtime.collectives.threads import ThreadGroup

SIZES = [1 << k for k in range(10, 27, 2)]
CONTENDERS = ("threads", "shm", "tcp", "gloo")
SECRET = b"benchmark"

Reduce = Callable[[], Any]


def repetitions(size: int) -> int:
    return max(3, min(1000, (64 << 20) // size // 4))


def ours(comm: Any, size: int) -> Reduce:
    x = np.zeros(size // 4, np.float32)
    return lambda: comm.all_reduce(x, out=x)


def gloo(role: _runner.Role, ranks: int) -> Callable[[int], Reduce]:
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{role.port}", rank=role.rank,
                            world_size=ranks)

    def reducer(size: int) -> Reduce:
        tensor = torch.zeros(size // 4)
        return lambda: dist.all_reduce(tensor)

    return reducer


def transport(role: _runner.Role, ranks: int) -> Callable[[int], Reduce]:
    """Shared memory, or TCP because the ranks pretend to be on different machines."""
    endpoint = Endpoint(secret=SECRET)
    if role.name == "tcp":
        endpoint.address["machine"] = f"pretended {role.rank}"
    endpoint.connect(role.rank, role.meet(endpoint.address))
    comm = endpoint.group(range(ranks))
    return lambda size: ours(comm, size)


def calls(reduce: Reduce, count: int) -> float:
    """Seconds per call, after a few calls to warm up."""
    for _ in range(min(3, count)):
        reduce()
    start = time.perf_counter()
    for _ in range(count):
        reduce()
    return (time.perf_counter() - start) / count


def among_threads(ranks: int, size: int, count: int) -> float:
    group, times = ThreadGroup(ranks), [0.0] * ranks

    def target(rank: int) -> None:
        times[rank] = calls(ours(group.communicator(rank), size), count)

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(times)


def build(role: _runner.Role) -> tuple[_runner.Run, None]:
    ranks = int(role.case)
    if role.name == "threads":
        return lambda count, size: among_threads(ranks, size, count), None
    reducer = (gloo if role.name == "gloo" else transport)(role, ranks)
    return lambda count, size: calls(reducer(size), count), None


def main() -> None:
    parser = _runner.parser(__doc__, ["2"], CONTENDERS, rounds=7, case="ranks")
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    options = parser.parse_args()
    if options.serve:
        _runner.serve(build, options)
        return
    names = options.contenders.split(",")
    peers = [name for name in names if name != "gloo" and "gloo" in names]
    wanted = {name: (1 if name == "threads" else int(options.ranks), {}) for name in names}
    print(_runner.row("bytes", [*names, *(f"gloo/{name}" for name in peers)]) + "   us")
    figures = {}
    with _runner.contenders(__file__, options.ranks, wanted) as running:
        for size in [s for s in SIZES if s <= options.largest]:
            turns = {name: (lambda c=c, size=size: 1e6 * c.seconds(repetitions(size), size))
                     for name, c in running.items()}
            figures[size] = _runner.take_turns(turns, options.rounds)
            found = _runner.medians(figures[size])
            print(_runner.row(str(size), [*(f"{t:.1f}" for t in found.values()),
                                          *(f"{found['gloo'] / found[name]:.1f}" for name in peers)]),
                  flush=True)
    _runner.write_json(options.json, figures)


if __name__ == "__main__":
    main()
