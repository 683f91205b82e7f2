"""What changes from run to run of a program: loaded to places that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshtape.runtime.cuda.inputs import AT_ONCE, Inputs

LARGE = AT_ONCE // 4 + 1


@pytest.mark.parametrize("size", [3, LARGE])
def test_arrays_may_change_when_they_are_loaded(device: Any, size: int) -> None:
    inputs = Inputs(device, [((size,), np.float32), ((0,), np.float32), ((2, size), np.int64)], [])
    seen, expected = [], []
    given = np.zeros(size, np.float32), np.zeros(0, np.float32), np.zeros((size, 2), np.int64)
    for n in range(5):
        for array in given:
            array[...] = n + np.arange(array.size).reshape(array.shape)
        first, _, last = inputs.load([*given[:2], given[2].T], ())
        seen.append((first.copy(), last.copy()))
        expected.append((given[0].copy(), given[2].T.copy()))
    device.synchronize()
    for arrays, values in zip(seen, expected, strict=True):
        for array, value in zip(arrays, values, strict=True):
            np.testing.assert_array_equal(array.get(), value)


def test_arrays_of_the_device_take_turns_with_those_of_the_host(device: Any) -> None:
    inputs = Inputs(device, [((LARGE,), np.float32)], [])
    for n in range(4):
        host = np.full(LARGE, n, np.float32)
        loaded, = inputs.load([host if n % 2 else device.cp.asarray(host)], ())
        np.testing.assert_array_equal(loaded.get(), host)


def test_numbers_are_loaded_as_floats_and_as_bits(device: Any) -> None:
    inputs = Inputs(device, [], [(1, "d"), (0, "i"), (2, "i")])
    for k in (1, 2, 2):
        inputs.load([], (-k, 0.1 * k, 2**64 - k))
        assert float(inputs.numbers[1, "d"].get()) == 0.1 * k
        assert int(inputs.numbers[0, "i"].get()) == -k
        assert int(inputs.numbers[2, "i"].get()) == -k
