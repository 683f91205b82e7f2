"""Scripts of collectives through shared memory, played by all ranks in turn on areas of any size."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshtape.runtime.collectives.many import cut
from meshtape.runtime.collectives.turns import (
    LINE,
    Script,
    Stage,
    cut_message,
    exchange,
    gather,
    scatter,
    shares,
)

SHAPES = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 40]), min_size=1, max_size=3).map(tuple),
                  min_size=1, max_size=4)


class Room:
    """Areas of `size` ranks, which hold nonsense until somebody puts something there."""

    def __init__(self, size: int, area: int) -> None:
        self.size, self.area = size, area
        self.bytes = np.full((size, 2, area), 255, np.uint8)

    def view(self, rank: int, turn: int, start: int, shape: tuple[int, ...]) -> Any:
        assert start % LINE == 0 and start + 8 * prod(shape) <= self.area
        return self.bytes[rank, turn & 1][start:start + 8 * prod(shape)].view(np.int64).reshape(shape)

    def stages(self) -> list[Stage]:
        return [Stage(r, self.size, self.area, 8, self.view) for r in range(self.size)]

    def play(self, scripts: list[Script], given: list[Any], outs: list[Any]) -> None:
        ins = [seen(x, s.given) for x, s in zip(given, scripts, strict=True)]
        results = [seen(x, s.outs) for x, s in zip(outs, scripts, strict=True)]
        for me, script in enumerate(scripts):
            for i, key in script.own:
                results[me][i][... if key is None else key] = ins[me][i]
        assert len({len(script.turns) for script in scripts}) == 1
        for j in range(len(scripts[0].turns)):
            for me, script in enumerate(scripts):
                for i, key, room in script.turns[j].puts:
                    room[...] = ins[me][i][... if key is None else key]
            for me, script in enumerate(scripts):
                for i, key, rooms, out in script.turns[j].reductions:
                    mine = ins[me][i][... if key is None else key]
                    assert [r for r, room in enumerate(rooms) if room is None] == [me]
                    results[me][i][... if out is None else out] = sum(mine if r is None else r for r in rooms)
                for i, key, room in script.turns[j].takes:
                    results[me][i][... if key is None else key] = room


def seen(arrays: list[Any], forms: Any) -> list[Any]:
    return arrays if forms is None else [
        x if form is None else x.reshape(form) for x, form in zip(arrays, forms, strict=True)]


def numbers(rank: int, shapes: list[Any]) -> list[Any]:
    """Different on every rank and at every place."""
    at, out = 10**rank, []
    for shape in shapes:
        out.append(at * (1 + np.arange(prod(shape), dtype=np.int64).reshape(shape)))
    return out


def parts(arrays: list[Any], dims: list[int], size: int, rank: int) -> list[Any]:
    return [np.array_split(x, size, d)[rank].copy() for x, d in zip(arrays, dims, strict=True)]


def total(size: int, shapes: list[Any]) -> list[Any]:
    return [sum(xs) for xs in zip(*[numbers(r, shapes) for r in range(size)], strict=True)]


def same(got: list[Any], want: list[Any]) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(2, 4), st.sampled_from([256, 448, 1024, 65536]), st.data())
def test_scripts_scatter_and_gather_any_shapes_through_any_area(shapes: list[Any], size: int, area: int,
                                                                data: Any) -> None:
    dims = [data.draw(st.integers(0, len(shape) - 1)) for shape in shapes]
    room, bands = Room(size, area), cut(shapes, dims, size)
    want = [parts(total(size, shapes), dims, size, r) for r in range(size)]
    got = [[np.zeros_like(w) for w in row] for row in want]
    room.play([scatter(stage, bands, 1) for stage in room.stages()],
              [numbers(r, shapes) for r in range(size)], got)
    for r in range(size):
        same(got[r], want[r])
    whole = [[np.zeros(shape, np.int64) for shape in shapes] for _ in range(size)]
    room.play([gather(stage, bands, 0) for stage in room.stages()], got, whole)
    for r in range(size):
        same(whole[r], total(size, shapes))


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(2, 4), st.sampled_from([256, 448, 1024, 65536]))
def test_scripts_reduce_any_shapes_in_place(shapes: list[Any], size: int, area: int) -> None:
    room, bands = Room(size, area), shares(shapes, size)
    arrays = [numbers(r, shapes) for r in range(size)]
    room.play([exchange(stage, shapes, 0) for stage in room.stages()], arrays, arrays)
    for r in range(size):
        same(arrays[r], total(size, shapes))
    arrays = [numbers(r, shapes) for r in range(size)]
    room.play([scatter(stage, bands, 0, whole=True) for stage in room.stages()], arrays, arrays)
    room.play([gather(stage, bands, 1, whole=True) for stage in room.stages()], arrays, arrays)
    for r in range(size):
        same(arrays[r], total(size, shapes))


@pytest.mark.parametrize("dims", [[0, 0, 0], [1, 0, 1]])
def test_what_fits_takes_one_turn(dims: list[int]) -> None:
    bands = cut([(128, 64), (64,), (64, 10)], dims, 2)
    assert len(cut_message(bands[0], 4, 64 * 1024)) == 1
    stage = Room(2, 1 << 16).stages()[0]
    script = scatter(stage, bands, 0)
    assert len(script.turns) == 1 and len(script.turns[0].puts) == 3 == len(script.turns[0].reductions)
    assert script.given is None and script.outs is None
