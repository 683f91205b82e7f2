"""The DataLoader visits every row once an epoch, in the order of seed and epoch, and leaves no thread."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshtape as mt
from meshtape.data import DataLoader, random_split
from meshtape.data.loader import ahead
from meshtape.scheduler import current

X = np.arange(46, dtype=np.float64).reshape(23, 2)
Y = np.arange(23) * 10


def data_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "meshtape-data"]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 20), batch=st.integers(1, 8), shuffle=st.booleans(), drop=st.booleans(),
       prefetch=st.integers(0, 3))
def test_an_epoch_is_every_row_once(rows: int, batch: int, shuffle: bool, drop: bool, prefetch: int) -> None:
    loader = DataLoader(np.arange(rows), batch, shuffle, seed=3, drop_last=drop, prefetch=prefetch)
    found = [t.numpy() for t in loader]
    assert len(found) == len(loader) == (rows // batch if drop else -(-rows // batch))
    assert all(len(f) == batch for f in found[:-1])
    seen = np.concatenate(found).tolist() if found else []
    wanted = set(range(rows))
    assert len(seen) == len(set(seen)) and (set(seen) <= wanted if drop else set(seen) == wanted)


def test_batches_keep_structure_dtype_and_pairs(workers: int) -> None:
    for x, y in DataLoader((X, Y), 5, shuffle=True, seed=1):
        assert x.dtype == np.float64 and y.dtype == np.int64
        np.testing.assert_array_equal(x.numpy()[:, 0] * 5, y.numpy())
        assert workers == 1 or x.layout == y.layout == mt.Shard(0)
    batch = next(iter(DataLoader({"image": X.astype(np.float32), "label": Y.astype(np.uint8)}, 4)))
    assert list(batch) == ["image", "label"] and batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.uint8
    assert isinstance(next(iter(DataLoader(X, 4))), mt.Tensor)
    assert next(iter(DataLoader([[1.5, 2.5]], 1))).dtype == np.float32
    assert next(iter(DataLoader(mt.tensor(Y), 2))).numpy().tolist() == [0, 10]


def test_order_follows_seed_and_epoch() -> None:
    def orders(seed: int, epochs: int) -> list[list[int]]:
        loader = DataLoader(Y, 4, shuffle=True, seed=seed)
        return [[v for t in loader for v in t.tolist()] for _ in range(epochs)]

    first, second, third = orders(0, 3)
    assert first != second != third != first
    assert orders(0, 3) == [first, second, third] and orders(1, 1) != [first]
    loader = DataLoader(Y, 4, shuffle=True)
    loader.set_epoch(2)
    assert [v for t in loader for v in t.tolist()] == third
    key = np.array([0, 0], np.uint64)
    assert first == Y[np.random.Generator(np.random.Philox(key=key)).permutation(23)].tolist()


def test_order_does_not_depend_on_the_mesh() -> None:
    def run() -> Any:
        return [t.tolist() for t in DataLoader(Y, 4, shuffle=True, seed=5)]

    alone = run()
    mt.shutdown()
    mt.init(workers=3, backend="local")
    assert run() == alone


def test_rows_are_copied() -> None:
    mine = X.copy()
    batches = list(DataLoader(mine, 5))
    mine[:] = -1
    np.testing.assert_array_equal(np.concatenate([b.numpy() for b in batches]), X)


@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_are_gathered_where_the_workers_read_them(shuffle: bool, monkeypatch: Any) -> None:
    session, rooms, fed = current.session(), [], []
    place = session.place

    def room(shape: tuple[int, ...], dtype: Any) -> Any:
        rooms.append(np.empty(shape, dtype))
        return rooms[-1]

    def noted(array: Any, *args: Any, **kwargs: Any) -> Any:
        fed.append(array)
        return place(array, *args, **kwargs)

    monkeypatch.setattr(session.mesh, "room", room)
    monkeypatch.setattr(session, "place", noted)
    for x, y in DataLoader((X, Y), 5, shuffle=shuffle):
        np.testing.assert_array_equal(x.numpy()[:, 0] * 5, y.numpy())
    assert len(fed) == 10 and all(any(a is r for r in rooms) for a in fed)


def test_a_batch_smaller_than_the_mesh() -> None:
    mt.init(workers=3, backend="local")
    w = mt.ones((2, 4), dtype="float64", requires_grad=True)
    for x in DataLoader(X[:7], 2, prefetch=1):
        (x @ w).sum().backward()
    np.testing.assert_allclose(w.grad.numpy(), X[:7].sum(0)[:, None].repeat(4, 1))


def test_splits_over_the_axis_named_data() -> None:
    mt.init(workers=4, backend="local", mesh={"model": 2, "data": 2})
    x = next(iter(DataLoader(X, 4)))
    assert dict(x.layout) == {"model": mt.Replicate(), "data": mt.Shard(0)}
    x = next(iter(DataLoader(X, 4, layout={"model": mt.Shard(1)})))
    assert dict(x.layout) == {"model": mt.Shard(1), "data": mt.Replicate()}


def test_the_thread_ends_with_its_loop() -> None:
    for _ in DataLoader(Y, 2):
        pass
    assert not data_threads()
    for _ in DataLoader(Y, 2, prefetch=3):
        break
    gc.collect()
    assert not data_threads()
    with pytest.raises(ZeroDivisionError):
        for _ in DataLoader(Y, 2):
            raise ZeroDivisionError
    gc.collect()
    assert not data_threads()
    iterator = iter(DataLoader(Y, 2))
    next(iterator)
    assert len(data_threads()) == 1
    iterator.close()
    assert not data_threads()


def test_the_program_ends_in_the_middle_of_an_epoch() -> None:
    code = ("import numpy as np, meshtape as mt\n"
            "it = iter(mt.data.DataLoader(np.zeros((1000, 50)), 1, prefetch=4))\n"
            "next(it); print('end')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "end\n" and not done.stderr


def test_an_error_of_the_thread_is_raised_in_the_loop() -> None:
    def items() -> Any:
        yield 1
        raise KeyError("no such row")

    got = []
    with pytest.raises(KeyError, match="no such row"):
        for item in ahead(items(), 2):
            got.append(item)
    assert got == [1] and not data_threads()


def test_no_more_than_prefetch_batches_are_gathered_ahead() -> None:
    made = []

    def items() -> Any:
        for i in range(10):
            made.append(i)
            yield i

    for item in ahead(items(), 3):
        assert len(made) <= item + 4


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(mt.ShapeError, match=r"0: \(23, 2\), 1: \(22,\)"):
        DataLoader((X, Y[:-1]), 4)
    with pytest.raises(mt.ShapeError, match="rows"):
        DataLoader(np.float64(3.0), 4)
    with pytest.raises(mt.ShapeError, match="no arrays"):
        DataLoader((), 4)
    for batch_size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="batch_size"):
            DataLoader(X, batch_size)
    with pytest.raises(ValueError, match="prefetch"):
        DataLoader(X, 4, prefetch=-1)
    with pytest.raises(mt.LayoutError):
        next(iter(DataLoader(Y, 4, layout=mt.Shard(1))))


def test_random_split_deals_every_row_once() -> None:
    (a, b), (c, d) = random_split((X, Y), [0.8, 0.2], seed=2)
    assert len(a) == 19 and len(c) == 4
    np.testing.assert_array_equal(np.concatenate([a, c])[:, 0] * 5, np.concatenate([b, d]))
    assert sorted(np.concatenate([b, d]).tolist()) == Y.tolist()
    assert [len(p) for p in random_split(Y, [10, 13])] == [10, 13]
    with pytest.raises(mt.ShapeError, match="23 rows"):
        random_split(Y, [10, 10])
