"""Convolution, pooling and normalization layers compute what PyTorch's do, on one worker and on several."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beside_torch import check, check_modules, same, split, torch

import meshtape as mt
from meshtape import nn
from meshtape.nn import functional as F

TF = torch.nn.functional
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("workers")
NUMBER = 1e-9


def random(*shape: int) -> Any:
    return RNG.normal(size=shape)


# --- convolution ------------------------------------------------------------------------------------------

CONV1D = [{}, {"stride": 2}, {"padding": 2}, {"dilation": 2, "padding": (1,)}, {"padding": "same"},
          {"padding": "same", "dilation": 3}, {"padding": "valid", "stride": (2,)}]
CONV2D = [{"stride": s, "padding": p, "dilation": d, "groups": g}
          for s, p, d, g in itertools.product((1, (2, 1)), (0, (2, 1)), (1, (1, 2)), (1, 2))]


@pytest.mark.parametrize("options", CONV1D, ids=str)
def test_conv1d(options: dict[str, Any]) -> None:
    for groups in (1, 2, 4):
        given = {**options, "groups": groups}
        inputs = [random(3, 4, 9), random(8, 4 // groups, 3), random(8)]
        check(lambda x, w, b, o=given: F.conv1d(x, w, b, **o), lambda x, w, b, o=given: TF.conv1d(x, w, b,
                                                                                                  **o),
              inputs, NUMBER)
        check(lambda x, w, o=given: F.conv1d(x, w, **o), lambda x, w, o=given: TF.conv1d(x, w, **o),
              inputs[:2],
              NUMBER)


@pytest.mark.parametrize("options", CONV2D, ids=str)
def test_conv2d(options: dict[str, Any]) -> None:
    inputs = [random(5, 4, 7, 6), random(6, 4 // options["groups"], 3, 2), random(6)]
    check(lambda x, w, b: F.conv2d(x, w, b, **options), lambda x, w, b: TF.conv2d(x, w, b, **options), inputs,
          NUMBER)


@pytest.mark.filterwarnings("ignore:Using padding='same'")     # torch's, of the even kernel
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv2d_with_padding_by_name(padding: str) -> None:
    inputs = [random(2, 3, 6, 5), random(4, 3, 4, 3)]
    check(lambda x, w: F.conv2d(x, w, padding=padding), lambda x, w: TF.conv2d(x, w, padding=padding), inputs,
          NUMBER)


def test_conv2d_with_asymmetric_padding() -> None:
    check(lambda x, w: F.conv2d(x, w, padding=((1, 2), (0, 3))),
          lambda x, w: TF.conv2d(TF.pad(x, (0, 3, 1, 2)), w), [random(2, 3, 6, 5), random(4, 3, 3,
                                                                                          3)], NUMBER)


@pytest.mark.parametrize("stride, padding, output_padding, groups, dilation", [
    (1, 0, 0, 1, 1), (2, 1, 1, 1, 1), ((3, 2), (0, 1), (2, 0), 2, 1), (2, 1, (1, 0), 1, (1, 2))])
def test_conv_transpose(stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any) -> None:
    given = (stride, padding, output_padding, groups, dilation)
    inputs = [random(3, 4, 4, 5), random(4, 6 // groups, 3, 2), random(6)]
    check(lambda x, w, b: F.conv_transpose2d(x, w, b, *given),
          lambda x, w, b: TF.conv_transpose2d(x, w, b, *given), inputs, NUMBER)
    first = tuple(g if isinstance(g, int) else g[0] for g in given)
    check(lambda x, w: F.conv_transpose1d(x, w, None, *first),
          lambda x, w: TF.conv_transpose1d(x, w, None, *first), [random(3, 4, 5), inputs[1][..., 0]], NUMBER)


def test_an_empty_stride_is_the_kernel_size() -> None:
    x = random(2, 3, 4, 6)
    for stride in ((), []):
        check(lambda x, s=stride: F.avg_pool2d(x, 2, s), lambda x, s=stride: TF.avg_pool2d(x, 2, s), [x],
              NUMBER)


def test_unbatched_inputs() -> None:
    check(F.conv1d, TF.conv1d, [random(3, 8), random(4, 3, 3)], NUMBER)
    check(F.conv2d, TF.conv2d, [random(3, 5, 6), random(4, 3, 3, 3)], NUMBER)
    check(F.conv_transpose1d, TF.conv_transpose1d, [random(3, 8), random(3, 2, 3)], NUMBER)
    check(lambda x: F.max_pool2d(x, 2), lambda x: TF.max_pool2d(x, 2), [random(3, 5, 6)], NUMBER)
    check(lambda x: F.avg_pool1d(x, 2), lambda x: TF.avg_pool1d(x, 2), [random(3, 7)], NUMBER)
    check(lambda x: F.adaptive_avg_pool2d(x, (2, 3)), lambda x: TF.adaptive_avg_pool2d(x, (2, 3)),
          [random(3, 5, 7)], NUMBER)


@pytest.mark.parametrize("layout", [mt.Shard(0), mt.Shard(1)])
def test_a_convolution_whose_weight_is_split(layout: mt.Shard) -> None:
    """By output or input channels, with whole inputs: tensor parallelism."""
    x, w = random(2, 6, 5, 5), random(4, 6, 3, 3)
    wanted = TF.conv2d(torch.tensor(x), torch.tensor(w)).numpy()
    got = F.conv2d(mt.tensor(x), mt.tensor(w, layout=layout))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=NUMBER, atol=NUMBER)


# --- second derivatives -----------------------------------------------------------------------------------

def second(ours: Callable[..., Any], theirs: Callable[..., Any], arrays: list[Any], seed: int = 3) -> None:
    """Gradients of a sum of squares of the gradients agree."""
    xs = [split(a, True) for a in arrays]
    ts = [torch.tensor(a, requires_grad=True) for a in arrays]
    weight = np.random.default_rng(seed).normal(size=theirs(*ts).shape)
    y, z = (ours(*xs) * mt.tensor(weight)).sum(), (theirs(*ts) * torch.tensor(weight)).sum()
    first = mt.grad(y, xs, create_graph=True)
    wanted = torch.autograd.grad(z, ts, create_graph=True)
    total = sum(((g * g).sum() for g in first), mt.tensor(0.0, dtype="float64"))
    found = mt.grad(total, xs, allow_unused=True)
    expected = torch.autograd.grad(sum((g * g).sum() for g in wanted), ts, allow_unused=True)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        same(a if a is not None else np.zeros_like(arrays[k]),
             b if b is not None else torch.zeros_like(ts[k]),
             1e-8, f"second derivative by input {k}")


def test_second_derivatives_of_convolution_and_pooling() -> None:
    x, w = random(3, 4, 6, 5), random(4, 2, 3, 2)
    given: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0), "groups": 2}
    second(lambda x, w: F.conv2d(x, w, **given).tanh(), lambda x, w: TF.conv2d(x, w, **given).tanh(), [x, w])
    second(lambda x, w: F.conv_transpose2d(x, w, **given).tanh(),
           lambda x, w: TF.conv_transpose2d(x, w, **given).tanh(), [x, w])
    second(lambda x: F.max_pool2d(x, 2, 1).tanh(), lambda x: TF.max_pool2d(x, 2, 1).tanh(), [x])
    second(lambda x: F.avg_pool2d(x, 2, 1).tanh(), lambda x: TF.avg_pool2d(x, 2, 1).tanh(), [x])


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_of_batch_norm(training: bool) -> None:
    mean, var = random(3), RNG.uniform(0.5, 2, 3)

    def ours(x: Any, w: Any, b: Any) -> Any:
        return F.batch_norm(x, mt.tensor(mean), mt.tensor(var), w, b, training, eps=0.1).tanh()

    def theirs(x: Any, w: Any, b: Any) -> Any:
        return TF.batch_norm(x, torch.tensor(mean), torch.tensor(var), w, b, training, eps=0.1).tanh()

    second(ours, theirs, [random(5, 3, 4), random(3), random(3)])


# --- pooling ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel, stride, padding, dilation", [
    (2, None, 0, 1), (3, 2, 1, 1), ((3, 2), (1, 2), (1, 0), (2, 1)), (2, 3, 0, (1, 3))])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> None:
    given = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation,
             "ceil_mode": ceil_mode}
    x = np.round(random(3, 2, 7, 8))            # with ties
    check(lambda x: F.max_pool2d(x, **given), lambda x: TF.max_pool2d(x, **given), [x], NUMBER)
    got = F.max_pool2d(split(x), return_indices=True, **given)
    wanted = TF.max_pool2d(torch.tensor(x), return_indices=True, **given)
    for a, b in zip(got, wanted, strict=True):
        same(a, b)
    first = {k: v if v is None or isinstance(v, int) else v[0] for k, v in given.items()}
    check(lambda x: F.max_pool1d(x, **first), lambda x: TF.max_pool1d(x, **first), [x[:, 0]], NUMBER)


@pytest.mark.parametrize("kernel, stride, padding", [(2, None, 0), (3, 2, 1), ((3, 2), (1, 3), (1, 0))])
@pytest.mark.parametrize("ceil_mode, count_include_pad, divisor",
                         [(False, True, None), (True, False, None), (True, True, 3)])
def test_avg_pool(kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool,
                  divisor: int | None) -> None:
    given = (kernel, stride, padding, ceil_mode, count_include_pad)
    check(lambda x: F.avg_pool2d(x, *given, divisor), lambda x: TF.avg_pool2d(x, *given, divisor),
          [random(3, 2, 7, 8)], NUMBER)
    first = tuple(g if g is None or isinstance(g, int) else g[0] for g in given)
    check(lambda x: F.avg_pool1d(x, *first), lambda x: TF.avg_pool1d(x, *first), [random(3, 2, 7)], NUMBER)


@pytest.mark.parametrize("size", [1, (1, 1), 3, (2, None), (7, 4), (10, 3)])
def test_adaptive_pools(size: Any) -> None:
    x = random(3, 2, 7, 8)
    check(lambda x: F.adaptive_avg_pool2d(x, size), lambda x: TF.adaptive_avg_pool2d(x, size), [x], NUMBER)
    check(lambda x: F.adaptive_max_pool2d(x, size), lambda x: TF.adaptive_max_pool2d(x, size), [x], NUMBER)
    first = size if isinstance(size, int) else size[0]
    line = x[:, 0]
    check(lambda x: F.adaptive_avg_pool1d(x, first), lambda x: TF.adaptive_avg_pool1d(x, first), [line],
          NUMBER)
    check(lambda x: F.adaptive_max_pool1d(x, first), lambda x: TF.adaptive_max_pool1d(x, first), [line],
          NUMBER)


# --- normalization ----------------------------------------------------------------------------------------

def statistics_agree(ours: Any, theirs: Any) -> None:
    for name, wanted in theirs.named_buffers():
        same(ours.state_dict()[name], wanted, NUMBER, name)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"affine": False},
                                     {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (5, 3, 2, 3)])
def test_batch_norm_uses_the_whole_batch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    kind = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"
    ours, theirs = getattr(nn, kind)(3, **options), getattr(torch.nn, kind)(3, **options)
    for _ in range(2):
        theirs.zero_grad()
        ours.zero_grad()
        check_modules(ours, theirs, random(*shape) * 3 + 5, NUMBER)
        statistics_agree(ours, theirs)
    check_modules(ours.eval(), theirs.eval(), random(*shape), NUMBER)
    statistics_agree(ours, theirs)


def test_batch_norm_of_a_large_mean_keeps_its_digits() -> None:
    x = (RNG.normal(size=(64, 2, 8)) + 1000).astype(np.float32)
    wanted = (x - x.mean((0, 2), dtype=float)[:, None]) / np.sqrt(x.var((0, 2), dtype=float)[:, None] + 1e-5)
    got = F.batch_norm(split(x), None, None, training=True).numpy()
    np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_batch_norm_of_channels_that_are_split() -> None:
    x = random(4, 6, 3)
    got = F.batch_norm(mt.tensor(x, layout=mt.Shard(1)), None, None, training=True)
    same(got, TF.batch_norm(torch.tensor(x), None, None, training=True), NUMBER)


def test_batch_norm_in_half_precision_has_statistics_in_float32() -> None:
    x = (random(300, 2, 40) * 10 + 100).astype(np.float16)
    layer = nn.BatchNorm1d(2, momentum=1.0)
    assert layer(split(x)).dtype == np.float16          # as torch's, whose weights are float32 too
    np.testing.assert_allclose(layer.running_mean.numpy(), x.mean((0, 2), dtype=float), rtol=1e-5)
    assert nn.BatchNorm1d(2).half()(split(x)).dtype == np.float16


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 4), (2, 6, 3, 2)])
def test_group_norm(shape: tuple[int, ...], groups: int) -> None:
    if shape == (3, 6) and groups == 6:
        return                                          # torch refuses single values
    check_modules(nn.GroupNorm(groups, 6), torch.nn.GroupNorm(groups, 6), random(*shape), NUMBER)
    check_modules(nn.GroupNorm(groups, 6, affine=False), torch.nn.GroupNorm(groups, 6, affine=False),
                  random(*shape), NUMBER)


def test_instance_norm() -> None:
    for affine in (False, True):
        check_modules(nn.InstanceNorm1d(3, affine=affine), torch.nn.InstanceNorm1d(3, affine=affine),
                      random(2, 3, 5), NUMBER)
        check_modules(nn.InstanceNorm2d(3, affine=affine), torch.nn.InstanceNorm2d(3, affine=affine),
                      random(2, 3, 5, 4), NUMBER)


# --- layers -----------------------------------------------------------------------------------------------

LAYERS: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = [
    ("Conv1d", (4, 6, 3), {"padding": "same", "groups": 2}, (3, 4, 7)),
    ("Conv2d", (3, 4, (3, 2)), {"stride": 2, "padding": 1, "bias": False}, (2, 3, 6, 5)),
    ("ConvTranspose1d", (4, 6, 3), {"stride": 2, "output_padding": 1, "groups": 2}, (3, 4, 5)),
    ("ConvTranspose2d", (3, 4, 3), {"stride": 2, "padding": 1, "output_padding": 1, "bias": False}, (2, 3, 4,
                                                                                                     3)),
    ("MaxPool1d", (3,), {"stride": 2, "padding": 1}, (2, 3, 8)),
    ("MaxPool2d", (2,), {"ceil_mode": True}, (2, 3, 5, 7)),
    ("AvgPool1d", (3,), {"stride": 1, "padding": 1, "count_include_pad": False}, (2, 3, 6)),
    ("AvgPool2d", ((2, 3),), {"divisor_override": 5}, (2, 3, 6, 6)),
    ("AdaptiveAvgPool1d", (4,), {}, (2, 3, 9)), ("AdaptiveAvgPool2d", ((1, 1),), {}, (2, 3, 5, 4)),
    ("AdaptiveMaxPool1d", (3,), {}, (2, 3, 7)), ("AdaptiveMaxPool2d", (2,), {}, (2, 3, 4, 6)),
]


@pytest.mark.parametrize("name, args, options, shape", LAYERS, ids=[case[0] for case in LAYERS])
def test_layer(name: str, args: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    ours, theirs = getattr(nn, name)(*args, **options), getattr(torch.nn, name)(*args, **options)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n,
                                                                  p in theirs.named_parameters()]
    check_modules(ours, theirs, random(*shape), NUMBER)
    repr(ours)


def test_initial_weights_lie_in_torchs_bounds() -> None:
    for name, fan_in in (("Conv2d", 8 * 9), ("ConvTranspose2d", 16 * 9)):
        layer = getattr(nn, name)(8, 16, 3)
        for p in layer.parameters():
            values = p.numpy()
            assert np.abs(values).max() <= 1 / np.sqrt(fan_in)
            assert np.abs(values).max() > 0.8 / np.sqrt(fan_in)


def test_a_small_residual_network_trains_like_torchs() -> None:
    def layers(n: Any) -> Any:
        return n.Sequential(n.Conv2d(1, 4, 3, padding=1, bias=False), n.BatchNorm2d(4), n.ReLU(),
                            n.MaxPool2d(2),
                            n.Conv2d(4, 6, 3), n.GroupNorm(2,
                                                           6), n.ReLU(), n.AdaptiveAvgPool2d(1), n.Flatten(),
                            n.Linear(6, 3))

    theirs, ours = layers(torch.nn).double(), layers(nn).double()
    ours.load_state_dict(theirs.state_dict())
    opt, peer = mt.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), torch.optim.SGD(
        theirs.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = random(7, 1, 8, 8), np.random.default_rng(step).integers(0, 3, 7)
        loss, wanted = F.cross_entropy(ours(split(x)), split(y)), TF.cross_entropy(
            theirs(torch.tensor(x)), torch.tensor(y))
        same(loss, wanted, NUMBER)
        opt.zero_grad()
        peer.zero_grad()
        loss.backward()
        wanted.backward()
        opt.step()
        peer.step()
    for name, wanted in theirs.state_dict().items():
        same(ours.state_dict()[name], wanted, 1e-8, name)


# --- errors -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, words", [
    (lambda: F.conv2d(mt.zeros((2, 3)), mt.zeros((4, 3, 3, 3))), "needs"),
    (lambda: F.conv2d(mt.zeros((2, 3, 5, 5)), mt.zeros((4, 3, 3))), "weight"),
    (lambda: F.conv2d(mt.zeros((2, 3, 5, 5)), mt.zeros((4, 2, 3, 3))), "3 input channels"),
    (lambda: F.conv1d(mt.zeros((2, 3, 5)), mt.zeros((4, 3, 3)), stride=2, padding="same"), "stride 1"),
    (lambda: F.conv1d(mt.zeros((2, 3, 5)), mt.zeros((4, 3, 3)), stride=(1, 2)), "stride"),
    (lambda: F.conv1d(mt.zeros((2, 3, 5)), mt.zeros((4, 3, 3)), padding=(1, 2)), "padding"),
    (lambda: F.conv_transpose1d(mt.zeros((2, 3, 5)), mt.zeros((3, 3, 3)), output_padding=1),
     "output_padding"),
    (lambda: F.max_pool1d(mt.zeros((2, 3, 5)), 2, padding=2), "half a window"),
    (lambda: F.adaptive_avg_pool1d(mt.zeros((2, 3, 5)), (2, 2)), "output_size"),
    (lambda: F.batch_norm(mt.zeros((1, 3)), None, None, training=True), "one value per channel"),
    (lambda: F.batch_norm(mt.zeros((4, 3)), None, None), "training=True"),
    (lambda: nn.BatchNorm2d(3)(mt.zeros((4, 3))), "4 dimensions"),
    (lambda: nn.BatchNorm1d(3)(mt.zeros((4, 2))), "3 channels"),
    (lambda: nn.GroupNorm(2, 3), "groups"), (lambda: nn.Conv2d(3, 4, 3, groups=2), "groups")])
def test_errors_say_what_is_needed(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(mt.ShapeError, match=words):
        call()


def test_padding_modes_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="reflect"):
        nn.Conv1d(3, 4, 3, padding_mode="reflect")
    with pytest.raises(ValueError, match="full"):
        F.conv1d(mt.zeros((2, 3, 5)), mt.zeros((4, 3, 3)), padding="full")
