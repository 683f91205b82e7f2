"""Float32 masters of 16-bit parameters, and loss scaling: PyTorch's steps, decided on the workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from beside_torch import torch
from meshes import on
from spy import Spy, watched

import meshtape as mt
from meshtape import nn, optim

F, TF = nn.functional, torch.nn.functional
RNG = np.random.default_rng(0)
BF16 = mt.bfloat16
X = RNG.normal(size=(12, 7)).astype(np.float32)
Y = RNG.integers(0, 5, 12)
SPLIT_FROM = "meshtape.optim.optimizer.SPLIT_FROM"


def shard(a: Any) -> mt.Tensor:
    return mt.tensor(a, layout=mt.Shard(0))


# --- parameters of 16 bits ----------------------------------------------------------------------------------

OPTIMIZERS = {"SGD": {"lr": 1e-4, "momentum": 0.9}, "AdamW": {"lr": 1e-5}, "Adagrad": {"lr": 1e-5},
              "RMSprop": {"lr": 1e-5, "momentum": 0.5}}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masters_add_up_what_16_bits_would_lose(name: str, dtype: str, workers: int) -> None:
    p = nn.Parameter(mt.tensor(RNG.uniform(0.5, 1.0, (6, 4))).astype(dtype))
    start = p.numpy().astype(np.float32)
    t = torch.nn.Parameter(torch.tensor(start))
    ours, theirs = (getattr(lib, name)([x], **OPTIMIZERS[name]) for lib, x in ((optim, p), (torch.optim, t)))
    for step in range(12):
        grad = RNG.normal(1.0, 0.1, (6, 4)).astype(np.float32)
        p.grad = mt.tensor(grad, layout=mt.Shard(0) if step % 2 else None).astype(dtype)
        t.grad = torch.tensor(p.grad.numpy().astype(np.float32))
        ours.step()
        theirs.step()
    master = ours.state[p]["master_weight"]
    assert p.dtype.name == dtype and all(
        v.dtype == np.float32 for k, v in ours.state[p].items() if k != "step")
    np.testing.assert_allclose(master.numpy(), t.detach().numpy(), rtol=1e-6)
    np.testing.assert_array_equal(p.numpy(), master.astype(dtype).numpy())
    assert (master.numpy() < start).all()


@pytest.mark.parametrize("axes", [1, 2, 3, {"data": 2, "model": 2}], ids=str)
def test_addends_of_16_bits_are_summed_in_float32(axes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and divided updates take the same steps, and gradients are reduced as float32."""
    found = []
    for split_from in (0, 1 << 60):
        monkeypatch.setattr(SPLIT_FROM, split_from)
        with on(axes) as session:
            mt.manual_seed(0)
            model = nn.Linear(7, 5).bfloat16()
            opt, spy = optim.AdamW(model.parameters(), lr=1e-2), Spy(session)
            for _ in range(5):
                loss = F.cross_entropy(model(shard(X).astype(BF16)), shard(Y))
                opt.zero_grad()
                loss.backward()
                opt.step()
            found.append([opt.state[p]["master_weight"].numpy() for p in model.parameters()])
            sent = [b for b in spy.take() if b.program]
            assert not any(b.fresh for b in sent[3:5])
            kinds = {t.dtype for b in sent for i in b.program.instrs for t in i.ins
                     if i.op in ("all_reduce_bucket", "reduce_scatter_bucket")}
            assert kinds == ({"float32"} if session.axes.size > 1 else set())
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def step(model: Any, opt: Any) -> None:
    opt.zero_grad()
    weight = next(model.parameters())
    model(mt.tensor(X[:, :weight.shape[1]]).astype(weight.dtype)).sum().backward()
    opt.step()


