"""The number of threads of the BLAS under NumPy can be read and set."""

from __future__ import annotations

import pytest

import meshtape as mt
from meshtape.runtime.blas import blas_threads, set_blas_threads


@pytest.fixture
def two_threads():
    """The BLAS uses two threads, as it might on a user's machine."""
    before = blas_threads()
    if before is None:
        pytest.skip("a BLAS that cannot be asked")
    set_blas_threads(2)
    yield
    set_blas_threads(before)


def test_what_was_set_is_read(two_threads: None) -> None:
    assert blas_threads() == 2
    set_blas_threads(1)
    assert blas_threads() == 1


def test_a_mesh_of_threads_takes_one_blas_thread_per_worker_while_it_is_open(two_threads: None) -> None:
    mt.shutdown()
    with mt.init(workers=2, backend="local"):
        assert blas_threads() == 1
    assert blas_threads() == 2
    with mt.init(workers=2, backend="local", threads_per_worker=2):
        assert blas_threads() == 2
