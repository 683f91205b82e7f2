"""A loop of equal steps sends one short message per worker and step, and nothing piles up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import digits
import numpy as np
import pytest
from spy import Batch, Spy, blocks, watched

import meshtape as mt
from meshtape import nn, optim
from meshtape.scheduler.session import IN_FLIGHT, Session

MESHES = [1, 2, 3]


class Loop:
    """A training loop over the digits, with the parts that a test asks for."""

    def __init__(self, dropout: float = 0.0, optimizer: Callable[..., Any] = optim.AdamW) -> None:
        mt.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 10))
        self.opt = optimizer(self.net.parameters(), lr=1e-2)
        self.data = mt.data.DataLoader(digits.data(), 128, shuffle=True, drop_last=True)

    def step(self, x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(self.net(x.astype(mt.float32)), y)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss


def sent_per_step(session: Session, loop: Loop, after: Callable[[Any], Any] = lambda loss: None,
                  steps: int = 8) -> list[list[Batch]]:
    """What rank 0 was sent in each step. All ranks are sent the same batches."""
    spy, found = Spy(session), []
    for _, (x, y) in zip(range(steps), loop.data, strict=False):
        before = session.stats.messages
        loss = loop.step(x, y)
        after(loss)
        found.append(spy.take())
        assert session.stats.messages - before == len(found[-1]) * session.mesh.size
    return found


def assert_steady(found: list[list[Batch]]) -> None:
    """From the third step on, each step is one batch that goes out by digest."""
    assert [[b.fresh for b in step] for step in found[2:]] == [[False]] * len(found[2:])


@pytest.mark.parametrize("workers", MESHES)
def test_a_training_step_is_one_message_per_worker_and_a_digest_from_the_third_on(workers: int) -> None:
    with watched(workers) as (session, _):
        found = sent_per_step(session, Loop())
        assert [len(step) for step in found] == [1] * len(found)
        assert_steady(found)
        assert session.stats.digest_hits >= len(found) - 2
        assert session.stats.batches == len(found)


OPTIMIZERS = {"SGD": optim.SGD, "momentum": lambda p, lr: optim.SGD(p, lr=lr, momentum=0.9),
              "Adam": optim.Adam, "RMSprop": optim.RMSprop, "Adagrad": optim.Adagrad}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_is_steady(optimizer: Any) -> None:
    with watched(2) as (session, _):
        assert_steady(sent_per_step(session, Loop(optimizer=optimizer), steps=5))


@pytest.mark.parametrize("workers", MESHES)
def test_asking_for_the_loss_in_each_step_takes_no_message_of_its_own(workers: int) -> None:
    with watched(workers) as (session, _):
        losses: list[float] = []
        found = sent_per_step(session, Loop(), lambda loss: losses.append(loss.item()))
        assert_steady(found)
        assert all(b.n_fetches == 1 for step in found[2:] for b in step)
        assert len(set(losses)) == len(losses), "each step's own loss"


def test_no_longer_asking_for_the_loss_ends_its_coming_along() -> None:
    with watched(2) as (session, _):
        loop, asked = Loop(), [True] * 4 + [False] * 6
        found = sent_per_step(session, loop, lambda loss: loss.item() if asked.pop(0) else None, steps=10)
        assert_steady(found)
        assert [b.n_fetches for step in found[-3:] for b in step] == [0, 0, 0]


@pytest.mark.parametrize("workers", MESHES)
def test_a_learning_rate_that_changes_at_every_step_does_not_change_the_program(workers: int) -> None:
    with watched(workers) as (session, _):
        loop = Loop()
        schedule = optim.lr_scheduler.CosineAnnealingLR(loop.opt, 100)
        rates: list[float] = []

        def after(loss: Any) -> None:
            schedule.step()
            rates.append(loop.opt.param_groups[0]["lr"])

        assert_steady(sent_per_step(session, loop, after))
        assert len(set(rates)) == len(rates)


@pytest.mark.parametrize("workers", MESHES)
def test_dropout_draws_anew_at_every_step_without_changing_the_program(workers: int) -> None:
    with watched(workers) as (session, _):
        loop = Loop(dropout=0.5)
        assert_steady(sent_per_step(session, loop))
        assert session.draws > 8
        x, kept = mt.ones((64, 32)), []
        for _ in range(3):
            kept.append(nn.functional.dropout(x, 0.5).numpy() != 0)
        assert not np.array_equal(kept[0], kept[1]) and not np.array_equal(kept[1], kept[2])


def test_accumulating_gradients_clipping_and_evaluation_are_steady_too() -> None:
    """Two different programs that take turns are both known after two rounds."""
    with watched(2) as (session, _):
        loop, spy, fresh = Loop(), Spy(session), []
        for _ in range(5):
            for at, (x, y) in zip(range(4), loop.data, strict=False):
                loss = nn.functional.cross_entropy(loop.net(x.astype(mt.float32)), y) / 2
                loss.backward()
                if at % 2:
                    nn.utils.clip_grad_norm_(loop.net.parameters(), 1.0)
                    loop.opt.step()
                    loop.opt.zero_grad()
            with mt.no_grad():
                hits = (loop.net(x.astype(mt.float32)).argmax(axis=1) == y).sum().item()
            assert 0 <= hits <= 128
            fresh.append(sum(b.fresh for b in spy.take()))
        assert fresh[3:] == [0, 0], fresh


@pytest.mark.parametrize("workers", MESHES)
def test_batches_in_flight_are_bounded(workers: int) -> None:
    with watched(workers) as (session, _):
        spy, loop = Spy(session), Loop()
        for _ in range(3):
            for x, y in loop.data:
                loop.step(x, y)
        assert session.stats.batches >= 3 * len(loop.data)
        assert 1 < spy.most_in_flight <= IN_FLIGHT + 1


@pytest.mark.parametrize("workers", MESHES)
def test_two_hundred_steps_leave_no_more_on_the_workers_than_twenty(workers: int) -> None:
    with watched(workers) as (session, made):
        loop, held = Loop(dropout=0.1), {}
        step = 0
        while step < 200:
            for x, y in loop.data:
                step += 1
                loss = loop.step(x, y)
                if step in (20, 200):
                    held[step] = blocks(session, made)
        del loss
        assert held[20] == held[200]
        # 4 parameters, as many gradients and twice as many states; the batch, the loss and what the tape of
        # the last step has not let go.
        assert max(held[200]) <= 16 + 8, held


@pytest.mark.parametrize("workers", MESHES)
def test_everything_is_freed_when_the_program_lets_go_of_it(workers: int) -> None:
    with watched(workers) as (session, made):
        loop = Loop()
        for x, y in loop.data:
            loss = loop.step(x, y)
        loss.item()
        del loop, x, y, loss
        assert blocks(session, made) == [0] * workers
        assert not session.inflight.values and not session.inflight.sent


class Stop(Exception):
    """Raised in the middle of a step."""


def test_steps_that_an_exception_interrupts_leave_nothing_behind() -> None:
    """Wherever it comes: before backward, between backward and step, or inside backward."""
    def interrupt(loop: Loop, x: Any, y: Any, where: int) -> None:
        loss = nn.functional.cross_entropy(loop.net(x.astype(mt.float32)), y)
        if where == 0:
            raise Stop
        if where == 1:
            def hook(g: Any) -> None:
                raise Stop
            loss.register_hook(hook)
        loop.opt.zero_grad()
        loss.backward()
        raise Stop

    with watched(2) as (session, made):
        loop, held = Loop(), []
        x, y = next(iter(loop.data))
        loop.step(x, y)
        for _ in range(5):
            for at in range(12):
                with pytest.raises(Stop):
                    interrupt(loop, x, y, at % 3)
            loop.step(x, y)
            held.append(blocks(session, made))
        assert held[1:] == held[:1] * 4
        assert_steady(sent_per_step(session, loop))


def test_a_loop_that_never_calls_backward_frees_its_tapes() -> None:
    with watched(2) as (session, made):
        loop, held = Loop(), []
        x, y = next(iter(loop.data))
        for at in range(120):
            loss = nn.functional.cross_entropy(loop.net(x.astype(mt.float32)), y)
            if at % 40 == 39:
                loss.item()
                held.append(blocks(session, made))
        assert held[0] == held[1] == held[2]


def test_an_op_by_op_loop_with_neither_fetch_nor_step_is_sent_in_pieces_and_freed() -> None:
    """A batch goes out when it is full, unasked."""
    with watched(2) as (session, made):
        x = mt.ones((100,), layout=mt.Shard(0))
        for _ in range(5000):
            x = x * 1.0001 + 0.0001
        assert 5 <= session.stats.batches <= 15
        assert blocks(session, made) == [1, 1]
        assert session.stats.digest_hits >= 3


def test_values_that_came_along_are_each_their_own_and_go_with_their_tensor() -> None:
    with watched(2) as (session, _):
        loop, kept = Loop(), []
        for step, (x, y) in enumerate(loop.data):
            loss = loop.step(x, y)
            if step < 3:
                loss.item()
            else:
                kept.append(loss)
        session.wait()
        assert 1 < len(session.inflight.values) <= len(kept)
        assert len({v.item() for v in kept[::2]}) == len(kept[::2])
        del kept, loss, x, y
        session.wait()
        assert not session.inflight.values and not session.inflight.unread


def test_a_step_of_more_operations_than_a_batch_holds_is_cut_at_the_same_places_each_time() -> None:
    with watched(2) as (session, _):
        spy = Spy(session)
        w = nn.Parameter(mt.ones((8, 8)))
        opt, found = optim.SGD([w], lr=1e-3), []
        x = mt.ones((4, 8), layout=mt.Shard(0))
        for _ in range(6):
            y = x
            for _ in range(700):
                y = (y @ w).tanh()
            y.sum().backward()
            opt.step()
            opt.zero_grad()
            found.append(spy.take())
        assert not any(b.fresh for step in found[2:] for b in step)
        assert len({len(step) for step in found[2:]}) == 1 and len(found[2]) > 1
