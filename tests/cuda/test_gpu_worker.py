"""A worker on a CUDA device: the same results as on a CPU, with its programs replayed as graphs or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import meshtape as mt
from meshtape import nn, optim
from meshtape.cluster.local import InlineMesh
from meshtape.runtime.worker import Worker
from meshtape.scheduler import current
from meshtape.scheduler.session import Session


@pytest.fixture
def use(device: Any) -> Iterator[Callable[..., Any]]:
    """use(**options) makes a worker on the device the current mesh and returns it."""
    mt.shutdown()

    def start(**options: Any) -> Any:
        mt.shutdown()
        made = Worker(0, (1,), _alone(), device, **options)
        mesh = InlineMesh(worker=lambda *args: made)
        mesh.devices[0] = "gpu0"
        current.use(Session(mesh))
        return made

    yield start
    mt.shutdown()


def _alone() -> list[Any]:
    from meshtape.runtime.collectives.threads import ThreadGroup
    return [ThreadGroup(1).communicator(0)]


def train(steps: int = 8, optimizer: str = "adamw", rates: bool = True) -> list[Any]:
    """Losses and final parameters of a small network; `rates`: a new learning rate every step."""
    mt.manual_seed(3)
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    made = {"adamw": lambda: optim.AdamW(model.parameters(), lr=1e-2),
            "sgd": lambda: optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}[optimizer]()
    losses = []
    for step in range(steps):
        x = mt.tensor(rng.standard_normal((8, 12), dtype=np.float32))
        y = mt.tensor(rng.integers(0, 5, 8))
        loss = nn.functional.cross_entropy(model(x), y)
        made.zero_grad()
        loss.backward()
        made.step()
        for group in made.param_groups:
            group["lr"] = 1e-2 / (1 + step * rates)
        losses.append(loss)
    return [loss.numpy() for loss in losses] + [p.numpy() for p in model.parameters()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_is_as_on_a_cpu(use: Any, optimizer: str) -> None:
    mt.shutdown()
    wanted = train(optimizer=optimizer)
    use()
    for got, want in zip(train(optimizer=optimizer), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_replayed_steps_give_the_bits_of_steps_that_are_not(use: Any, optimizer: str) -> None:
    use(graphs=False)
    wanted = train(optimizer=optimizer)
    use()
    got = train(optimizer=optimizer)
    found = mt.stats()["graphs"][0]
    assert found["captured"] == 1 and found["replays"] >= 4, found
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_program_is_captured_at_its_third_run(use: Any) -> None:
    use()
    for step in range(5):
        x = mt.tensor(np.full((4, 3), float(step), np.float32))
        total = (x * x).sum()
        del x
        assert total.item() == 12 * step * step
        assert mt.stats()["graphs"][0]["replays"] == max(0, step - 1)


def test_results_of_a_replay_are_not_overwritten_by_the_next(use: Any) -> None:
    use()
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((5, 4), dtype=np.float32) for _ in range(6)]
    kept = []
    for a in given:
        x = mt.tensor(a)
        kept.append(mt.exp(x) @ x.T)
        del x
        mt.flush()
    assert mt.stats()["graphs"][0]["replays"] >= 2
    for a, t in zip(given, kept, strict=True):
        np.testing.assert_allclose(t.numpy(), np.exp(a) @ a.T, rtol=1e-5)


def test_blocks_that_move_are_copied_to_where_a_graph_reads_them(use: Any) -> None:
    use()
    h, w = mt.zeros((3, 4)), mt.tensor(np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4))
    want = np.zeros((3, 4), np.float32)
    seen = []
    for _ in range(9):
        h = mt.tanh(h @ w + 0.5)            # no operation writes its result over h
        mt.flush()
        seen.append(h)
        want = np.tanh(want @ w.numpy() + np.float32(0.5))
        np.testing.assert_allclose(h.numpy(), want, rtol=1e-5, atol=1e-6)
    assert any(found["captured"] for found in mt.stats()["graphs"])
    assert mt.stats()["graphs"][0]["replays"] >= 2


def test_blocks_that_take_each_others_places_keep_their_values(use: Any) -> None:
    def run() -> list[np.ndarray]:
        a, b = (mt.tensor(np.linspace(k, 3, 12, dtype=np.float32).reshape(3, 4)) for k in range(2))
        for _ in range(9):
            a, b = b * 0.75, a + 1.0        # each written over its operand, so that they change places
            mt.flush()
        return [a.numpy(), b.numpy()]

    use(graphs=False)
    wanted = run()
    use()
    for got, want in zip(run(), wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    assert mt.stats()["graphs"][0]["replays"] >= 4


def test_what_waits_for_the_device_is_not_captured(use: Any) -> None:
    use()
    x = mt.tensor(np.array([3.0, 0.0, 2.0, 0.0], np.float32))
    for _ in range(5):
        assert [i.tolist() for i in mt.nonzero(x)] == [[0, 2]] if hasattr(mt, "nonzero") else True
        assert mt.sort(x).numpy().tolist() == [0.0, 0.0, 2.0, 3.0]


def test_training_with_replays_equals_training_without(use: Any) -> None:
    use(graphs=False)
    wanted = train(optimizer="sgd", rates=False)
    use()
    got = train(optimizer="sgd", rates=False)
    assert mt.stats()["graphs"][0]["replays"] >= 3
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def drawn() -> list[np.ndarray]:
    """Initial weights, dropout masks and samples after one seed."""
    mt.manual_seed(11)
    layer, recurrent = nn.Linear(37, 19), nn.LSTM(5, 7)
    mask = nn.functional.dropout(mt.ones((33, 41)), 0.3)
    made = [*layer.parameters(), *recurrent.parameters(), mask, mt.random.normal(shape=(31, 3)),
            mt.random.uniform(shape=(1001,)), mt.random.randint(0, 1000, shape=(77,))]
    return [t.numpy() for t in made]


def test_random_numbers_have_the_bits_of_a_cpu(use: Any) -> None:
    mt.shutdown()
    wanted = drawn()
    use()
    for got, want in zip(drawn(), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def classify_digits(steps: int = 12) -> list[Any]:
    """Losses while a small network learns handwritten digits, and what it then takes the first ones for."""
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    mt.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
    opt = optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[Any] = []
    images = (images / 16).astype("float32")
    for x, y in mt.data.DataLoader((images, labels), batch_size=64, shuffle=True, seed=0):
        loss = nn.functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss)
        if len(losses) == steps:
            break
    model.eval()
    return [np.array([loss.item() for loss in losses]), model(mt.tensor(images[:64])).numpy()]


def test_digits_are_learned_as_on_a_cpu(use: Any) -> None:
    mt.shutdown()
    losses, scores = classify_digits()
    use()
    found = classify_digits()
    np.testing.assert_allclose(found[0], losses, rtol=1e-4)
    np.testing.assert_allclose(found[1], scores, rtol=1e-3, atol=1e-4)
    assert losses[-1] < losses[0]


def test_gradients_that_are_held_are_moved_out_of_the_graphs_way(use: Any) -> None:
    """Whoever keeps a step's gradients finds them unchanged, also where other programs wrote over them."""
    def run() -> list[np.ndarray]:
        mt.manual_seed(1)
        layer = nn.Linear(6, 4)
        opt = optim.SGD(layer.parameters(), lr=0.1)
        rng = np.random.default_rng(0)
        held, doubled = [], []
        for _ in range(7):
            loss = (layer(mt.tensor(rng.standard_normal((3, 6), dtype=np.float32))) ** 2).sum()
            opt.zero_grad()
            loss.backward()
            opt.step()
            held.append(layer.weight.grad)
            grad = layer.bias.grad
            layer.bias.grad = None
            doubled.append(mt.exp(grad))    # written over the gradient, which nobody else reads
            del grad
            mt.flush()
        return [t.numpy() for t in (*held, *doubled)]

    use(graphs=False)
    wanted = run()
    use()
    for got, want in zip(run(), wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    assert mt.stats()["graphs"][0]["replays"] >= 3


@pytest.mark.parametrize("options", [{"fuse": False}, {"reuse": False}, {"generate": False}])
def test_ways_to_run_a_program_agree(use: Any, options: dict[str, bool]) -> None:
    use(**options)
    wanted = train()
    use()
    for got, want in zip(train(), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_failure_spoils_what_depends_on_it_and_nothing_else(use: Any) -> None:
    """Also where one fused kernel computes both."""
    use()
    x = mt.tensor(np.ones((4, 4), np.float32))
    for _ in range(3):                      # interpreted, generated, and not captured
        lost = mt.ones((1 << 44,)).sum()    # no device has that much memory
        good, bad = x * 2, x + lost
        with pytest.raises(mt.WorkerError, match="no memory"):
            good.numpy()
        np.testing.assert_array_equal(good.numpy(), 2)
        with pytest.raises(mt.WorkerError, match="no memory"):
            bad.numpy()
        del lost, good, bad


def test_programs_that_are_dropped_are_forgotten_with_their_graphs(use: Any) -> None:
    worker = use()
    x = mt.tensor(np.arange(6, dtype=np.float32))
    for _ in range(5):
        assert (x * 2).sum().item() == 30
    captured, replays, _ = worker.graphs.report()
    assert captured == 1 and replays > 0
    with worker.device.active():
        for digest in list(worker.programs):
            worker._drop(digest)
    assert worker.graphs.report() == (0, replays, ()) and not worker.graphs._all
