"""Optimizers, schedules and clipping take PyTorch's steps, on one worker and on several."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from beside_torch import torch

import meshtape as mt
from meshtape import nn, optim
from meshtape.optim import lr_scheduler as sched
from meshtape.scheduler.session import Session

SHAPES = [(7, 5), (5,), (), (2, 3, 4)]
RNG = np.random.default_rng(0)
STARTS = [RNG.normal(size=s) for s in SHAPES]
TARGETS = [RNG.normal(size=s) for s in SHAPES]


def ours_and_theirs() -> tuple[list[Any], list[Any]]:
    """Equal parameters; ours are laid out in different ways."""
    layouts = [mt.Shard(0), mt.Replicate(), None, mt.Shard(2)]
    return ([nn.Parameter(mt.tensor(a, layout=where)) for a, where in zip(STARTS, layouts, strict=True)],
            [torch.nn.Parameter(torch.tensor(a)) for a in STARTS])


def descend(ps: Any, optimizer: Any, tensor: Any) -> None:
    """A step on a loss whose gradients differ from step to step."""
    optimizer.zero_grad()
    loss = sum((((p - tensor(t)) * p) ** 2).sum() for p, t in zip(ps, TARGETS, strict=True))
    loss.backward()


def groups(ps: Any) -> list[dict[str, Any]]:
    return [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.003, "weight_decay": 0.2}]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.01}),
    ("SGD", {"lr": 0.01, "momentum": 0.9}),
    ("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.01, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.0001, "momentum": 0.5, "maximize": True}),
    ("Adam", {"lr": 0.02}),
    ("Adam", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.02, "maximize": True}),
    ("AdamW", {"lr": 0.02}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.3, "amsgrad": True}),
    ("AdamW", {"lr": 0.02, "maximize": True, "weight_decay": 0.0}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9, "momentum": 0.7, "centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.7, "maximize": True}),
    ("Adagrad", {"lr": 0.05}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3}),
]


@pytest.mark.parametrize("name, options", CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_twenty_steps_are_torch_s(name: str, options: dict[str, Any], workers: int) -> None:
    ps, ts = ours_and_theirs()
    ours = getattr(optim, name)(groups(ps), **options)
    theirs = getattr(torch.optim, name)(groups(ts), **options)
    for step in range(20):
        descend(ps, ours, mt.tensor)
        descend(ts, theirs, torch.tensor)
        if step == 7:                                    # a rate changed by hand, and a parameter left out
            ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.005
            ps[1].grad = ts[1].grad = None
        ours.step()
        theirs.step()
    for p, t in zip(ps, ts, strict=True):
        np.testing.assert_allclose(p.numpy(), t.detach().numpy(), rtol=1e-11, atol=1e-12)


def test_equal_numbers_are_told_apart_when_an_update_is_repeated() -> None:
    """Both betas and the weight decay are one Python object at first; later each changes by itself."""
    ps, ts = ours_and_theirs()
    half = 0.5
    ours, theirs = (lib.AdamW(params, lr=half, betas=(half, half), weight_decay=half)
                    for lib, params in ((optim, ps), (torch.optim, ts)))
    for change in ({}, {}, {"lr": 0.1}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.0}, {"betas": (0.1, 0.9)}):
        ours.param_groups[0].update(change)
        theirs.param_groups[0].update(change)
        descend(ps, ours, mt.tensor)
        descend(ts, theirs, torch.tensor)
        ours.step()
        theirs.step()
    for p, t in zip(ps, ts, strict=True):
        np.testing.assert_allclose(p.numpy(), t.detach().numpy(), rtol=1e-11, atol=1e-12)


def test_a_state_dict_is_a_snapshot_and_a_state_can_be_replaced(workers: int) -> None:
    (p, *_), (t, *_) = ours_and_theirs()
    ours, theirs = optim.Adam([p], lr=0.1), torch.optim.Adam([t], lr=0.1)
    for step in range(6):
        for x, optimizer, tensor in ((p, ours, mt.tensor), (t, theirs, torch.tensor)):
            optimizer.zero_grad()
            ((x - tensor(TARGETS[0])) ** 2).sum().backward()
            if step == 4:
                optimizer.state[x]["exp_avg"] = tensor(np.ones(SHAPES[0]))
            optimizer.step()
        if step == 2:
            saved = ours.state_dict()["state"][0]
            held, before = ours.state[p]["exp_avg"], saved["exp_avg"].numpy()
    np.testing.assert_allclose(p.numpy(), t.detach().numpy(), rtol=1e-11, atol=1e-12)
    assert saved["step"] == 3 and np.array_equal(saved["exp_avg"].numpy(), before)
    assert held is not ours.state[p]["exp_avg"]


def test_parameters_keep_identity_layout_and_leaf() -> None:
    mt.init(workers=2, backend="local")
    ps, _ = ours_and_theirs()
    optimizer = optim.AdamW(ps, lr=0.1)
    edges, layouts = [p.edge for p in ps], [p.layout for p in ps]
    for _ in range(2):
        descend(ps, optimizer, mt.tensor)
        optimizer.step()
    assert [p.edge for p in ps] == edges and all(p.is_leaf and p.requires_grad for p in ps)
    assert [p.layout for p in ps] == layouts
    assert all(optimizer.state[p]["exp_avg"].layout == p.layout for p in ps)


def test_a_changing_rate_repeats_the_program() -> None:
    mt.init(workers=2, backend="local")
    ps, _ = ours_and_theirs()
    optimizer = optim.AdamW(ps, lr=0.1)
    schedule = sched.CosineAnnealingLR(optimizer, 50)
    for _ in range(4):
        descend(ps, optimizer, mt.tensor)
        optimizer.step()
        schedule.step()
    before = mt.current_mesh()._session.stats.digest_hits
    for _ in range(5):
        descend(ps, optimizer, mt.tensor)
        optimizer.step()
        schedule.step()
    assert mt.current_mesh()._session.stats.digest_hits - before == 5


def test_a_training_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mt.init(workers=2, backend="local")
    ps, _ = ours_and_theirs()
    optimizer = optim.AdamW(ps, lr=0.1)
    schedule = sched.StepLR(optimizer, 2)

    def waits(*args: Any) -> None:
        raise AssertionError("a step waited for a value")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "fetch", waits)
        patch.setattr(Session, "wait", waits)
        for _ in range(3):
            descend(ps, optimizer, mt.tensor)
            nn.utils.clip_grad_norm_(ps, 1.0)
            nn.utils.clip_grad_value_(ps, 0.5)
            optimizer.step()
            schedule.step()
            optimizer.state_dict()
    assert all(np.isfinite(p.numpy()).all() for p in ps)


def test_step_runs_a_closure_and_returns_its_loss() -> None:
    p = nn.Parameter(mt.tensor([3.0]))
    optimizer = optim.SGD([p], lr=0.5)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with mt.no_grad():
        assert optimizer.step(closure).item() == 9.0
    assert p.numpy().tolist() == [0.0]


def test_an_error_of_a_worker_names_the_line_of_step() -> None:
    p = nn.Parameter(mt.tensor([3.0]))
    (p * p).sum().backward()
    optimizer = optim.Adam([p])
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (1.0, 0.9)         # divides by zero in the kernel
    optimizer.step()
    with pytest.raises(mt.WorkerError, match=r"adam_update.*test_optim\.py"):
        p.numpy()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_state_goes_on_where_it_was_saved(name: str) -> None:
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    ps, _ = ours_and_theirs()
    optimizer = getattr(optim, name)(groups(ps), lr=0.01, **options)
    for _ in range(3):
        descend(ps, optimizer, mt.tensor)
        optimizer.step()
    state, values = optimizer.state_dict(), [p.numpy() for p in ps]
    for _ in range(3):
        descend(ps, optimizer, mt.tensor)
        optimizer.step()
    wanted = [p.numpy() for p in ps]
    assert state["param_groups"][1]["params"] == [2, 3]
    arrays = {"state": {i: {k: v if isinstance(v, int) else v.numpy() for k, v in s.items()}
                        for i, s in state["state"].items()}, "param_groups": state["param_groups"]}
    mt.shutdown()
    mt.init(workers=3, backend="local")
    qs = [nn.Parameter(mt.tensor(v)) for v in values]
    again = getattr(optim, name)(groups(qs), lr=0.5)
    again.load_state_dict(arrays)
    for _ in range(3):
        descend(qs, again, mt.tensor)
        again.step()
    for q, w in zip(qs, wanted, strict=True):
        np.testing.assert_allclose(q.numpy(), w, rtol=1e-12)


def test_torch_s_own_state_is_understood() -> None:
    ps, ts = ours_and_theirs()
    ours, theirs = optim.Adam(ps, lr=0.1), torch.optim.Adam(ts, lr=0.01)
    for _ in range(2):
        descend(ts, theirs, torch.tensor)
        theirs.step()
    for p, t in zip(ps, ts, strict=True):
        with mt.no_grad():
            p.copy_(t.detach().numpy())
    ours.load_state_dict(theirs.state_dict())
    descend(ps, ours, mt.tensor)
    descend(ts, theirs, torch.tensor)
    ours.step()
    theirs.step()
    for p, t in zip(ps, ts, strict=True):
        np.testing.assert_allclose(p.numpy(), t.detach().numpy(), rtol=1e-11)


def test_wrong_states_are_refused_and_nothing_is_loaded() -> None:
    p = nn.Parameter(mt.ones((2, 3)))
    optimizer = optim.Adam([p], lr=0.25)
    good = optimizer.state_dict()
    bad_shape = {**good, "state": {0: {"step": 1, "exp_avg": np.zeros((3, 2)),
                                       "exp_avg_sq": np.zeros((2, 3))}}}
    two = {"state": {}, "param_groups": [{"lr": 1.0, "params": [0, 1]}]}
    too_many = {**good, "state": {3: {"step": 1}}}
    other = optim.SGD([p]).state_dict()
    negative = {**good, "param_groups": [{**good["param_groups"][0], "lr": -1.0}]}
    number = {**good, "state": {0: {"step": 1, "exp_avg": np.zeros(())}}}
    for wrong, text in ((bad_shape, r"exp_avg .* \(3, 2\)"), (two, r"\[1\] parameters, the state's \[2\]"),
                        ({"weights": 1}, "param_groups"), (too_many, "parameter 3"),
                        ([1], "not an optimizer's"),
                        ({"state": {"x": 1}, "param_groups": [1]}, "not an optimizer's"),
                        (other, "without betas, eps, amsgrad; this is the state of another optimizer"),
                        (negative, "lr is -1"), (number, r"exp_avg .* \(\)")):
        with pytest.raises(mt.StateError, match=text):
            optimizer.load_state_dict(wrong)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.25


def test_wrong_arguments_are_refused() -> None:
    p = nn.Parameter(mt.ones(3))
    for call, text in ((lambda: optim.SGD([], lr=0.1), "no parameters"),
                       (lambda: optim.SGD([p], lr=-1.0), "lr is -1"),
                       (lambda: optim.Adam([p], betas=(1.0, 0.9)), "betas"),
                       (lambda: optim.SGD([p], nesterov=True), "nesterov"),
                       (lambda: optim.SGD([p, p]), "twice"),
                       (lambda: optim.SGD([p * 2]), "leaves"),
                       (lambda: optim.SGD([{"params": [p], "speed": 3}]), "speed")):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(mt.DTypeError, match="floating"):
        optim.SGD([mt.arange(3)])


def test_zero_grad() -> None:
    p = nn.Parameter(mt.ones(3))
    optimizer = optim.SGD([p], lr=0.1)
    (p * p).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert p.grad.numpy().tolist() == [0.0, 0.0, 0.0]
    optimizer.zero_grad()
    assert p.grad is None
    optimizer.step()                                          # nothing to do
    assert p.numpy().tolist() == [1.0, 1.0, 1.0]


# --- schedules --------------------------------------------------------------------------------------------

def slower(t: int) -> float:
    return 0.9 ** t


SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 3, "gamma": 0.5}), ("MultiStepLR", {"milestones": [2, 5, 11], "gamma": 0.3}),
    ("ExponentialLR", {"gamma": 0.93}), ("CosineAnnealingLR", {"T_max": 10, "eta_min": 0.001}),
    ("LambdaLR", {"lr_lambda": [slower, lambda t: 1 / (1 + t)]}),
    ("LinearLR", {"start_factor": 0.2, "end_factor": 0.8, "total_iters": 7}),
    ("OneCycleLR", {"max_lr": [0.3, 0.5], "total_steps": 30}),
    ("OneCycleLR", {"max_lr": 0.3, "epochs": 3, "steps_per_epoch": 9, "pct_start": 0.5,
                    "anneal_strategy": "linear"})]


def two_optimizers() -> tuple[Any, Any]:
    p, q, t, u = nn.Parameter(mt.ones(2)), nn.Parameter(mt.ones(2)), torch.ones(2), torch.ones(2)
    make = lambda a, b: [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.02}]
    return optim.SGD(make(p, q)), torch.optim.SGD(make(t, u), lr=0.1)


def rates(optimizer: Any) -> list[float]:
    return [g["lr"] for g in optimizer.param_groups]


@pytest.mark.parametrize("name, options", SCHEDULES, ids=[n for n, _ in SCHEDULES])
def test_schedules_are_torch_s(name: str, options: dict[str, Any]) -> None:
    ours, theirs = two_optimizers()
    if name == "OneCycleLR":
        theirs_options = {**options, "cycle_momentum": False}
    else:
        theirs_options = options
    a = getattr(sched, name)(ours, **options)
    b = getattr(torch.optim.lr_scheduler, name)(theirs, **theirs_options)
    for _ in range(26):
        np.testing.assert_allclose(rates(ours), rates(theirs), rtol=1e-12)
        assert a.get_last_lr() == rates(ours)
        theirs.step()
        a.step()
        b.step()


def test_warm_up_then_cosine() -> None:
    ours, theirs = two_optimizers()
    t = torch.optim.lr_scheduler
    a = sched.SequentialLR(ours, [sched.LinearLR(ours, 0.1, total_iters=5),
                                  sched.CosineAnnealingLR(ours, 20)], [5])
    b = t.SequentialLR(theirs, [t.LinearLR(theirs, 0.1, total_iters=5), t.CosineAnnealingLR(theirs, 20)], [5])
    for _ in range(25):
        np.testing.assert_allclose(rates(ours), rates(theirs), rtol=1e-12)
        theirs.step()
        a.step()
        b.step()


def test_a_schedule_goes_on_where_it_was_saved() -> None:
    first, _ = two_optimizers()
    a = sched.CosineAnnealingLR(first, 30)
    for _ in range(11):
        a.step()
    second, _ = two_optimizers()
    b = sched.CosineAnnealingLR(second, 30)
    b.load_state_dict(a.state_dict())
    assert rates(first) == rates(second)
    a.step()
    b.step()
    assert rates(first) == rates(second)
    with pytest.raises(mt.StateError):
        b.load_state_dict({"last_epoch": 3})


# --- clipping ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0, 3.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_by_norm(norm_type: float, max_norm: float, workers: int) -> None:
    ps, ts = ours_and_theirs()
    unused = nn.Parameter(mt.ones(3))
    for p, t, a in zip(ps, ts, TARGETS, strict=True):
        (p * mt.tensor(a)).sum().backward()
        (t * torch.tensor(a)).sum().backward()
    norm = nn.utils.clip_grad_norm_([*ps, unused], max_norm, norm_type)
    wanted = torch.nn.utils.clip_grad_norm_(ts, max_norm, norm_type)
    np.testing.assert_allclose(norm.item(), wanted.item(), rtol=1e-12)
    for p, t in zip(ps, ts, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), t.grad.numpy(), rtol=1e-12)
        assert workers == 1 or p.grad.layout == p.layout


def test_clipping_by_value(workers: int) -> None:
    ps, ts = ours_and_theirs()
    for p, t, a in zip(ps, ts, TARGETS, strict=True):
        (p * mt.tensor(a)).sum().backward()
        (t * torch.tensor(a)).sum().backward()
    nn.utils.clip_grad_value_(ps, 0.4)
    torch.nn.utils.clip_grad_value_(ts, 0.4)
    for p, t in zip(ps, ts, strict=True):
        np.testing.assert_array_equal(p.grad.numpy(), t.grad.numpy())


def test_clipping_without_gradients_and_of_what_is_not_finite() -> None:
    p = nn.Parameter(mt.ones(3))
    assert nn.utils.clip_grad_norm_([p], 1.0).item() == 0.0
    p.grad = mt.tensor([1.0, math.inf, 0.0])
    with pytest.raises(mt.GradError, match="inf"):
        nn.utils.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
