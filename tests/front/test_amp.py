"""autocast: the dtypes that PyTorch's gives on GPUs, its numbers, the tape, and the cache of casts. Then the
precision of float32 products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from beside_torch import torch
from meshes import on
from spy import Spy, blocks, watched

import meshtape as mt
from meshtape import nn, optim

F, TF = nn.functional, torch.nn.functional
RNG = np.random.default_rng(0)
BF16 = mt.bfloat16


# --- dtypes of results --------------------------------------------------------------------------------------

UNARY = ["exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "square", "reciprocal", "sin",
         "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf",
         "floor", "sigmoid", "relu", "sum", "prod", "mean", "var", "std", "abs", "negative", "norm", "max"]
Case = tuple[Callable[..., Any], Callable[..., Any]]
# Of `a`, which is `x` or its 16-bit copy, a vector and class indices: what is computed here, and there.
OTHERS: dict[str, Case] = {
    "matmul": (lambda a, x, w, t: a @ x,) * 2,
    "matrix and vector": (lambda a, x, w, t: a @ w,) * 2,
    "linear": (lambda a, x, w, t: F.linear(a, x, w), lambda a, x, w, t: TF.linear(a, x, w)),
    "einsum": (lambda a, x, w, t: mt.einsum("ij,jk->ik", a, x),
               lambda a, x, w, t: torch.einsum("ij,jk->ik", a, x)),
    "pow": (lambda a, x, w, t: a ** 2,) * 2,
    "pow of tensors": (lambda a, x, w, t: a ** a,) * 2,
    "power of a number": (lambda a, x, w, t: 2.0 ** a,) * 2,
    "division": (lambda a, x, w, t: a / 2,) * 2,
    "sum with float32": (lambda a, x, w, t: a + x,) * 2,
    "sum with itself": (lambda a, x, w, t: a + a,) * 2,
    "maximum": (lambda a, x, w, t: mt.maximum(a, x), lambda a, x, w, t: torch.maximum(a, x)),
    "concat": (lambda a, x, w, t: mt.concat([a, x]), lambda a, x, w, t: torch.cat([a, x])),
    "where": (lambda a, x, w, t: mt.where(t > 0, a, a), lambda a, x, w, t: torch.where(t > 0, a, a)),
    "softmax": (lambda a, x, w, t: F.softmax(a), lambda a, x, w, t: TF.softmax(a, -1)),
    "log_softmax": (lambda a, x, w, t: F.log_softmax(a), lambda a, x, w, t: TF.log_softmax(a, -1)),
    "logsumexp": (lambda a, x, w, t: mt.logsumexp(a), lambda a, x, w, t: a.logsumexp((0, 1))),
    "sum along an axis": (lambda a, x, w, t: a.sum(axis=0), lambda a, x, w, t: a.sum(0)),
    "cumsum": (lambda a, x, w, t: a.cumsum(axis=0), lambda a, x, w, t: a.cumsum(0)),
    "layer_norm": (lambda a, x, w, t: F.layer_norm(a, 4, w, w),
                   lambda a, x, w, t: TF.layer_norm(a, (4,), w, w)),
    "bare layer_norm": (lambda a, x, w, t: F.layer_norm(a, 4), lambda a, x, w, t: TF.layer_norm(a, (4,))),
    "rms_norm": (lambda a, x, w, t: F.rms_norm(a, 4), lambda a, x, w, t: TF.rms_norm(a, (4,))),
    "group_norm": (lambda a, x, w, t: F.group_norm(a, 2, w, w), lambda a, x, w, t: TF.group_norm(a, 2, w, w)),
    "normalize": (lambda a, x, w, t: F.normalize(a), lambda a, x, w, t: TF.normalize(a)),
    "softplus": (lambda a, x, w, t: F.softplus(a), lambda a, x, w, t: TF.softplus(a)),
    "gelu": (lambda a, x, w, t: F.gelu(a), lambda a, x, w, t: TF.gelu(a)),
    "silu": (lambda a, x, w, t: F.silu(a), lambda a, x, w, t: TF.silu(a)),
    "dropout": (lambda a, x, w, t: F.dropout(a), lambda a, x, w, t: TF.dropout(a)),
    "embedding": (lambda a, x, w, t: F.embedding(t, a), lambda a, x, w, t: TF.embedding(t, a)),
    "cross_entropy": (lambda a, x, w, t: F.cross_entropy(a, t), lambda a, x, w, t: TF.cross_entropy(a, t)),
    "cross_entropy of each": (lambda a, x, w, t: F.cross_entropy(a, t, reduction="none"),
                              lambda a, x, w, t: TF.cross_entropy(a, t, reduction="none")),
    "nll_loss": (lambda a, x, w, t: F.nll_loss(a, t), lambda a, x, w, t: TF.nll_loss(a, t)),
    "binary_cross_entropy": (lambda a, x, w, t: F.binary_cross_entropy_with_logits(a, a),
                             lambda a, x, w, t: TF.binary_cross_entropy_with_logits(a, a)),
    "mse_loss": (lambda a, x, w, t: F.mse_loss(a, a), lambda a, x, w, t: TF.mse_loss(a, a)),
    "l1_loss": (lambda a, x, w, t: F.l1_loss(a, a), lambda a, x, w, t: TF.l1_loss(a, a)),
    "smooth_l1_loss": (lambda a, x, w, t: F.smooth_l1_loss(a, a), lambda a, x, w, t: TF.smooth_l1_loss(a, a)),
    "huber_loss": (lambda a, x, w, t: F.huber_loss(a, a), lambda a, x, w, t: TF.huber_loss(a, a)),
}


def cases(name: str) -> Case:
    if name in OTHERS:
        return OTHERS[name]
    there = {"norm": torch.linalg.norm, "max": torch.amax}.get(name) or getattr(torch, name)
    return lambda a, *rest: getattr(mt, name)(a), lambda a, *rest: there(a)


@pytest.fixture
def torch_on_a_gpu() -> Iterator[None]:
    """torch's autocast for GPUs, on tensors that have shapes and dtypes but no values, which needs none."""
    fake = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode(allow_non_fake_inputs=True)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with fake:
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*UNARY, *OTHERS])
def test_results_have_the_dtypes_of_torch_on_gpus(name: str, dtype: str, torch_on_a_gpu: None) -> None:
    ours, theirs = cases(name)
    with mt.autocast():
        x, w, t = mt.ones((4, 4)), mt.ones((4,)), mt.tensor([0, 1, 2, 3])
        found = ours(x.astype(dtype), x, w, t).dtype
    x, w = (torch.empty(shape, device="cuda") for shape in ((4, 4), (4,)))
    t = torch.empty(4, device="cuda", dtype=torch.int64)
    wanted = theirs(x.to(getattr(torch, dtype)), x, w, t).dtype
    assert f"torch.{found.name}" == str(wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_take_the_dtype_of_the_region(dtype: str) -> None:
    wanted = mt.zeros((), dtype=dtype).dtype
    x, w, b = mt.ones((3, 4, 4)), mt.ones((4, 4, 3)), mt.ones((4,))
    heads = nn.MultiheadAttention(4, 2, batch_first=True)
    with mt.autocast(dtype):
        made = [F.conv1d(x, w, b), F.conv1d(x, w), F.conv_transpose1d(x, w, b), heads(x, x, x)[0],
                F.scaled_dot_product_attention(x, x, x), nn.LSTM(4, 5)(x)[0], nn.GRU(4, 5)(x)[0],
                F.scaled_dot_product_attention(x, x, x, mt.ones((4, 4))), nn.RNN(4, 5)(x)[0],
                x @ w[0].astype("float16")]
        assert [y.dtype for y in made] == [wanted] * len(made)
        y = F.batch_norm(F.conv1d(x, w), mt.zeros((4,)), mt.ones((4,)), b, b, training=True)
        assert y.dtype == wanted                        # as in torch: only its statistics are float32
        assert F.max_pool1d(y, 2).dtype == F.avg_pool1d(y, 1).dtype == wanted


def test_float64_integers_and_numbers_are_left_alone() -> None:
    x, w, whole = mt.ones((4, 4), dtype="float64"), mt.ones((4, 4)), mt.ones((2, 2), dtype="int64")
    with mt.autocast():
        assert (x @ x).dtype == (x @ w).dtype == x.exp().dtype == np.float64
        assert (whole @ whole).dtype == np.int64
        assert (w * 2.0).dtype == np.float32 and (w.astype(BF16) * 2.0).dtype == BF16
        assert mt.sum(w.astype(BF16), dtype="float64").dtype == np.float64


# --- regions ------------------------------------------------------------------------------------------------

def test_regions_nest_are_switched_off_and_end() -> None:
    x = mt.ones((4, 4))
    assert (x @ x).dtype == np.float32
    with mt.autocast(BF16):
        assert (x @ x).dtype == BF16
        with mt.autocast("float16"):
            assert (x @ x).dtype == np.float16
            with mt.autocast(enabled=False):
                assert (x @ x).dtype == np.float32 and x.astype(BF16).exp().dtype == BF16
            assert (x @ x).dtype == np.float16
        assert (x @ x).dtype == BF16
        with pytest.raises(KeyError), mt.autocast("float16"):
            raise KeyError
        assert (x @ x).dtype == BF16
    assert (x @ x).dtype == np.float32


def test_a_decorated_function_may_call_itself() -> None:
    @mt.autocast(dtype="float16")
    def power(x: Any, n: int) -> Any:
        return x if n == 0 else power(x, n - 1) @ x

    x = mt.ones((3, 3))
    assert power(x, 3).dtype == np.float16 and (x @ x).dtype == np.float32


def test_other_dtypes_are_refused() -> None:
    for dtype in ("float32", "int16"):
        with pytest.raises(mt.DTypeError, match=f"{dtype} given; use bfloat16 or float16"):
            mt.autocast(dtype)


# --- numbers and gradients ----------------------------------------------------------------------------------

X = RNG.normal(size=(12, 7)).astype(np.float32)
Y = RNG.integers(0, 5, 12)


def models() -> tuple[Any, Any]:
    make = lambda lib: lib.Sequential(lib.Linear(7, 33), lib.GELU(), lib.LayerNorm(33), lib.Linear(33, 5))
    mine, theirs = make(nn), make(torch.nn)
    mine.load_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    return mine, theirs


def loss_of(model: Any, enabled: bool = True) -> Any:
    x, y = mt.tensor(X, layout=mt.Shard(0)), mt.tensor(Y, layout=mt.Shard(0))
    with mt.autocast(enabled=enabled):
        return F.cross_entropy(model(x), y)


def test_losses_and_gradients_are_those_of_torch(workers: int) -> None:
    mine, theirs = models()
    for _ in range(3):              # the last walk is replayed
        mine.zero_grad()
        loss = loss_of(mine)
        loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = TF.cross_entropy(theirs(torch.tensor(X)), torch.tensor(Y))
    wanted.backward()
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss.item(), wanted.item(), rtol=2e-2)
    for p, t in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == np.float32 and p.grad.layout == p.layout
        scale = abs(t.grad.numpy()).max()
        np.testing.assert_allclose(p.grad.numpy(), t.grad.numpy(), rtol=0.05, atol=0.02 * scale)


