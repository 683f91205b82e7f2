"""Ctrl-C at any moment of training ends the training, and nothing else: as in a notebook, one goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import digits
import numpy as np
import pytest
from meshes import on

import meshtape as mt
from meshtape.scheduler.interrupt import Whole


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT; here it is heard."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupt_after() -> Iterator[Callable[[float], Any]]:
    """interrupt_after(seconds of this process's own time): a Ctrl-C comes then."""
    before = signal.signal(signal.SIGVTALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    yield lambda seconds: signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


# Python reports a Ctrl-C that comes while an object is being finalized, and drops it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [1, 2, {"data": 2, "model": 2}], ids=str)
def test_training_that_was_interrupted_anywhere_can_start_again(workers: Any, interrupt_after: Any) -> None:
    rng, interrupted = np.random.default_rng(0), 0
    with on(workers):
        for _ in range(25):
            interrupt_after(rng.uniform(0.001, 0.04))
            try:
                digits.train(100)
            except KeyboardInterrupt:
                interrupted += 1
            interrupt_after(0)
            np.testing.assert_allclose(digits.train(3), digits.LOSSES[:3], rtol=1e-9)
    assert interrupted > 10


def test_what_a_tensor_held_before_an_interrupt_it_holds_after(interrupt_after: Any) -> None:
    with on(2):
        kept = mt.tensor(np.arange(6.0), layout=mt.Shard(0))
        for wait in (0.002, 0.005, 0.01):
            interrupt_after(wait)
            with pytest.raises(KeyboardInterrupt):
                while True:
                    (kept * 2).sum().item()
            np.testing.assert_array_equal(kept.numpy(), np.arange(6.0))


def test_a_whole_block_ends_before_the_first_interrupt_and_not_before_the_second() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Whole():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    with pytest.raises(KeyboardInterrupt), Whole():
        signal.raise_signal(signal.SIGINT)
        done.append(2)
        signal.raise_signal(signal.SIGINT)
        done.append(3)
    assert done == [1, 2] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
