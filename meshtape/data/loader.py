"""Batches of tensors from arrays in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from meshtape.autograd import Tensor, as_tensor
from meshtape.autograd.tensor import to_array
from meshtape.runtime.errors import ShapeError
from meshtape.scheduler import current
from meshtape.scheduler.layout import AnyLayout, Shard

Array = np.ndarray[Any, Any]


class DataLoader:
    """Iterates over equal rows of one array, a tuple of arrays, or a dict of arrays, in batches of tensors.

    Every batch has the structure of `arrays` and their dtypes (lists of floats become float32, as in
    tensor()). It is split by rows over the mesh axis named "data" (else the first), unless `layout` says
    otherwise. With `shuffle`, epoch e visits the rows in the order numpy.random.Philox(key=[seed, e]) gives.
    A thread gathers the rows of up to `prefetch` batches ahead (0: none). Raises ShapeError for arrays that
    do not fit together.
    """

    def __init__(self, arrays: Any, batch_size: int, shuffle: bool = False, seed: int = 0,
                 drop_last: bool = False, layout: AnyLayout | None = None, prefetch: int = 2) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"DataLoader: batch_size is {batch_size!r}; use a whole number of rows, at "
                             f"least 1")
        if prefetch < 0:
            raise ValueError(f"DataLoader: prefetch is {prefetch}; use a number of batches, 0 or more")
        self._arrays, self._rebuild = take_apart(arrays, "DataLoader")
        self.rows = len(self._arrays[0])
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.layout: AnyLayout = Shard(0) if layout is None else layout
        self.prefetch = prefetch
        self.epoch = 0

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        whole, rest = divmod(self.rows, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of `epoch` (each iteration counts one further)."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[Any]:
        order = shuffled(self.rows, self.seed, self.epoch) if self.shuffle else None
        self.epoch += 1
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        cuts = [slice(at, min(at + self.batch_size, self.rows)) for at in starts]
        gathered = gather(self._arrays, order, cuts, current.session().mesh.room)
        return self._tensors(ahead(gathered, self.prefetch) if self.prefetch else gathered)

    def _tensors(self, batches: Iterator[list[Array]]) -> Iterator[Any]:
        for batch in batches:
            yield self._rebuild([as_tensor(a, layout=self.layout, owned=True) for a in batch])


def take_apart(arrays: Any, who: str) -> tuple[list[Array], Callable[[list[Any]], Any]]:
    """The arrays in a list, and what puts as many values together in the given structure."""
    rebuild: Callable[[list[Any]], Any]
    if isinstance(arrays, Mapping):
        names = list(arrays)
        given, rebuild = list(arrays.values()), lambda values: dict(zip(names, values, strict=True))
    elif isinstance(arrays, tuple):
        names = [str(i) for i in range(len(arrays))]
        given, rebuild = list(arrays), tuple
    else:
        names, given, rebuild = ["0"], [arrays], lambda values: values[0]
    if not given:
        raise ShapeError(f"{who}: no arrays; give an array, a tuple of arrays or a dict of arrays")
    found = [to_array(a.numpy() if isinstance(a, Tensor) else a, None, copy=False) for a in given]
    sizes = {name: a.shape[:1] for name, a in zip(names, found, strict=True)}
    if () in sizes.values() or len(set(sizes.values())) > 1:
        text = ", ".join(f"{name}: {a.shape}" for name, a in zip(names, found, strict=True))
        raise ShapeError(f"{who}: arrays must have the same number of rows (first dimension), got {text}")
    return found, rebuild


def shuffled(rows: int, seed: int, epoch: int) -> Array:
    """The numbers 0 to rows - 1 in the order of this seed and epoch."""
    key = np.array([seed % 2 ** 64, epoch % 2 ** 64], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(rows)


def gather(arrays: Sequence[Array], order: Array | None, cuts: Sequence[slice],
           room: Callable[..., Array | None]) -> Iterator[list[Array]]:
    """A copy of the rows of each batch, made where the workers can read it if there is `room`."""
    for cut in cuts:
        yield [rows(a, cut, order, room) for a in arrays]


def rows(array: Array, cut: slice, order: Array | None, room: Callable[..., Array | None]) -> Array:
    out = room((cut.stop - cut.start, *array.shape[1:]), array.dtype)
    if order is not None:
        # With "raise", take would gather into a buffer first.
        return np.take(array, order[cut], axis=0, out=out, mode="clip")
    if out is None:
        return array[cut].copy()
    out[...] = array[cut]
    return out


def ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The items, of which a thread makes up to `count` before they are asked for.

    The thread ends when the items are used up, or this iterator is closed or dropped; its errors are raised
    here.
    """
    free, stop, end = threading.Semaphore(count), threading.Event(), object()
    ready: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    def work() -> None:
        try:
            while True:
                free.acquire()
                if stop.is_set():
                    return
                item = next(items, end)
                ready.put((True, item))
                if item is end:
                    return
        except BaseException as error:      # goes to the thread that waits for the item
            ready.put((False, error))

    thread = threading.Thread(target=work, name="meshtape-data", daemon=True)
    thread.start()
    try:
        while True:
            fine, item = ready.get()
            if not fine:
                raise item
            if item is end:
                return
            yield item
            free.release()
    finally:
        stop.set()
        free.release()
        thread.join()


def random_split(arrays: Any, lengths: Sequence[int | float], seed: int = 0) -> list[Any]:
    """The rows of an array, a tuple or a dict of arrays, dealt at random into parts of these lengths.

    Fractions that sum to 1 are lengths as well (what rounding leaves goes to the first parts). Returns NumPy
    arrays in the structure given. Raises ShapeError.
    """
    found, rebuild = take_apart(arrays, "random_split")
    rows = len(found[0])
    if all(isinstance(n, float) for n in lengths) and abs(sum(lengths) - 1) < 1e-9:
        counts = [int(rows * n) for n in lengths]
        for i in range(rows - sum(counts)):
            counts[i % len(counts)] += 1
    else:
        counts = [int(n) for n in lengths]
    if sum(counts) != rows or min(counts, default=0) < 0:
        raise ShapeError(f"random_split: lengths {list(lengths)} sum to {sum(counts)}, but there are "
                         f"{rows} rows")
    order, parts, at = shuffled(rows, seed, 0), [], 0
    for n in counts:
        parts.append(rebuild([a[order[at:at + n]] for a in found]))
        at += n
    return parts


__all__ = ["DataLoader", "random_split"]
