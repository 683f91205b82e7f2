"""Batches that nobody waits for are run without an answer, and nothing is lost by it."""

from __future__ import annotations

import pytest

import meshtape as mt
from meshtape.scheduler.session import ANSWER_EVERY
from tests.meshes import on


def replies(session):
    """Counts the replies from now on."""
    count, collect = [0], session.mesh.collect

    def counted(timeout=None):
        reply = collect(timeout)
        count[0] += reply is not None
        return reply

    vars(session.mesh).update(collect=counted)
    return count


@pytest.mark.parametrize("workers", [1, 2])
def test_one_batch_in_several_is_answered(workers):
    with on(workers) as session:
        count, x = replies(session), mt.ones(3)
        for _ in range(5 * ANSWER_EVERY):
            x = x + 1
            mt.flush()
        mt.synchronize()
        assert count[0] <= workers * 6
        assert x.numpy().tolist() == [1.0 + 5 * ANSWER_EVERY] * 3


@pytest.mark.parametrize("workers", [1, 2])
def test_waiting_waits_for_the_last_batch(workers):
    with on(workers) as session:
        for n in range(1, 2 * ANSWER_EVERY):
            x = mt.ones(3) * n
            mt.flush()
            mt.synchronize()
            assert not session.inflight.sent and session.inflight.answered == session._batch
        assert x.sum().item() == 3.0 * n


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("later", range(ANSWER_EVERY + 1))
def test_a_failure_is_told_without_being_asked_for(workers, later):
    with on(workers):
        bad = mt.take(mt.ones((4, 2)), mt.tensor([5]), axis=0)
        mt.flush()
        good = mt.ones(3)
        for _ in range(later):
            good = good + 1
            mt.flush()
        with pytest.raises(mt.WorkerError, match="index 5"):
            mt.synchronize()
        with pytest.raises(mt.WorkerError, match="index 5"):
            bad.numpy()
        assert good.numpy().tolist() == [1.0 + later] * 3
