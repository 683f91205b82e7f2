"""One rank of a group that exchanges by NCCL, as a program: rank and size are its arguments. Writes its
endpoint's address, reads the list of all, and writes how many random cases came out right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
sys.path.insert(0, str(Path(__file__).parent))
import collective_cases as cases
from device_ranks import ByHost

from meshtape.runtime.collectives.endpoint import Endpoint
from meshtape.runtime.collectives.nccl import NcclCommunicator
from meshtape.runtime.gpu import open_device


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    endpoint = Endpoint(secret=b"of a test", timeout=60.0)
    print(json.dumps(endpoint.address), flush=True)
    endpoint.connect(rank, json.loads(sys.stdin.readline()))
    device = open_device()
    with device.active():
        comm: Any = NcclCommunicator(endpoint.group(range(size)), device)
        programme = [cases.random_case(seed, size, 3000) for seed in range(100)]
        for case in programme:
            cases.run(ByHost(comm), case)
        comm.barrier()
        comm.close()
    print(f"{len(programme)} cases")


if __name__ == "__main__":
    main()
