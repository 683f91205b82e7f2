"""Device communicators on threads, and a view of one through which NumPy arrays go: for the generic cases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import emulator
import numpy as np

from meshtape.runtime.collectives.threads import ThreadGroup
from meshtape.runtime.errors import CommError


def on_devices(size: int, make: Callable[[Any, Any], Any], body: Callable[[Any], Any],
               timeout: float = 20.0, opens: Callable[[], Any] = emulator.device) -> list[Any]:
    """body(communicator) on one thread per rank, each with a device of its own, made by opens(): what each
    returned, or the exception it raised. make(host communicator, device) makes the communicator.
    """
    group = ThreadGroup(size, timeout)
    results: list[Any] = [None] * size

    def target(rank: int) -> None:
        inner = group.communicator(rank)
        try:
            device = opens()
            with device.active():
                comm = make(inner, device)
                try:
                    results[rank] = body(comm)
                except Exception:
                    comm.abort("a test failed")
                    raise
                if comm._failure is None:
                    comm.barrier()
                comm.close()
            device.close()
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def succeed(size: int, make: Callable[[Any, Any], Any], body: Callable[[Any], Any],
            opens: Callable[[], Any] = emulator.device) -> list[Any]:
    results = on_devices(size, make, body, opens=opens)
    failed = [result for result in results if isinstance(result, Exception)]
    for error in sorted(failed, key=lambda error: isinstance(error, CommError)):
        raise error
    return results


class ByHost:
    """A device communicator with NumPy arrays outside: views stay views of the same memory on the device."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: self._call(getattr(self.comm, name), args, options)

    def resident(self, *args: Any) -> None:
        assert self.comm.resident(*args) is None

    def _call(self, verb: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> Any:
        bases: dict[int, tuple[Any, Any]] = {}
        known: list[tuple[Any, Any]] = []

        def put(x: Any) -> Any:
            if isinstance(x, list):
                return [put(item) for item in x]
            if not isinstance(x, np.ndarray):
                return x
            base = x if x.base is None else x.base
            if id(base) not in bases:
                there = self.comm.device.cp.empty(base.shape, base.dtype)
                there.set(base)
                bases[id(base)] = base, there
            flat = bases[id(base)][1].reshape(-1)
            start = (x.ctypes.data - base.ctypes.data) // x.itemsize if x.size else 0
            found = flat[start:start + x.size].reshape(x.shape)
            known.append((x, found))
            return found

        def back(x: Any) -> Any:
            if isinstance(x, list):
                return [back(item) for item in x]
            if not isinstance(x, self.comm.device.cp.ndarray):
                return x
            assert x.flags.c_contiguous
            return next((here for here, there in known if there is x), x.get())

        result = verb(*map(put, args), **{name: put(value) for name, value in options.items()})
        for base, there in bases.values():
            base[...] = there.get()
        return back(result)
