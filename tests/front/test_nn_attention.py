"""Attention and the Transformer's encoder compute what PyTorch's do, on one worker and on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beside_torch import check, torch
from beside_torch_modules import compare, compare_penalty
from meshes import on

import meshtape as mt
from meshtape import nn, optim
from meshtape.nn import functional as F

TF = torch.nn.functional
RNG = np.random.default_rng(0)
Q, K, V = (RNG.normal(size=s) for s in ((4, 2, 5, 6), (4, 2, 7, 6), (4, 2, 7, 3)))
LOOK = RNG.uniform(size=(5, 7)) < 0.6
LOOK[2] = False
pytestmark = pytest.mark.usefixtures("workers")


def both(options: dict[str, Any], mask: Any = None, tolerance: float = 1e-9, arrays: Any = (Q, K, V)) -> None:
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, **options),
          lambda q, k, v: TF.scaled_dot_product_attention(
              q, k, v, None if mask is None else torch.tensor(np.atleast_2d(mask)), **options),
          list(arrays), tolerance)


# --- scaled dot-product attention -------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": 50.0}], ids=str)
def test_attention(options: dict[str, Any]) -> None:
    both(options)
    both(options, arrays=(Q[0, 0], K[0, 0], V[0, 0]))
    both(options, arrays=(K, Q, Q))                                   # more queries than keys


@pytest.mark.parametrize("shape", [(5, 7), (7,), (1, 7), (5, 1), (2, 5, 7), (4, 1, 5, 7), (4, 2, 1, 7)])
@pytest.mark.parametrize("kind", ["bool", "float", "float32"])
def test_attention_masks_broadcast(shape: tuple[int, ...], kind: str) -> None:
    mask = np.random.default_rng(1).normal(size=shape)
    given = mask > -0.5 if kind == "bool" else mask
    if kind == "float32":
        arrays = [a.astype("float32") for a in (Q, K, V)]
        both({}, mask.astype("float32"), 1e-5, arrays)
    else:
        both({}, given)


def test_queries_that_may_look_nowhere_give_zeros_and_no_gradient() -> None:
    both({}, LOOK)
    q = mt.tensor(Q, requires_grad=True)
    mask = mt.tensor(np.where(LOOK, 0.0, -np.inf))
    out = F.scaled_dot_product_attention(q, mt.tensor(K), mt.tensor(V), mask)
    assert not out.numpy()[:, :, 2].any()
    out.sum().backward()
    assert np.isfinite(q.grad.numpy()).all() and not q.grad.numpy()[:, :, 2].any()


def test_leading_dimensions_broadcast() -> None:
    both({}, arrays=(Q, K[:1], V[:1]))
    both({}, arrays=(Q, K[:, :1], V))
    both({}, arrays=(Q[:1], K, V[0]))
    both({"enable_gqa": True}, arrays=(Q[:, [0, 1, 0, 1]], K, V))


def test_an_additive_mask_gets_its_gradient() -> None:
    check(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
          lambda q, k, v, m: TF.scaled_dot_product_attention(q, k, v, m),
          [Q, K, V, RNG.normal(size=(4, 1, 5, 7))], 1e-9)


def test_attention_of_half_precision_keeps_its_dtype() -> None:
    arrays = [a.astype("float16") for a in (Q, K, V)]
    out = F.scaled_dot_product_attention(*map(mt.tensor, arrays))
    wanted = TF.scaled_dot_product_attention(*(torch.tensor(a.astype("float32")) for a in arrays)).numpy()
    assert out.dtype == "float16"
    np.testing.assert_allclose(out.numpy(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_is_the_same_however_the_queries_are_split(dim: int, is_causal: bool) -> None:
    """The weights that are dropped are those of the dropout of a whole tensor of weights."""
    n = 7
    q, k, v = (np.random.default_rng(5).normal(size=(3, 2, n, 4)) for _ in range(3))
    scores = q @ k.swapaxes(-1, -2) / 2 + (np.triu(np.full((n, n), -np.inf), 1) if is_causal else 0)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mt.random.seed(11)
    wanted = F.dropout(mt.tensor(weights), 0.4).numpy() @ v
    mt.random.seed(11)
    layout = mt.Shard(dim)
    tensors = [mt.tensor(a, layout=layout, requires_grad=True) for a in (q, k, v)]
    out = F.scaled_dot_product_attention(*tensors, dropout_p=0.4, is_causal=is_causal)
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-10, atol=1e-10)
    out.backward(mt.tensor(np.ones_like(q)))
    dropped = np.where(weights > 0, wanted_mask(weights, 0.4), 0) * weights
    by_v = dropped.swapaxes(-1, -2) @ np.ones_like(q)
    np.testing.assert_allclose(tensors[2].grad.numpy(), by_v, rtol=1e-10)


def wanted_mask(weights: Any, p: float) -> Any:
    mt.random.seed(11)
    return F.dropout(mt.tensor(np.ones_like(weights)), p).numpy()


def test_dropout_of_everything_gives_zeros() -> None:
    assert not F.scaled_dot_product_attention(*map(mt.tensor, (Q, K, V)), dropout_p=1.0).numpy().any()


# --- multi-head attention ---------------------------------------------------------------------------------

X, MEMORY = RNG.normal(size=(5, 3, 8)), RNG.normal(size=(7, 3, 8))
PADDING = np.array([[False] * 7, [False] * 5 + [True] * 2, [True] + [False] * 6])


def heads(batch_first: bool = False, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return (nn.MultiheadAttention(8, 2, batch_first=batch_first, **options),
            torch.nn.MultiheadAttention(8, 2, batch_first=batch_first, **options))


def wrap(module: Any, value: Any) -> Any:
    """A mask as the module's kind of tensor."""
    return value if value is None or isinstance(module, nn.Module) else torch.tensor(value)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multihead_attention_to_itself(batch_first: bool, need_weights: bool, bias: bool) -> None:
    compare(*heads(batch_first, bias=bias), lambda m, x: m(x, x, x, need_weights=need_weights), [X])


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", ["padding", "looks", "added", "each", "both", "mixed", "added padding"])
def test_multihead_attention_masks(need_weights: bool, masks: str) -> None:
    rng = np.random.default_rng(2)
    hidden = np.triu(np.ones((5, 7), bool), 4)
    attn = {"looks": hidden, "added": rng.normal(size=(5, 7)), "both": hidden,
            "mixed": rng.normal(size=(5, 7)), "each": rng.uniform(size=(6, 5, 7)) < 0.3}.get(masks)
    padding = {"padding": PADDING, "both": PADDING, "mixed": PADDING,
               "added padding": np.where(PADDING, -1e3, 0.5)}.get(masks)
    compare(*heads(), lambda m, x, y: m(x, y, y, wrap(m, padding), need_weights, wrap(m, attn)), [X, MEMORY])


