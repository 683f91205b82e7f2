"""Optimizer updates step for step beside torch.optim, in every piece of a parameter, and their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import lookup
from meshtape.runtime.ops import optim

torch = pytest.importorskip("torch")

SHAPES: list[tuple[int, ...]] = [(5, 3), (4,), (), (0, 2)]
STEPS = 20


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return op.kernel(np, *inputs, **op.unpack(op.pack(attrs)))


def gradients(step: int, shapes: list[tuple[int, ...]], dtype: Any = np.float64) -> list[Any]:
    rng = np.random.default_rng(step)
    return [np.asarray(rng.normal(size=s), dtype) for s in shapes]


def torch_steps(make: Any, shapes: list[tuple[int, ...]], dtype: Any = np.float64) -> list[Any]:
    """The parameters after each step of torch's optimizer, from the same start and gradients."""
    params = [torch.nn.Parameter(torch.tensor(p)) for p in gradients(99, shapes, dtype)]
    optimizer = make(params)
    found = []
    for step in range(STEPS):
        for p, g in zip(params, gradients(step, shapes, dtype), strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        found.append([p.detach().numpy().copy() for p in params])
    return found


def assert_same(found: list[Any], wanted: list[Any], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# --- SGD --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True},
    {"weight_decay": 0.1}, {"momentum": 0.9, "weight_decay": 0.1, "maximize": True}, {"maximize": True},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.2, "maximize": True}])
def test_sgd_takes_torchs_steps(options: dict[str, Any]) -> None:
    wanted = torch_steps(lambda params: torch.optim.SGD(params, lr=0.1, **options), SHAPES)
    n, momentum = len(SHAPES), options.get("momentum", 0.0)
    params = gradients(99, SHAPES)
    buffers = [np.zeros_like(p) for p in params] if momentum else []
    for step in range(STEPS):
        dampening = options.get("dampening", 0.0) if step else 0.0
        out = run("sgd_update", step + 1, dampening, 0.1, momentum, options.get("weight_decay", 0.0), *params,
                  *gradients(step, SHAPES), *buffers, n=n, has_momentum=bool(momentum),
                  nesterov=options.get("nesterov", False), maximize=options.get("maximize", False))
        params, buffers = out[:n], out[n:]
        assert_same(params, wanted[step])


# --- Adam -------------------------------------------------------------------------------------------

def adam_steps(shapes: list[tuple[int, ...]], dtype: Any = np.float64, lr: Any = lambda step: 1e-2,
               **options: Any) -> list[Any]:
    n, amsgrad = len(shapes), options.get("amsgrad", False)
    params = gradients(99, shapes, dtype)
    states = [np.zeros_like(p) for p in params * (3 if amsgrad else 2)]
    found = []
    for step in range(STEPS):
        scalars = step + 1, lr(step), 0.8, 0.95, 1e-6, options.get("weight_decay", 0.0)
        grads = gradients(step, shapes, dtype)
        out = run("adam_update", *scalars, *params, *grads, *states, n=n, amsgrad=amsgrad,
                  decoupled=options.get("decoupled", False), maximize=options.get("maximize", False))
        params, states = out[:n], out[n:]
        found.append(params)
    return found


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True},
    {"weight_decay": 0.3, "amsgrad": True, "maximize": True}])
def test_adam_takes_torchs_steps(decoupled: bool, options: dict[str, Any]) -> None:
    theirs = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {"weight_decay": 0.0, **options}
    make = lambda params: theirs(params, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, **options)
    wanted = torch_steps(make, SHAPES)
    for found, there in zip(adam_steps(SHAPES, decoupled=decoupled, **options), wanted, strict=True):
        assert_same(found, there)