def test_gradients_are_reduced_in_float32() -> None:
    with on(2) as session:
        mine, _ = models()
        spy = Spy(session)
        loss_of(mine).backward()
        assert all(p.raw_grad.spec.partial and p.raw_grad.dtype == np.float32 for p in mine.parameters())
        grads = [p.grad for p in mine.parameters()]
        grads[0].numpy()
        instrs = [i for b in spy.take() if b.program for i in b.program.instrs]
        reduced = [t.dtype for i in instrs for t in i.ins if i.op == "all_reduce_bucket"]
        assert len(reduced) >= len(grads) and set(reduced) == {"float32"}


def test_addends_that_are_widened_stay_addends() -> None:
    with on(2):
        a = RNG.normal(size=(6, 3)).astype(np.float32)
        x = mt.tensor(a, layout=mt.Shard(0)).astype(BF16).sum(axis=0)
        assert x.layout == mt.Partial("sum") == x.astype("float32").layout == x.astype("float64").layout
        assert x.astype("float32").astype(BF16).layout != mt.Partial("sum")
        np.testing.assert_allclose(x.astype("float64").numpy(), x.astype("float32").numpy())


def test_a_walk_inside_a_region_and_one_outside_record_the_same() -> None:
    found = []
    for inside in (True, False):
        with on(1) as session:
            mt.manual_seed(0)
            w, spy = nn.Parameter(mt.random.normal(shape=(4, 4))), Spy(session)
            for _ in range(3):
                w.grad = None
                with mt.autocast():
                    loss = (w @ w).exp().sum()
                    if inside:
                        loss.backward()
                if not inside:
                    loss.backward()
            grad = w.grad.numpy()
            found.append((grad, [i for b in spy.take() if b.program for i in b.program.instrs],
                          len(session.replays)))
    assert np.array_equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_derivatives_of_derivatives() -> None:
    a = RNG.uniform(0.5, 1.0, (4, 4)).astype(np.float32)
    x, t = mt.tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)
    with mt.autocast():
        (g,) = mt.grad(((x @ x) ** 2).sum(), x, create_graph=True)
        assert g.dtype == np.float32
        (g @ g).sum().backward()
    (h,) = torch.autograd.grad(((t @ t) ** 2).sum(), t, create_graph=True)
    (h @ h).sum().backward()
    np.testing.assert_allclose(g.numpy(), h.detach().numpy(), rtol=2e-2)
    np.testing.assert_allclose(x.grad.numpy(), t.grad.numpy(), rtol=5e-2)


