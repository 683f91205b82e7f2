"""Bad input is one clear error where it was given, and everything else goes on as before."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meshes import on
from spy import blocks, watched

import meshtape as mt
from meshtape import nn, optim

F = nn.functional


@pytest.fixture(params=[1, 2], ids=["inline", "two threads"])
def survivor(request: pytest.FixtureRequest) -> Iterator[mt.Tensor]:
    """A mesh, and a tensor on it that must outlive whatever goes wrong."""
    with on(request.param):
        x = mt.tensor(np.arange(6.0), layout=mt.Shard(0), requires_grad=True)
        y = (x * x).sum()
        yield x
        y.backward()
        np.testing.assert_array_equal(x.grad.numpy(), 2 * np.arange(6.0))
        mt.synchronize()


def ones(*shape: int, **options: Any) -> mt.Tensor:
    return mt.ones(shape, **options)


def leaf(*shape: int) -> mt.Tensor:
    return mt.ones(shape, requires_grad=True)


def twice() -> None:
    x = leaf(3)
    loss = (x * x).sum()
    loss.backward()
    loss.backward()


def in_place(change: Callable[[mt.Tensor], Any], *shape: int, **options: Any) -> None:
    change(mt.ones(shape, **options))


def add_to(x: mt.Tensor, y: Any) -> None:
    x += y


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # Shapes
    "add": (lambda: ones(2, 3) + ones(4), mt.ShapeError,
        r"add: shapes \(2, 3\) and \(4,\) do not broadcast; dimension -1 is 3 in one and 4 in another"),
    "matmul": (lambda: ones(2, 3) @ ones(4, 5), mt.ShapeError,
        r"matmul: inner axes differ, \(2, 3\) @ \(4, 5\); transpose"),
    "matmul of a scalar": (lambda: ones(2, 3) @ 2.0, mt.ShapeError,
        r"multiply by a scalar with \*"),
    "linear": (lambda: nn.Linear(4, 5)(ones(2, 3)), mt.ShapeError,
        r"linear: .* got input \(2, 3\) and weight \(5, 4\); check the layer sizes"),
    "concat": (lambda: mt.concat([ones(2, 3), ones(2, 4)]), mt.ShapeError,
        r"concat: shapes \(2, 3\) and \(2, 4\) differ outside axis 0"),
    "concat of none": (lambda: mt.concat([]), mt.ShapeError,
        "concat: an empty list .*give at least one"),
    "stack": (lambda: mt.stack([ones(2), ones(3)]), mt.ShapeError,
        r"stack: .* \(2,\) and \(3,\) .*use concat"),
    "reshape": (lambda: ones(2, 3).reshape(4, 2), mt.ShapeError,
        r"reshape: \(2, 3\) has 6 elements, \(4, 2\) asks for 8; give a shape of 6 elements"),
    "reshape with two open extents": (lambda: ones(2, 3).reshape(-1, -1), mt.ShapeError,
        "at most one"),
    "broadcast_to": (lambda: mt.broadcast_to(ones(2, 3), (3, 2)), mt.ShapeError,
        r"\(2, 3\).*\(3, 2\)"),
    "a negative extent": (lambda: mt.zeros((-1, 2)), mt.ShapeError,
        "negative extent"),
    "half an element": (lambda: mt.zeros((2.5,)), mt.ShapeError,
        r"shape: \(2.5,\) given where an integer"),
    "split": (lambda: ones(5).split([2, 2]), mt.ShapeError,
        "sum to 4, but dimension 0 has 5"),
    "layer_norm": (lambda: nn.LayerNorm(4)(ones(2, 3)), mt.ShapeError,
        r"normalized_shape \(4,\) .* \(2, 3\)"),
    "where": (lambda: mt.where(mt.tensor([True, False]), ones(3), 0.0), mt.ShapeError,
        "do not broadcast"),
    # Axes and indices
    "sum over an axis there is not": (lambda: ones(2, 3).sum(axis=2), mt.ShapeError,
        "sum: axis 2 is out of range for a tensor of 2 dimensions; use -2 to 1"),
    "sum over an axis twice": (lambda: ones(2, 3).sum(axis=(0, -2)), mt.ShapeError,
        "names a dimension twice"),
    "softmax": (lambda: F.softmax(ones(2, 3), axis=5), mt.ShapeError,
        "softmax: axis 5 .*use -2 to 1"),
    "no permutation": (lambda: mt.permute_dims(ones(2, 3), (0, 0)), mt.ShapeError,
        r"\(0, 0\) is no permutation"),
    "an index too large": (lambda: ones(2, 3)[5], IndexError,
        "index 5 is out of range for dimension 0 of 2 elements"),
    "too many indices": (lambda: ones(2, 3)[0, 0, 0], IndexError,
        r"3 indices .*\(2, 3\); use at most 2"),
    "an index that is none": (lambda: ones(2, 3)["a"], IndexError,
        "'a'.*must be an int, a slice"),
    "a list of indices, one too large": (lambda: ones(4, 3)[[0, 9]], IndexError,
        "index 9 .*use -4 to 3"),
    "a mask too short": (lambda: ones(4, 3)[mt.tensor([True, False, True])], IndexError,
        "mask has 3 elements along dimension 0 of 4"),
    "item assignment of a wrong shape": (
        lambda: in_place(lambda x: x.__setitem__(0, ones(7)), 4, 3), mt.ShapeError,
        r"\(7,\) does not broadcast .*\(3,\)"),
    # Equations
    "an output index that no operand has": (
        lambda: mt.einsum("ij,jk->il", ones(2, 3), ones(3, 4)), mt.ShapeError,
        "'ij,jk->il' has the index 'l', which no operand has"),
    "an index of two extents": (lambda: mt.einsum("ij,jk->ik", ones(2, 3), ones(4, 4)), mt.ShapeError,
        "the index 'j' the extents 3 and 4"),
    "an operand too many": (lambda: mt.einsum("ij->i", ones(2, 3), ones(4, 4)), mt.ShapeError,
        "1 operands, got 2"),
    "no equation": (lambda: mt.einsum("i$->i", ones(2)), mt.ShapeError,
        r"'\$' in 'i\$->i' is not an index"),
    # Dtypes and data
    "an unknown dtype": (lambda: mt.zeros((2,), dtype="float33"), mt.DTypeError,
        "'float33' is unknown; use one of bool"),
    "astype to str": (lambda: ones(2).astype("str"), mt.DTypeError,
        "'str' is unknown; use one of"),
    "ragged lists": (lambda: mt.tensor([[1, 2], [3]]), mt.ShapeError,
        "ragged .*make every row the same length"),
    "a string": (lambda: mt.tensor("abc"), mt.DTypeError,
        "str data .* is not numeric; give a number"),
    "an array of objects": (lambda: mt.tensor(np.array([{}, None])), mt.DTypeError,
        "object.* is not numeric"),
    "None": (lambda: ones(2) + None, mt.DTypeError,
        "NoneType data .* is not numeric"),
    "a date": (lambda: mt.tensor(np.array(["2020"], "datetime64[D]")), mt.DTypeError,
        "datetime64"),
    "minus True": (lambda: -mt.tensor([True]), mt.DTypeError,
        "negative takes .*got bool; cast"),
    "half added to an integer in place": (
        lambda: in_place(lambda x: add_to(x, 0.5), 2, dtype=mt.int64), mt.DTypeError,
        "float32, which a tensor of int64 cannot hold"),
    # Layouts
    "a mesh axis there is not": (lambda: ones(2, layout={"model": mt.Shard(0)}), mt.LayoutError,
        r"mesh axis 'model'; this mesh has \['data'\]"),
    "a dimension there is not": (lambda: ones(2, layout=mt.Shard(1)), mt.LayoutError,
        r"Shard\(1\) .*use -1 to 0"),
    "a split scalar": (lambda: mt.tensor(1.0, layout=mt.Shard(0)), mt.LayoutError,
        r"use Replicate\(\)"),
    "no layout": (lambda: ones(2).redistribute(0), mt.LayoutError,
        r"use Shard\(dim\), Replicate\(\)"),
    "more placements than axes": (lambda: mt.tensor([1.0], layout=[mt.Shard(0)] * 2), mt.LayoutError,
        "2 placements; the mesh has 1 axes"),
    "an unknown reduction": (lambda: mt.Partial("mean"), mt.LayoutError,
        "use 'sum', 'max' or 'min'"),
    # The tape
    "backward twice": (
        twice, mt.GradError,
        r"second time through mul \(recorded at .*test_bad_input.py:\d+\).*"
        "retain_graph=True"),
    "backward of many": (lambda: (leaf(3) * 2).backward(), mt.GradError,
        r"shape \(3,\); reduce it"),
    "backward of a constant": (lambda: ones(3).sum().backward(), mt.GradError,
        "set requires_grad=True"),
    "backward with a gradient that does not fit": (lambda: (leaf(3) * 2).backward(ones(4)), mt.ShapeError,
        r"gradient has shape \(4,\), the tensor \(3,\)"),
    "a leaf changed in place": (lambda: add_to(leaf(3), 1), mt.GradError,
        r"inside no_grad\(\)"),
    "gradients of integers": (lambda: mt.tensor([1, 2], requires_grad=True), mt.GradError,
        "int64 has no gradient"),
    "a gradient of another shape": (lambda: setattr(leaf(2), "grad", ones(3)), mt.ShapeError,
        r"\(3,\) .*\(2,\)"),
    "a gradient that is none": (lambda: setattr(leaf(2), "grad", 5), TypeError,
        "a int given; a gradient is a tensor"),
    "grad of what was not used": (lambda: mt.grad(leaf(2).sum(), leaf(2)), mt.GradError,
        "allow_unused=True"),
    # Values
    "item of many": (lambda: ones(3).item(), mt.ShapeError,
        r"3 elements \(shape \(3,\)\); reduce it"),
    "item of none": (lambda: ones(0).item(), mt.ShapeError,
        "0 elements"),
    "truth of many": (lambda: bool(ones(3)), mt.ShapeError,
        r"bool\(\): .*\(3,\).*use \.any\(\) or \.all\(\)"),
    "length of a scalar": (lambda: len(mt.tensor(1.0)), TypeError,
        "0 dimensions"),
    "iteration over a scalar": (lambda: list(mt.tensor(1.0)), TypeError,
        "0 dimensions"),
    "pickle": (lambda: pickle.dumps(ones(2)), TypeError,
        r"use meshtape.save\(\), or .numpy\(\)"),
    # Classes
    "classes that are floats": (
        lambda: F.cross_entropy(ones(3, 4), mt.tensor([0.0, np.nan, 1.0])), mt.DTypeError,
        "integer dtype, got float32; cast them"),
    "classes of another number of rows": (
        lambda: F.cross_entropy(ones(3, 4), mt.tensor([0, 1])), mt.ShapeError,
        r"input \(3, 4\) and target \(2,\)"),
    "embedding by floats": (lambda: F.embedding(mt.tensor([0.0]), ones(4, 2)), mt.DTypeError,
        "must be integers"),
    # Models, optimizers, data
    "dropout": (lambda: F.dropout(ones(3), 1.5), ValueError,
        "p is 1.5; a probability"),
    "a learning rate": (lambda: optim.SGD([leaf(2)], lr=-1), ValueError,
        "lr is -1; use a number of 0 or more"),
    "no parameters": (lambda: optim.SGD([], lr=1), ValueError,
        r"pass model.parameters\(\)"),
    "a state that lacks an entry": (
        lambda: nn.Linear(2, 3).load_state_dict({"weight": np.ones((3, 2))}), mt.StateError,
        "missing: bias .*nothing was loaded"),
    "a state of another shape": (
        lambda: nn.Linear(2, 3).load_state_dict(nn.Linear(3, 3).state_dict()), mt.StateError,
        r"weight has shape \(3, 3\), the model needs \(3, 2\)"),
    "data of different lengths": (
        lambda: mt.data.DataLoader((np.ones((3, 2)), np.ones(4)), 2), mt.ShapeError,
        r"same number of rows .*\(3, 2\), 1: \(4,\)"),
    "parallelize by a name there is not": (
        lambda: nn.parallelize(nn.Linear(2, 3), {"wight": mt.Shard(0)}), mt.LayoutError,
        "'wight' matches no parameter; this model has weight, bias"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_driver_can_see_raises_at_the_call(survivor: mt.Tensor, case: str) -> None:
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=message):
        call()


# Values that only a worker sees: the error comes when somebody waits.
UNSEEN: dict[str, tuple[Callable[[], mt.Tensor], str]] = {
    "a class too large": (lambda: F.cross_entropy(ones(4, 4), mt.tensor([0, 9, 1, 2], layout=mt.Shard(0))),
                          r"cross_entropy\(\(4, 4\) float32 .*target 9 is not one of 4 classes; use 0 to 3"),
    "a negative class": (lambda: F.cross_entropy(ones(3, 4), mt.tensor([0, -3, 1])), "target -3 is not one"),
    "a word there is not": (lambda: F.embedding(mt.tensor([0, 7]), ones(4, 2)), "index 7 .*use -4 to 3"),
    "an index too large": (lambda: ones(4, 3)[mt.tensor([0, 9])], "index 9 .*use -4 to 3"),
    "take": (lambda: mt.take(ones(4, 2), mt.tensor([5]), axis=0), "index 5 .*use -4 to 3"),
    "an integer too large": (lambda: mt.tensor([1, 2]) + 2 ** 70, "add.*too large"),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_what_only_a_worker_can_see_raises_at_the_next_wait_and_names_the_line(survivor: mt.Tensor,
                                                                               case: str) -> None:
    call, message = UNSEEN[case]
    bad = call()
    with pytest.raises(mt.WorkerError, match=message) as caught:
        mt.synchronize()
    assert f"({__file__}:{call.__code__.co_firstlineno})" in str(caught.value)
    mt.synchronize()
    np.testing.assert_array_equal((survivor + 1).numpy(), np.arange(6.0) + 1)
    for spoiled in (bad, (bad * 2).sum()):
        with pytest.raises(mt.WorkerError, match=message):
            spoiled.numpy()


def test_a_spoiled_gradient_spoils_the_model_and_a_reload_mends_it(survivor: mt.Tensor) -> None:
    model = nn.Linear(5, 4)
    opt = optim.SGD(model.parameters(), lr=0.1)
    before = {k: v.numpy() for k, v in model.state_dict().items()}
    x, good = mt.ones((4, 5), layout=mt.Shard(0)), mt.tensor([0, 1, 2, 3], layout=mt.Shard(0))

    def step(y: mt.Tensor) -> mt.Tensor:
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    step(mt.tensor([0, 1, 2, 17], layout=mt.Shard(0)))
    for _ in range(2):
        with pytest.raises(mt.WorkerError, match="target 17"):
            model.weight.numpy()
    model.load_state_dict(before)
    opt.zero_grad()
    first = step(good).item()
    assert step(good).item() < first


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_one_bad_batch_in_a_steady_loop_fails_that_step_only(workers: int) -> None:
    """With the loss asked for at each step, so that its value comes unasked; nothing is trained on it."""
    with on(workers):
        model = nn.Linear(5, 4)
        x, losses = ones(6, 5, layout=mt.Shard(0)), []
        for step in range(12):
            classes = np.array([0, 1, 2, 3, 0, 1])
            if step in (1, 7, 8):
                classes[step % 6] = 4
            loss = F.cross_entropy(model(x), mt.tensor(classes, layout=mt.Shard(0)))
            loss.backward()
            try:
                losses.append(loss.item())
            except mt.WorkerError as error:
                assert "target 4 is not one of 4 classes" in str(error)
                with pytest.raises(mt.WorkerError, match="target 4"):
                    model.weight.grad.numpy()
                losses.append(None)
            model.zero_grad()
        assert [at for at, value in enumerate(losses) if value is None] == [1, 7, 8]
        assert len({value for value in losses if value is not None}) == 1


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("flushed", [(), (0,), (1,), (0, 1)], ids=str)
def test_spoiled_values_that_are_let_go_leave_nothing_and_nobody_waiting(workers: int, flushed: Any) -> None:
    """Also where the value spoiled last is used up by a batch with a collective."""
    with watched(workers) as (session, made):
        table = mt.ones((4, 4), requires_grad=True)

        def spoil() -> None:
            total = (F.embedding(mt.tensor([0, 99, 1, 2], layout=mt.Shard(0)), table) * 2).sum()
            if 0 in flushed:
                mt.flush()
            total.backward()
            if 1 in flushed:
                mt.flush()
            total = total.redistribute(mt.Replicate()) + 1

        for _ in range(3):
            spoil()
            table.grad = None
            with pytest.raises(mt.WorkerError, match="index 99"):
                mt.synchronize()
            while session.inflight.errors or session.inflight.poisoned:
                mt.synchronize()
            assert blocks(session, made) == [1] * workers
            assert not session.inflight.poisoned and [w.poisoned for w in made] == [0] * workers
        assert table.sum().item() == 16.0


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_batch_smaller_than_the_mesh_trains_like_on_one_worker(workers: int, rows: int) -> None:
    def train() -> list[np.ndarray]:
        mt.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, 3))
        opt = optim.AdamW(model.parameters(), lr=0.1)
        rng = np.random.default_rng(0)
        for _ in range(3):
            x = mt.tensor(rng.normal(size=(rows, 5)).astype(np.float32), layout=mt.Shard(0))
            y = mt.tensor(rng.integers(0, 3, rows), layout=mt.Shard(0))
            loss = F.cross_entropy(model(x), y, reduction="sum")
            loss = loss + model(x).max() if rows else loss
            opt.zero_grad()
            loss.backward()
            opt.step()
        return [loss.numpy(), *(p.numpy() for p in model.parameters())]

    with on(1):
        want = train()
    with on(workers):
        for found, wanted in zip(train(), want, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


# --- meshes -----------------------------------------------------------------------------------------------

def test_a_mesh_that_runs_is_not_replaced() -> None:
    with on(2):
        x = ones(3)
        with pytest.raises(mt.MeshError, match=r"a mesh of 2 workers is running; call meshtape.shut"):
            mt.init(workers=3, backend="local")
        assert x.sum().item() == 3


@pytest.mark.parametrize(("options", "message"), [
    ({"workers": 0}, "workers=0: needed a whole number of at least 1"),
    ({"workers": -2, "backend": "local"}, "workers=-2"),
    ({"workers": "2"}, "workers='2'"),
    ({"workers": 2, "backend": "mpi"}, "backend='mpi'.*use backend=\"local\""),
    ({"workers": 4, "backend": "local", "mesh": {"data": 3}}, "3 places, but there are 4 workers"),
    ({"workers": 2, "backend": "local", "address": "auto"}, "address='auto'"),
])
def test_a_mesh_that_cannot_start_leaves_everything_as_it_was(options: Any, message: str) -> None:
    with on(1):
        x = ones(3)
        with pytest.raises(mt.MeshError, match=message):
            mt.init(**options)
        assert x.sum().item() == 3


def test_tensors_made_before_init_are_announced_as_lost() -> None:
    with on(1):
        x = ones(3)
        x.sum().item()
        with pytest.warns(UserWarning, match=r"tensors made before init\(\)"):
            mt.init(workers=2, backend="local")
        with pytest.raises(mt.SessionClosed, match="make it again on the current mesh"):
            x.numpy()


def test_tensors_of_two_meshes_do_not_mix() -> None:
    with on(2):
        old = ones(3)
    with on(2):
        new = ones(3)
        for call in (lambda: new + old, lambda: old + new, lambda: old[0], lambda: mt.concat([new, old])):
            with pytest.raises(mt.SessionClosed, match=r"a tensor of shape \(3,\) belongs to a mesh that"):
                call()
        assert (new + 1).sum().item() == 6


def test_use_after_shutdown_says_so() -> None:
    with on(2):
        x = leaf(3)
        y = (x * x).sum()
        mt.shutdown()
        for call in (x.numpy, y.item, y.backward, lambda: x + 1, lambda: repr(x)):
            with pytest.raises(mt.SessionClosed, match="was shut down or replaced"):
                call()
        mt.shutdown()
        assert ones(3).sum().item() == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_another_thread_is_told_that_tensors_belong_to_one(workers: int) -> None:
    with on(workers):
        x, found = leaf(3), []
        calls = [x.numpy, lambda: x + 1, x.sum().backward, lambda: mt.tensor([1.0]), mt.synchronize,
                 lambda: ones(3)]

        def work() -> None:
            for call in calls:
                try:
                    call()
                except mt.MeshError as error:
                    found.append(str(error))

        thread = threading.Thread(target=work, name="another")
        thread.start()
        thread.join()
        assert len(found) == len(calls) and all("this is 'another'" in text for text in found), found
        assert x.sum().item() == 3


# --- gradients that come and go ---------------------------------------------------------------------------

def test_gradients_that_are_deleted_or_set_to_none_midway_are_skipped(survivor: mt.Tensor) -> None:
    model = nn.Linear(3, 2)
    opt = optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        before = model.weight.numpy(), model.bias.numpy()
        opt.zero_grad()
        model(ones(4, 3)).sum().backward()
        del model.weight.grad
        opt.step()
        assert model.weight.grad is None
        np.testing.assert_array_equal(model.weight.numpy(), before[0])
        assert not np.array_equal(model.bias.numpy(), before[1])


# --- checkpoints ------------------------------------------------------------------------------------------

def test_a_wrong_checkpoint_changes_nothing(survivor: mt.Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        mt.load(tmp_path / "none.safetensors")
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"\x07" * 100)
    with pytest.raises(mt.StateError, match=r"noise\.safetensors"):
        mt.load(noise)
    other = tmp_path / "other.safetensors"
    mt.save(nn.Linear(7, 2).state_dict(), other)
    model = nn.Linear(3, 2)
    before = {k: v.numpy() for k, v in model.state_dict().items()}
    with pytest.raises(mt.StateError, match=r"weight has shape \(2, 7\), the model needs \(2, 3\)"):
        model.load_state_dict(mt.load(other))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])


# --- NumPy's numbers are numbers --------------------------------------------------------------------------

def test_numpys_integers_and_floats_do_wherever_pythons_do(survivor: mt.Tensor) -> None:
    i, f = np.int64, np.float32
    x = mt.tensor(np.arange(24.0).reshape(2, 3, 4))
    pairs = [
        (x.sum(axis=i(0)), x.sum(axis=0)),
        (x.sum(axis=(i(0), i(2))), x.sum(axis=(0, 2))),
        (x.mean(axis=np.array([0, 1])), x.mean(axis=(0, 1))),
        (x.argmax(axis=i(1)), x.argmax(axis=1)),
        (x.reshape(i(6), i(4)), x.reshape(6, 4)),
        (mt.reshape(x, np.array([6, 4])), x.reshape(6, 4)),
        (mt.permute_dims(x, np.array([2, 0, 1])), mt.permute_dims(x, (2, 0, 1))),
        (mt.roll(x, i(1), axis=i(2)), mt.roll(x, 1, axis=2)),
        (F.softmax(x, axis=i(-1)), F.softmax(x, axis=-1)),
        (mt.concat([x, x], axis=i(1)), mt.concat([x, x], axis=1)),
        (mt.expand_dims(x, i(0)), mt.expand_dims(x, 0)),
        (mt.moveaxis(x, i(0), i(2)), mt.moveaxis(x, 0, 2)),
        (x[i(0)], x[0]),
        (x[i(0) : i(1)], x[:1]),
        (mt.zeros((i(3),)), mt.zeros(3)),
        (mt.arange(i(3)), mt.arange(3)),
        (x + f(2), x + 2.0),
        (mt.clip(x, f(1), f(2)), mt.clip(x, 1.0, 2.0)),
        (x.split(i(2), axis=i(2))[1], x.split(2, axis=2)[1]),
        (x.sort(axis=i(1), descending=np.bool_(True)), x.sort(axis=1, descending=True)),
        (mt.ones(4, layout=mt.Shard(i(0))), mt.ones(4)),
    ]
    for at, (found, wanted) in enumerate(pairs):
        assert found.dtype == wanted.dtype, at
        np.testing.assert_array_equal(found.numpy(), wanted.numpy(), str(at))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum(axis=1.5),
        lambda x: F.softmax(x, axis="rows"),
        lambda x: mt.permute_dims(x, (0.0, 1)),
        lambda x: x.reshape(2.0, 3),
        lambda x: mt.roll(x, 2**70, axis=0),
        lambda x: mt.concat([x, x], axis=0.5),
    ],
)
def test_what_is_no_integer_is_refused_at_the_call(survivor: mt.Tensor, call: Any) -> None:
    with pytest.raises((mt.ShapeError, TypeError), match=r"integer|int of 64 bits"):
        call(ones(2, 3))


def test_ctrl_c_while_a_batch_is_put_together_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch stays pending, and its program is sent when it goes out after all."""
    with on(2) as session:
        def interrupted(slots: Any) -> Any:
            monkeypatch.undo()
            raise KeyboardInterrupt

        x = mt.tensor(np.arange(4.0), layout=mt.Shard(0))
        y = x * 3.0
        monkeypatch.setattr(session, "_cut_feeds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mt.flush()
        np.testing.assert_array_equal(y.numpy(), 3 * np.arange(4.0))