def test_multihead_attention_weights_of_every_head() -> None:
    compare(*heads(), lambda m, x, y: m(x, y, y, average_attn_weights=False), [X, MEMORY])


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_causal(need_weights: bool) -> None:
    later = np.triu(np.ones((5, 5), bool), 1)
    padding = np.zeros((3, 5), bool)
    padding[1, 3:] = True
    for pad in (None, padding):
        compare(*heads(), lambda m, x, pad=pad: m(
            x, x, x, wrap(m, pad), need_weights, wrap(m, later), is_causal=True), [X])
    ours = heads()[0].double()
    x = mt.tensor(X)
    np.testing.assert_allclose(ours(x, x, x, is_causal=True)[0].numpy(),
                               ours(x, x, x, need_weights=False, attn_mask=later)[0].numpy(), rtol=1e-10)


def test_multihead_attention_of_other_widths() -> None:
    key, value = RNG.normal(size=(7, 3, 4)), RNG.normal(size=(7, 3, 6))
    compare(*heads(kdim=4, vdim=6), lambda m, q, k, v: m(q, k, v), [X, key, value])


def test_multihead_attention_without_a_batch() -> None:
    for batch_first in (False, True):
        compare(*heads(batch_first), lambda m, x, y: m(x, y, y), [X[:, 0], MEMORY[:, 0]])