def test_parameters_longer_than_a_block_are_updated_throughout() -> None:
    shapes: list[tuple[int, ...]] = [(optim.CACHED + 7,), (3,), (2, optim.CACHED)]
    make = lambda params: torch.optim.AdamW(params, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    found = adam_steps(shapes, np.float32, decoupled=True, weight_decay=0.1)
    assert_same(found[-1], torch_steps(make, shapes, np.float32)[-1], 1e-5)


def test_a_learning_rate_of_zero_leaves_the_parameters() -> None:
    found = adam_steps([(5,)], lr=lambda step: 0.0, decoupled=True, weight_decay=0.1)
    np.testing.assert_array_equal(found[-1][0], gradients(99, [(5,)])[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_parameters_are_updated_in_float32(dtype: str) -> None:
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16
    p, g, m = (np.full(3, v, kind) for v in (1.0, 1e-3, 0.0))
    new, mean, _ = run("adam_update", 1, 0.125, 0.9, 0.999, 1e-8, 0.0, p, g, m, m, n=1)
    assert new.dtype == kind and mean.dtype == kind
    # The square of the gradient is 1e-6, below float16's precision; the first step is still lr.
    np.testing.assert_allclose(new.astype(np.float64), 0.875, rtol=1e-2)


def test_an_update_of_shards_is_the_shard_of_the_update() -> None:
    """Each parameter has a layout of its own: the first is cut by rows, the second by columns, the third
    whole."""
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(7, 4), (3, 5), (6,)]
    groups = [[np.asarray(abs(rng.normal(size=s))) for s in shapes] for _ in range(4)]
    scalars = (3, 1e-2, 0.9, 0.99, 1e-8, 0.1)
    whole = run("adam_update", *scalars, *(a for group in groups for a in group), n=3, decoupled=True)
    every = slice(None)
    for cut in ((slice(0, 4), (every, slice(3, 5)), ...), (slice(4, 7), (every, slice(0, 3)), ...)):
        pieces = [a[c] for group in groups for a, c in zip(group, cut, strict=True)]
        part = run("adam_update", *scalars, *pieces, n=3, decoupled=True)
        for k, (a, b) in enumerate(zip(part, whole, strict=True)):
            np.testing.assert_array_equal(a, b[cut[k % 3]])


def test_scalars_are_operands_so_schedules_change_no_program() -> None:
    for name, scalars in (("sgd_update", 5), ("adam_update", 6)):
        op = lookup(name)
        flags = {k: v for k, v in op.attrs.items() if k != "n"}
        axes = op.axes(*((),) * scalars, *((2, 3), (4,)) * 4, n=2, **flags)
        assert axes.ins[:scalars] == ("",) * scalars and axes.ins[scalars:scalars + 2] == axes.ins[-2:]
        assert all(type(v) is bool for v in flags.values())


def test_letters_do_not_run_out() -> None:
    shapes = ((3, 3),) * 400
    letters = optim.own_letters(shapes, 200)
    used = "".join(letters[:200])
    assert letters[:200] == letters[200:] and len(set(used)) == 400 and "." not in used


# --- errors and clipping ------------------------------------------------------------------------------------

def test_updates_say_which_tensors_do_not_fit() -> None:
    op = lookup("adam_update")
    flags = {k: v for k, v in op.attrs.items() if k != "n"}
    with pytest.raises(ShapeError, match="adam_update: needs 4 tensors for each of 2 parameters, got 7"):
        op.shape(*((),) * 6, *((3,),) * 7, n=2, **flags)
    with pytest.raises(ShapeError, match=r"parameter 1 has shape \(4,\), but its gradient .* has \(3,\)"):
        op.shape(*((),) * 6, (3,), (4,), (3,), (3,), (3,), (4,), (3,), (4,), n=2, **flags)
    with pytest.raises(DTypeError, match="parameters must be floating, got int64"):
        op.dtype(*(float,) * 6, *(np.dtype("int64"),) * 4, n=1, **flags)


def test_gradients_and_states_are_cast_to_their_parameter() -> None:
    op = lookup("sgd_update")
    f32, f64 = np.dtype("float32"), np.dtype("float64")
    ins, outs = op.dtype(int, *(float,) * 4, f32, f64, f64, f32, n=2, nesterov=False, maximize=False,
                         has_momentum=False)
    assert ins == [int] + [float] * 4 + [f32, f64] * 2 and outs == [f32, f64]


def test_sum_of_squares_is_that_of_all_elements() -> None:
    arrays = gradients(0, SHAPES)
    np.testing.assert_allclose(run("sum_of_squares", *arrays), sum((a * a).sum() for a in arrays), rtol=1e-12)
    halves = np.full(5000, 300, np.float16)
    found = run("sum_of_squares", halves)
    assert found == 5000 * 90000 and found.dtype == np.float32


def test_only_a_single_tensors_squares_may_be_summed_in_parts() -> None:
    axes = lookup("sum_of_squares").axes
    assert axes is not None and axes((3, 4)).combine == "sum" and axes((3, 4), (5,)).combine == ""