def test_masters_travel_in_the_state(workers: int) -> None:
    model = nn.Linear(7, 5).bfloat16()
    opt = optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        step(model, opt)
    state, weights = opt.state_dict(), {k: v.numpy() for k, v in model.state_dict().items()}
    again = nn.Linear(7, 5).bfloat16()
    again.load_state_dict(weights)
    other = optim.AdamW(again.parameters(), lr=1e-3)
    other.load_state_dict(state)
    for _ in range(2):
        step(model, opt)
        step(again, other)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(opt.state[p]["master_weight"].numpy(),
                                      other.state[q]["master_weight"].numpy())
    plain = optim.AdamW(again.parameters(), lr=1e-3, master_weights=False)
    plain.load_state_dict(state)
    step(again, plain)
    assert all("master_weight" not in s and s["exp_avg"].dtype == BF16 for s in plain.state.values())


def test_a_parameter_given_other_values_has_a_new_master() -> None:
    model = nn.Linear(3, 2, bias=False).bfloat16()
    opt = optim.SGD(model.parameters(), lr=0.0)
    step(model, opt)
    model.load_state_dict({"weight": np.full((2, 3), 2.0)})
    step(model, opt)
    np.testing.assert_array_equal(model.weight.numpy().astype(float), 2.0)
    with mt.no_grad():
        model.weight += 1.0
    step(model, opt)
    np.testing.assert_array_equal(model.weight.numpy().astype(float), 3.0)
    model.float()
    step(model, opt)
    assert model.weight.dtype == np.float32 and "master_weight" not in opt.state[model.weight]
    model.half()
    step(model, opt)
    assert opt.state[model.weight]["master_weight"].dtype == np.float32


# --- loss scaling -------------------------------------------------------------------------------------------

W = [RNG.normal(size=s).astype(np.float32) for s in [(33, 7), (33,), (5, 33), (5,)]]
SCALED = {"AdamW": {"lr": 1e-2}, "SGD": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
          "RMSprop": {"lr": 1e-3, "momentum": 0.5}, "Adagrad": {"lr": 1e-2, "lr_decay": 0.1}}


def scaled_training(theirs: bool, name: str, bad: Any, look: Any = lambda scaler, opt: None) -> Any:
    """14 steps, of which those in `bad` overflow. Parameters, the scaler's state, steps that were taken."""
    lib, optimizers, losses, tensor = (
        (torch.nn, torch.optim, TF, torch.tensor) if theirs else (nn, optim, F, shard))
    model = lib.Sequential(lib.Linear(7, 33), lib.Tanh(), lib.Linear(33, 5))
    model.load_state_dict({k: tensor(w) for k, w in zip(model.state_dict(), W, strict=True)})
    opt = getattr(optimizers, name)(model.parameters(), **SCALED[name])
    options = {"init_scale": 1024.0, "growth_interval": 3}
    scaler = torch.amp.GradScaler("cpu", **options) if theirs else mt.amp.GradScaler(**options)
    for at in range(14):
        x = X * np.float32(np.inf if at in bad else 1)
        loss = losses.cross_entropy(model(tensor(x)), tensor(Y))
        opt.zero_grad()
        scaler.scale(loss).backward()
        look(scaler, opt)
        scaler.step(opt)
        scaler.update()
    steps = {int(s["step"]) for s in opt.state_dict()["state"].values() if "step" in s}
    return [p.detach().numpy() for p in model.parameters()], scaler.state_dict(), steps