def test_checkpointed_parts_are_computed_again_in_their_region(workers: int) -> None:
    mine, _ = models()
    dtypes = []

    def part(x: Any) -> Any:
        y = mine[0](x)
        dtypes.append(y.dtype)
        return mine[1](y)

    loss_of(mine).backward()
    wanted = [p.grad.numpy() for p in mine.parameters()]
    mine.zero_grad()
    loss_of(lambda x: mine[3](mine[2](mt.checkpoint(part, x)))).backward()
    assert dtypes == [BF16, BF16]
    for p, g in zip(mine.parameters(), wanted, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), g, rtol=1e-5, atol=1e-6)


# --- casts of parameters ------------------------------------------------------------------------------------

def casts(session: Any, spy: Spy) -> int:
    """How many casts were sent since the last call."""
    session.wait()
    sent = [b.program for b in spy.take() if b.program]
    return sum(p.instrs[k].op == "astype" for p in sent for k, _, _ in p.steps)


def test_a_parameter_is_cast_once_in_the_outermost_region() -> None:
    with on(1) as session:
        w, x, held = nn.Parameter(mt.ones((4, 4))), mt.ones((4, 4), dtype=BF16), []
        spy = Spy(session)
        with mt.autocast():
            held.append(x @ w)
            with mt.autocast(enabled=False), mt.autocast():
                held.append(x @ w)
            held.append(w @ w)
            assert casts(session, spy) == 1
            with mt.no_grad():
                held.append(x @ w)
            assert casts(session, spy) == 1             # one of its own, off the tape
            loss = (x @ w).sum() + (w @ x).sum()
        assert not session.casts
        loss.backward()
        np.testing.assert_array_equal(w.grad.numpy(), np.full((4, 4), 8.0))
        spy.take()
        with mt.autocast():
            held.append(x @ w)
        assert casts(session, spy) == 1


