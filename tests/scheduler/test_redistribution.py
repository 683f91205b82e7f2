"""Routes between layouts: short, legal, priced as the model says, and carried out exactly."""

from __future__ import annotations

import itertools
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from meshes import MESHES, on

import meshtape as mt
from meshtape.runtime.moves import changed_axis
from meshtape.runtime.shards import REPLICATE, is_partial
from meshtape.scheduler.cost import LINKS, Link, move_bytes, move_seconds
from meshtape.scheduler.redistribution import route

LINK = LINKS["shm"]
R = REPLICATE


def path(before: tuple[Any, ...], after: tuple[Any, ...], shape: tuple[int, ...] = (1024, 1024),
         mesh: tuple[int, ...] = (4,)) -> tuple[Any, ...]:
    return route(shape, 4, before, after, mesh, (LINK,) * len(mesh)).path


@pytest.mark.parametrize(("before", "after"), [((0,), (R,)), ((R,), (1,)), (("sum",), (R,)), (("sum",), (0,)),
                                               ((0,), (1,)), ((R,), ("sum",))])
def test_one_axis_needs_one_hop(before: Any, after: Any) -> None:
    assert path(before, after) == (before, after)


def test_equal_layouts_need_no_hop() -> None:
    found = route((8, 8), 4, (0, R), (0, R), (2, 2), (LINK, LINK))
    assert found.path == ((0, R),) and found.seconds == 0 and found.wire == 0


def test_a_dimension_split_by_two_axes_is_joined_innermost_first() -> None:
    """From (S0, S0) no rank's piece is part of the (R, S0) piece of its column: the last axis goes first."""
    found = path((0, 0), (R, 0), mesh=(2, 2))
    assert found[0] == (0, 0) and found[-1] == (R, 0)
    for before, after in pairwise(found):
        axis = changed_axis(before, after)
        assert before[axis] not in before[axis + 1:] or before[axis] == R
        assert after[axis] not in after[axis + 1:] or after[axis] == R


def test_every_hop_changes_one_axis_on_all_pairs_of_layouts() -> None:
    one = [R, 0, 1, "sum"]
    layouts = list(itertools.product(one, repeat=2))
    for before, after in itertools.product(layouts, repeat=2):
        found = path(before, after, (7, 5), (2, 3))
        assert found[0] == before and found[-1] == after
        assert all(sum(a != b for a, b in zip(p, q, strict=True)) == 1 for p, q in pairwise(found))


def test_moves_are_priced_by_the_alpha_beta_model() -> None:
    link, whole, n = Link(1e-6, 1e9), 8e6, 4
    gather, scatter = move_seconds(0, R, whole, n, link), move_seconds("sum", 0, whole, n, link)
    reduce, exchange = move_seconds("sum", R, whole, n, link), move_seconds(0, 1, whole, n, link)
    assert gather == scatter == pytest.approx(4e-6 + 0.75 * whole / 1e9)
    assert reduce == pytest.approx(7e-6 + 1.5 * whole / 1e9)
    assert exchange == pytest.approx(4e-6 + 0.1875 * whole / 1e9)
    assert move_seconds(R, 0, whole, n, link) == move_seconds(R, "sum", whole, n, link) == 0
    assert move_bytes(0, R, whole, 1) == 0


@pytest.mark.parametrize("mesh", MESHES)
def test_any_layout_to_any_other_keeps_the_values(mesh: str) -> None:
    """Uneven and empty pieces included: dimensions of 7, 5 and 1."""
    rng = np.random.default_rng(0)
    with on(MESHES[mesh]) as session:
        n = len(session.axes.shape)
        for shape in ((7, 5), (1, 6), (3,)):
            x = rng.integers(-9, 9, shape).astype(np.float64)
            one = [R, *range(len(shape)), "sum"]
            layouts = list(itertools.product(one, repeat=n))
            pairs = list(itertools.product(layouts, repeat=2))
            rng.shuffle(pairs)
            made = []
            for before, after in ((tuple(b), tuple(a)) for b, a in pairs[:60]):
                t = mt.tensor(x).to_placements(decoded(before)).to_placements(decoded(after))
                assert t.spec.placements == decoded(after)
                made.append(t)
            for got in session.fetch([(t.block, t.spec) for t in made]):
                np.testing.assert_array_equal(got, x)


def decoded(placements: Any) -> tuple[Any, ...]:
    """numpy's shuffle turns a mix of ints and strings into strings."""
    return tuple(p if is_partial(p) and not str(p).lstrip("-").isdigit() else int(p) for p in placements)