@pytest.mark.parametrize("bad", [(0, 5, 6), (3,)], ids=str)
@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("split_from", [0, 1 << 60])
def test_steps_that_overflow_are_left_out_as_torch_does(
        name: str, bad: Any, split_from: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SPLIT_FROM, split_from)
    found, wanted = (scaled_training(theirs, name, bad) for theirs in (False, True))
    assert found[1] == wanted[1] and found[2] == {14 - len(bad)} and wanted[2] in ({14 - len(bad)}, set())
    for a, b in zip(found[0], wanted[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6)


def test_gradients_can_be_clipped_between_unscaling_and_the_step(workers: int) -> None:
    def look(scaler: Any, opt: Any) -> None:
        scaler.unscale_(opt)
        utils = nn.utils if isinstance(scaler, mt.amp.GradScaler) else torch.nn.utils
        utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.05)

    found, wanted = (scaled_training(theirs, "AdamW", (2,), look) for theirs in (False, True))
    assert found[1:] == wanted[1:]
    for a, b in zip(found[0], wanted[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("axes", [1, 2])
def test_a_scaled_step_waits_for_nothing_and_is_one_message(axes: int) -> None:
    with watched(axes) as (session, _):
        model, scaler = nn.Linear(7, 5), mt.amp.GradScaler(init_scale=8.0)
        opt, spy, counts = optim.AdamW(model.parameters(), lr=1e-2), Spy(session), []
        for _ in range(7):
            with mt.autocast("float16"):
                loss = F.cross_entropy(model(shard(X)), shard(Y))
            opt.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            counts.append([(b.fresh, b.n_fetches) for b in spy.take()])
        assert counts[3:] == [[(False, 0)]] * 4 and [len(c) for c in counts] == [1] * 7
        assert scaler.get_scale() == 8.0


def test_a_scale_grows_after_its_interval_and_not_beyond_float32() -> None:
    w = nn.Parameter(mt.tensor([1.0]))
    opt, scaler = optim.SGD([w], lr=0.0), mt.amp.GradScaler(init_scale=2.0**126, growth_interval=2)
    scales = []
    for _ in range(6):
        opt.zero_grad()
        scaler.scale(w.sum() * 2.0**-120).backward()
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [2.0**126, *[2.0**127] * 5]
    scaler.update(4.0)
    assert scaler.get_scale() == 4.0


def test_gradients_of_16_bits_are_unscaled_where_there_are_masters(workers: int) -> None:
    model = nn.Linear(7, 5).half()
    opt, scaler, losses = optim.AdamW(model.parameters(), lr=1e-2), mt.amp.GradScaler(init_scale=256.0), []
    for at in range(8):
        x = shard(X * np.float32(np.inf if at == 2 else 1)).astype("float16")
        loss = F.cross_entropy(model(x), shard(Y))
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and np.isfinite(losses[3:]).all() and scaler.get_scale() == 128.0
    plain = optim.SGD(model.parameters(), lr=1e-2, master_weights=False)
    with pytest.raises(mt.GradError, match="float16, and may vanish"):
        loss = F.cross_entropy(model(shard(X).astype("float16")), shard(Y))
        plain.zero_grad()
        loss.backward()
        scaler.step(plain)


def test_states_travel_and_mistakes_are_told() -> None:
    w = nn.Parameter(mt.tensor([1.0]))
    opt, scaler = optim.SGD([w], lr=0.1), mt.amp.GradScaler()
    with pytest.raises(mt.GradError, match="nothing was looked at"):
        scaler.update()
    with pytest.raises(mt.GradError, match="no gradients"):
        scaler.step(opt)
    scaler.scale([w.sum(), (w * 2,)])[0].backward()
    scaler.unscale_(opt)
    with pytest.raises(mt.GradError, match="called on this optimizer before"):
        scaler.unscale_(opt)
    scaler.step(opt)
    with pytest.raises(mt.GradError, match="called before with this optimizer"):
        scaler.step(opt)
    scaler.update()
    np.testing.assert_allclose(w.numpy(), [0.9])
    other = mt.amp.GradScaler(init_scale=1.0)
    other.load_state_dict(scaler.state_dict())
    theirs = torch.amp.GradScaler("cpu")
    theirs.load_state_dict(other.state_dict())
    assert theirs.state_dict() == scaler.state_dict()
    with pytest.raises(mt.StateError, match="not the state"):
        other.load_state_dict({"scale": 1.0})
    with pytest.raises(ValueError, match="growth_factor is 1"):
        mt.amp.GradScaler(growth_factor=1.0)


def test_a_scaler_that_is_off_does_nothing() -> None:
    w = nn.Parameter(mt.tensor([1.0]))
    opt, scaler = optim.SGD([w], lr=0.1), mt.amp.GradScaler(enabled=False)
    loss = w.sum()
    assert scaler.scale(loss) is loss and not scaler.is_enabled()
    loss.backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    np.testing.assert_allclose(w.numpy(), [0.9])
    assert scaler.get_scale() == 1.0 and scaler.state_dict() == {} and opt.state[w]["step"] == 1