def test_a_parameter_that_changes_is_cast_again() -> None:
    w, x, layer = nn.Parameter(mt.ones((2, 2))), mt.ones((2, 2)), nn.Linear(2, 2, bias=False)
    opt = optim.SGD([w], lr=1.0)
    with mt.autocast():
        for step in range(3):
            y = x @ w
            assert y.numpy()[0, 0] == 2 * (1 - 2 * step)
            opt.zero_grad()
            y.sum().backward()
            opt.step()
            assert not mt.current_mesh()._session.casts
        assert (x @ w).numpy()[0, 0] == -10
        with mt.no_grad():
            w += 10.0
        assert (x @ w).numpy()[0, 0] == 10
        layer(x)
        layer.load_state_dict({"weight": np.full((2, 2), 7.0)})
        assert layer(x).numpy()[0, 0] == 14


def test_casts_keep_no_memory_after_the_region() -> None:
    with watched(1) as (session, made):
        w, x = nn.Parameter(mt.ones((8, 8))), mt.ones((8, 8))
        before = blocks(session, made)[0]
        with mt.autocast():
            (x @ w).numpy()
            assert blocks(session, made)[0] == before + 1
        assert blocks(session, made)[0] == before
        with mt.autocast():             # while its cast is held, the old block of a parameter is let go
            (x @ w).numpy()
            with mt.no_grad():
                w += 1.0
            assert blocks(session, made)[0] <= before + 1


