"""Where arrays stand: found out again only for arrays that are others."""

from __future__ import annotations

import emulator
import pytest

from meshtape.runtime.cuda.standing import Standing, moved, picker, spot

pytest.importorskip("cupy", reason="the emulation asks the installed CuPy for its signatures")


def test_only_arrays_that_were_not_seen_at_their_position_are_others() -> None:
    cp = emulator.libraries().cupy
    arrays, standing = [cp.empty(n) for n in (1, 2, 3)], Standing(3)
    assert list(standing.others(arrays)) == [0, 1, 2]
    for k, array in enumerate(arrays):
        standing.see(k, array)
    assert list(standing.others(arrays)) == []
    assert list(standing.others([arrays[1], arrays[0], arrays[2]])) == [0, 1]


def test_an_array_at_the_id_of_one_that_went_is_another() -> None:
    cp = emulator.libraries().cupy
    standing, kept = Standing(1), []
    for n in range(1, 50):
        array = cp.empty(n)
        assert list(standing.others([array])) == [0]
        standing.see(0, array)
        kept += [array] if n % 3 == 0 else []
        del array


def test_spots_differ_by_address_and_strides() -> None:
    a = emulator.libraries().cupy.zeros((4, 4))
    spots = [spot(a), spot(a.T), spot(a[1:]), spot(a[:2])]
    assert moved(spots[:1] * 4, spots) == (1, 2)


def test_slots_are_picked_however_many_there_are() -> None:
    assert [list(picker(slots)([5, 6, 7])) for slots in ((), (1,), (2, 0))] == [[], [6], [7, 5]]
