"""A worker that does what a batch's scalars say, and a process that serves one without Ray.

A Run's scalars are ["echo"] (reply with the feeds), ["sum"] (all-reduce the feeds over every mesh axis),
["sleep", seconds], ["spin", seconds] (holding the interpreter), ["break"], ["where"] (reply with the process
id, its parent's and the settings).
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

from meshtape.cluster.channel import Listener
from meshtape.cluster.serve import Assignment, Guard, serve
from meshtape.runtime.collectives.endpoint import Endpoint
from meshtape.runtime.errors import CommError
from meshtape.runtime.protocol import Failure, Reply, Run

SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class StandIn:
    def __init__(self, rank, mesh_shape, communicators, device="cpu"):
        self.rank, self.communicators, self.device = rank, communicators, device

    def run(self, run):
        what, *arguments = run.scalars
        values, failures = list(run.feeds), []
        if what in ("sleep", "spin"):
            end = time.monotonic() + arguments[0]
            while time.monotonic() < end:
                if what == "sleep":
                    time.sleep(arguments[0])
        elif what == "sum":
            for communicator in self.communicators:
                try:
                    values = [communicator.all_reduce(x) for x in values]
                except CommError as error:
                    failures.append(Failure(run.batch, 0, self.rank, "CommError", str(error)))
        elif what == "where":
            values = [np.array([os.getpid(), os.getppid()]),
                      np.array([int(os.environ.get(s, 0)) for s in SETTINGS])]
        elif what == "break":
            raise ValueError("broken on purpose")
        return Reply(self.rank, run.batch, failures, values)

    def close(self):
        for communicator in self.communicators:
            communicator.close()


def runs(size, *scalars, batch=0, feeds=None):
    """One batch for a stand-in mesh; feeds[r] is rank r's list."""
    return [Run(batch, b"", [], list(scalars), feeds[r] if feeds else [], [], [], [], None)
            for r in range(size)]


def main():
    """In comes {"secret", "host", "connect_within"}, out go addresses, in comes [rank, shape, addresses]."""
    told = json.loads(sys.stdin.readline())
    secret = bytes.fromhex(told["secret"])
    guard = Guard(told["connect_within"])
    endpoint, listener = Endpoint(None, secret, 30.0), Listener(told["host"], secret)
    print(json.dumps({"endpoint": endpoint.address, "channel": listener.address}), flush=True)
    rank, shape, addresses = json.loads(sys.stdin.readline())
    serve(listener, endpoint, Assignment(rank, tuple(shape), addresses, "cpu", 30.0), guard, StandIn)


if __name__ == "__main__":
    main()