def test_steps_under_autocast_are_steady() -> None:
    with watched(2) as (session, _):
        mine, _ = models()
        opt, spy = optim.AdamW(mine.parameters(), lr=1e-2), Spy(session)
        for _ in range(6):
            opt.zero_grad()
            loss_of(mine).backward()
            opt.step()
        found = [b.fresh for b in spy.take() if b.program]
        assert len(found) == 6 and not any(found[2:])


def test_training_under_autocast_follows_float32(workers: int) -> None:
    losses = []
    for enabled in (False, True):
        mt.manual_seed(3)
        model = nn.Sequential(nn.Linear(7, 32), nn.Tanh(), nn.Linear(32, 5))
        opt = optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            loss = loss_of(model, enabled)
            opt.zero_grad()
            loss.backward()
            opt.step()
        losses.append(loss.item())
    assert losses[0] < 0.5 and abs(losses[1] - losses[0]) < 0.05


# --- precision of float32 products ------------------------------------------------------------------------

def test_the_precision_of_products_is_part_of_the_program() -> None:
    assert mt.get_float32_matmul_precision() == "highest"
    try:
        with on(2) as session:
            spy, x = Spy(session), mt.ones((4, 4))
            for precision in ("highest", "high", "high"):
                mt.set_float32_matmul_precision(precision)
                y = x @ x
                mt.flush()
                del y
            mt.set_float32_matmul_precision("medium")
            assert mt.get_float32_matmul_precision() == "medium"
            (x @ x).numpy()
            found = [(b.program.precision, b.fresh) for b in spy.take()
                     if b.program and "matmul" in [i.op for i in b.program.instrs]]
            assert [p for p, _ in found] == ["highest", "high", "high", "medium"]
        with on(1) as session:
            assert session.precision == "medium"
        with pytest.raises(ValueError, match="'low' given; use one of"):
            mt.set_float32_matmul_precision("low")
    finally:
        mt.set_float32_matmul_precision("highest")


def test_what_is_pending_keeps_its_precision() -> None:
    try:
        with on(1) as session:
            spy = Spy(session)
            y = mt.ones((4, 4)) @ mt.ones((4, 4))
            mt.set_float32_matmul_precision("high")
            (y @ y).numpy()
            assert [b.program.precision for b in spy.take()] == ["highest", "high"]
    finally:
        mt.set_float32_matmul_precision("highest")