def test_multihead_attention_starts_like_torch() -> None:
    ours = nn.MultiheadAttention(200, 4)
    assert not ours.in_proj_bias.numpy().any() and not ours.out_proj.bias.numpy().any()
    assert np.abs(ours.in_proj_weight.numpy()).max() == pytest.approx((6 / 800)**0.5, rel=0.01)


def test_multihead_attention_drops_weights_in_training_only() -> None:
    ours = nn.MultiheadAttention(8, 2, dropout=0.5)
    x = mt.tensor(X, dtype="float32")
    for need_weights in (False, True):
        call = lambda need=need_weights: ours(x, x, x, need_weights=need)[0].numpy()
        ours.train()
        assert not np.array_equal(call(), call())
        ours.eval()
        np.testing.assert_array_equal(call(), call())


def test_gradient_of_a_gradient() -> None:
    later = np.triu(np.ones((5, 5), bool), 1)
    ours, theirs = heads()
    call = lambda m, x: m(x, x, x, need_weights=False, attn_mask=wrap(m, later))[0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        compare_penalty(ours, theirs, call, X)


# --- encoder ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"batch_first": True},
                                     {"bias": False}], ids=str)
def test_encoder_layer(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = nn.TransformerEncoderLayer(8, 2, 16, 0.0, **options)
    theirs = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, **options)
    padding = np.zeros(X.shape[:2] if options.get("batch_first") else X.shape[1::-1], bool)
    padding[1, -1] = True
    compare(ours, theirs, lambda m, x: m(x), [X])
    compare(ours, theirs, lambda m, x: m(x, src_key_padding_mask=wrap(m, padding)), [X])


def test_encoder() -> None:
    torch.manual_seed(0)
    ours = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0), 2, nn.LayerNorm(8))
    theirs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0), 2,
                                         torch.nn.LayerNorm(8), enable_nested_tensor=False)
    later = np.triu(np.full((5, 5), -np.inf), 1)
    compare(ours, theirs, lambda m, x: m(x, wrap(m, later)), [X])
    assert len({id(p) for p in ours.parameters()}) == len(list(theirs.parameters()))


def test_what_does_not_fit_is_refused_at_the_call() -> None:
    q, ours = mt.zeros((2, 3, 4)), nn.MultiheadAttention(8, 2)
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: F.scaled_dot_product_attention(q, mt.zeros((2, 3, 5)), q), mt.ShapeError, "equally wide"),
        (lambda: F.scaled_dot_product_attention(q, q, mt.zeros((2, 5, 4))), mt.ShapeError, "equally long"),
        (lambda: F.scaled_dot_product_attention(q[0, 0], q, q), mt.ShapeError, "length, width"),
        (lambda: F.scaled_dot_product_attention(q, q, q, mt.ones((2, 2))), mt.ShapeError, "broadcast"),
        (lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=2.0), ValueError, "between 0 and 1"),
        (lambda: nn.MultiheadAttention(8, 3), mt.ShapeError, "3 heads"),
        (lambda: ours(q[0, 0], q, q), mt.ShapeError, "length, batch, features"),
        (lambda: ours(q, q, q), mt.ShapeError, "check the layer sizes"),
        (lambda: ours(mt.zeros((3, 2, 8)), *[mt.zeros((3, 2, 8))] * 2, attn_mask=np.zeros((3, 3), int)),
         mt.DTypeError, "attn_mask has dtype int64"),
        (lambda: nn.TransformerEncoderLayer(8, 2, activation="swish"), ValueError, "'relu', 'gelu'"),
    ]
    for call, kind, text in calls:
        with pytest.raises(kind, match=text):
            call()


def test_training_with_dropout_is_the_same_on_any_mesh(workers: int) -> None:
    def losses() -> list[float]:
        mt.random.seed(4)
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True), nn.Flatten(),
                              nn.Linear(40, 3))
        opt = optim.AdamW(model.parameters(), lr=1e-2)
        x = mt.tensor(X.swapaxes(0, 1), dtype="float32", layout=mt.Shard(0))
        y = mt.tensor(np.array([0, 2, 1]), layout=mt.Shard(0))
        found = []
        for _ in range(5):
            loss = F.cross_entropy(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            found.append(loss.item())
        return found

    here = losses()
    with on(1):
        np.testing.assert_allclose(here, losses(), rtol=1e-4)
