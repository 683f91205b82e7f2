"""The threads of kernels do not race: planted races are found, and none in launches of every source."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import emulator
import numpy as np
import pytest
from emulator.modules import KernelError
from fused_programs import Number, Steps, run_fused

import meshtape.runtime.cuda
import meshtape.runtime.ops
from meshtape.runtime.cuda import fusion
from meshtape.runtime.cuda.kernels import convolution
from meshtape.runtime.cuda.kernels.attention import ALONG
from meshtape.runtime.cuda.kernels.columns import column_sums
from meshtape.runtime.cuda.kernels.sorting import SORT
from meshtape.runtime.cuda.source import SOURCES, Kernels, Source
from meshtape.runtime.op import TABLE

for found in pkgutil.walk_packages(meshtape.runtime.cuda.__path__, "meshtape.runtime.cuda."):
    importlib.import_module(found.name)


class Recorded(Kernels):
    """Kernels that know which of them were asked for."""

    def __init__(self, libraries: Any) -> None:
        super().__init__(libraries)
        self.used: set[tuple[str, str]] = set()

    def __call__(self, given: Source, function: str, **macros: Any) -> Any:
        self.used.add((given.name, function))
        return super().__call__(given, function, **macros)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A device whose kernels are checked."""
    monkeypatch.setenv("MESHTAPE_EMULATOR_RACES", "1")
    device = emulator.device()
    device.kernels = Recorded(emulator.libraries())
    with device.active():
        yield device
    emulator.check()


# --- races that are planted -----------------------------------------------------------------------------

PLANTED = Source("planted", r'''
__device__ inline void keep(int* to, int x) { to[threadIdx.x] = x; }

KERNEL no_barrier(int* out) {
  __shared__ int kept[64];
  keep(kept, 1), keep(kept, 2);
  __syncthreads();
  const int mine = kept[threadIdx.x];
  kept[63 - threadIdx.x] = mine;
}
KERNEL barrier(int* out) {
  __shared__ int kept[64];
  keep(kept, 1);
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = kept[63 - threadIdx.x];
  __syncthreads();
  kept[63 - threadIdx.x] = 0;
}
KERNEL read_and_written(int* out) {
  __shared__ int kept[64];
  keep(kept, 1);
  __syncthreads();
  if (kept[threadIdx.x / 32] == 1 && threadIdx.x == 40) kept[0] = 0;
}
KERNEL not_written(int* out) {
  __shared__ int kept[64];
  if (threadIdx.x < 63) keep(kept, 1);
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = kept[threadIdx.x];
}
KERNEL of_the_launch(int* out) {
  extern __shared__ short some[];
  some[threadIdx.x] = 1;
  if (threadIdx.x == 5) some[6] = 2;
}
KERNEL room_again(float* out) {
  __shared__ float room[32];
  const float sum = block_sum(1.0f, room);
  if (threadIdx.x == 0) room[1] = sum;
  out[blockIdx.x * 64 + threadIdx.x] = block_sum(sum, room);
}
KERNEL room_in_turn(float* out) {
  __shared__ float room[32];
  const float sum = block_sum(1.0f, room);
  out[blockIdx.x * 64 + threadIdx.x] = block_sum(sum, room);
}
KERNEL shuffled(int* out) {
  __shared__ int kept[64];
  keep(kept, 1);
  const int other = __shfl_xor_sync(0xffffffffu, 1, 1);
  out[blockIdx.x * 64 + threadIdx.x] = kept[threadIdx.x ^ 1] + other;
}
KERNEL warp(int* out) {
  __shared__ int kept[64];
  keep(kept, 1);
  __syncwarp();
  const int read = kept[threadIdx.x ^ 1];
  __syncwarp();
  keep(kept, read);
}
KERNEL across_warps(int* out) {
  __shared__ int kept[64];
  keep(kept, 1);
  __syncwarp();
  out[blockIdx.x * 64 + threadIdx.x] = kept[63 - threadIdx.x];
}
KERNEL part_of_a_warp(int* out) {
  __shared__ int kept[64];
  keep(kept, 1);
  if (threadIdx.x % 32 < 16) {
    __syncwarp(0xffff);
    out[blockIdx.x * 64 + threadIdx.x] = kept[threadIdx.x ^ 16];
  }
}
KERNEL blocks(int* out) { if (threadIdx.x == 0) out[0] = 1; }
KERNEL blocks_read(int* out) { if (threadIdx.x == 0 && out[1 - blockIdx.x % 2] == 0) out[blockIdx.x] = 1; }
KERNEL halves(short* out) { if (threadIdx.x == 0) out[blockIdx.x] = 1; }
KERNEL threads(int* out) { out[blockIdx.x * 64 + threadIdx.x / 2] = 1; }
KERNEL wide(float* out) {
  if (threadIdx.x < 16) store(out + blockIdx.x * 64 + 4 * threadIdx.x, Vec<float, 4>{});
  if (threadIdx.x == 40) out[blockIdx.x * 64 + 31] = 1;
}
KERNEL atomic(int* out) { atomicAdd(out, 1); }
KERNEL atomic_and_read(int* out) {
  atomicAdd(out, 1);
  if (threadIdx.x == 0) out[64 + blockIdx.x] = out[0];
}
KERNEL own(int* out) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  out[i] = 1;
  out[i] += 1;
  __syncthreads();
  out[i ^ 1] += 1;
}
'''.replace("KERNEL", 'extern "C" __global__ void'), ())


def launch(device: Any, name: str) -> None:
    kernel = device.kernels(PLANTED, name)
    kernel((3,), (64,), (device.cp.zeros(256, np.int32),), shared_mem=128 * (name == "of_the_launch"))


@pytest.mark.parametrize(("name", "text"), [
    ("no_barrier", "shared memory kept: thread .* it at line .*thread"),
    ("read_and_written", "byte 0 of shared memory kept"),
    ("not_written", "byte 252 of shared memory kept, which was not written"),
    ("of_the_launch", "shared memory of the launch"), ("room_again", "byte 4 of shared memory room"),
    ("shuffled", "shared memory kept"), ("across_warps", "shared memory kept"),
    ("part_of_a_warp", "shared memory kept"), ("blocks", "global memory"), ("blocks_read", "global memory"),
    ("threads", "global memory"), ("wide", "global memory"), ("atomic_and_read", "global memory")])
def test_a_race_is_an_error_that_names_memory_and_lines(checked: Any, name: str, text: str) -> None:
    with pytest.raises(KernelError, match=f"(?s){text}.*at line \\d+.*\n +\\d+  "):
        launch(checked, name)


@pytest.mark.parametrize("name", ["barrier", "room_in_turn", "warp", "halves", "atomic", "own"])
def test_what_is_ordered_or_apart_or_atomic_is_no_race(checked: Any, name: str) -> None:
    launch(checked, name)


def test_the_check_is_left_out_unless_it_is_asked_for(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESHTAPE_EMULATOR_RACES", raising=False)
    launch(device, "blocks")


# --- every source ---------------------------------------------------------------------------------------

def floats(*shape: int, dtype: str = "float32") -> Any:
    return np.random.default_rng(0).uniform(0.1, 1, shape).astype(dtype)


def integers(n: int, *shape: int) -> Any:
    return np.random.default_rng(0).integers(0, n, shape)


def innermost(device: Any, x: Any) -> Any:
    """`x` with channels innermost in memory."""
    return device.cp.moveaxis(device.cp.ascontiguousarray(device.cp.asarray(np.moveaxis(x, 1, -1))), -1, 1)


def run(device: Any, name: str, *given: Any, **attrs: Any) -> Any:
    """A row's kernel on arrays of the host or the device; 0-d ones are numbers."""
    op = TABLE[name]
    attrs, arrays = {**op.attrs, **attrs}, [device.cp.asarray(x) for x in given]
    assert op.device is not None
    assert op.device.supports(tuple(a.shape if a.ndim else None for a in arrays),
                              tuple(a.dtype if a.ndim else None for a in arrays), attrs)
    return op.device.run(device, *arrays, **attrs)


SEED, DRAW = np.array(3), np.array(1)
WIDTHS = (75, 1100)         # rows of a warp, 4 to a block; rows of a block


def softmax(device: Any) -> None:
    for width in WIDTHS:
        x = run(device, "softmax", floats(9, width), axis=-1)
        run(device, "softmax_grad", x, x, axis=-1)
        run(device, "logsumexp", x, axis=-1, keepdims=False)


def losses(device: Any) -> None:
    for width in WIDTHS:
        target = integers(width, 9)
        *_, p = run(device, "cross_entropy", floats(9, width), target, ignore_index=0, label_smoothing=0.1)
        run(device, "cross_entropy_grad", np.array(1.0), p, target, ignore_index=0, label_smoothing=0.1)
    run(device, "nll_grad", run(device, "nll", floats(2, 5, 300), integers(5, 2, 300), ignore_index=-1),
        integers(5, 2, 300), classes=5, ignore_index=-1)


def norms(device: Any) -> None:
    for width in (*WIDTHS, 8200):
        x, weight = floats(9 if width < 8000 else 2, width), floats(width)
        y, mean, rstd = run(device, "layer_norm", x, weight, weight, ndim=1, eps=1e-5)
        run(device, "layer_norm_grad", y, x, mean, rstd, weight, ndim=1)
    column_sums(device, device.cp.asarray(floats(1100, 70)), np.dtype(np.float32))


def batch_norms(device: Any) -> None:
    for place in (device.cp.asarray, lambda x: innermost(device, x)):
        x, channel = place(floats(4, 6, 40, 30)), floats(6)
        run(device, "batch_norm", x, channel, channel, channel, channel, training=True)
        sums = run(device, "batch_norm_sums", x, x, channel, channel, training=True)
        run(device, "batch_norm_grad", x, x, channel, channel, channel, sums, count=7)


def pools(device: Any) -> None:
    x, window = floats(2, 4, 20, 21), {"kernel": (3, 3), "stride": (2, 2), "padding": ((1, 1), (1, 1))}
    for place in (device.cp.asarray, lambda x: innermost(device, x)):
        largest = {**window, "dilation": (1, 1), "ceil_mode": False}
        best, tap = run(device, "max_pool", place(x), **largest)
        run(device, "max_pool_grad", best, tap, size=(20, 21), **largest)
        run(device, "max_pool_take", place(x), tap, **largest)
    mean = {**window, "ceil_mode": False, "count_include_pad": True, "divisor": None}
    run(device, "avg_pool_grad", run(device, "avg_pool", x, **mean), size=(20, 21), **mean)
    run(device, "adaptive_avg_pool_grad", run(device, "adaptive_avg_pool", x, count=(5, 5)), size=(20, 21))
    run(device, "adaptive_avg_pool", x, count=(1, 2))           # by warps


def convolutions(device: Any) -> None:
    for channels, groups in ((4, 1), (1, 4)):
        x, w = (device.cp.asarray(a) for a in (floats(2, 4, 13, 12), floats(8, channels, 3, 3)))
        how = {"stride": (1, 1), "padding": ((1, 1), (0, 2)), "dilation": (1, 2), "groups": groups}
        y = convolution.forward(device, x, w, **how)
        convolution.input_grad(device, y, w, size=(13, 12), **how)
        convolution.weight_grad(device, y, x, kernel=(3, 3), **how)


def picks(device: Any) -> None:
    table, index = floats(50, 24), integers(50, 700)
    run(device, "embedding", table, index, padding_idx=None)
    run(device, "embedding_grad", floats(700, 24), index, num_embeddings=50, padding_idx=2)
    along = np.argsort(floats(50, 24), 0)
    values = run(device, "take_along_axis", table, along, axis=0, unique=True)
    run(device, "take_along_axis_grad", values, along, extent=50, axis=0, unique=True)
    run(device, "take_along_axis_grad", table[:8], integers(50, 8, 24), extent=50, axis=0, unique=False)
    run(device, "index_update", table, floats(700, 24), index, dims=(0,), at=0)
    run(device, "random_permutation", SEED, DRAW, n=5000, offset=0, count=None)     # of 64 bits
    counts = device.cp.zeros(9000, np.uint32)                                       # of many keys
    device.kernels(SORT, "add_up", KEY="uint32")((1,), (1024,), (counts, np.uint32(9000)))


def randoms(device: Any) -> None:
    shape = {"shape": (3, 701), "dtype": "float32", "offset": None, "whole": None}
    for name, numbers in (("uniform", (-1.0, 1.0)), ("normal", (0.0, 2.0)), ("bernoulli", (0.5,))):
        run(device, f"random_{name}", SEED, DRAW, *map(np.array, numbers), **shape)
    run(device, "dropout", floats(3, 701), SEED, DRAW, p=0.5, offset=None, whole=None)


def recurrent(device: Any) -> None:
    x, h, T, B, H = floats(2, 8, 5), floats(8, 40), 2, 8, 40
    for name, gates, saved in (("rnn", 1, ()), ("lstm", 4, ("c", "gates")), ("gru", 3, ("gates",))):
        states = [h] * (1 + (name == "lstm"))
        given = [x, *states, floats(gates * H, 5), floats(gates * H, H), floats(gates * H), floats(gates * H)]
        outs = run(device, name, *given)
        outs = outs if saved else (outs,)
        assert outs[0].shape == (T, B, H)
        run(device, f"{name}_grad", *outs, *given, *outs)


def attentions(device: Any) -> None:
    for keys in (70, 1030):     # rows of a warp, and of a block
        q, k = floats(1, 2, 5, 8), floats(1, 2, keys, 8)
        attrs = {"p": 0.5, "is_causal": False, "scale": 0.3, "offset": None, "whole": (1, 2, 5, keys)}
        out, lse = run(device, "attention", q, k, k, np.array(True), SEED, DRAW, **attrs)
        run(device, "attention_grad", out, lse, q, k, k, lse, np.array(True), SEED, DRAW, lse_grad=False,
            **attrs)
    g, delta = (device.cp.asarray(a) for a in (floats(20, 40, dtype="float16"), floats(20)))
    device.kernels(ALONG, "project", T="float16")(
        (2,), (256,), (device.cp.empty_like(g), g, delta, np.int64(20), np.int32(40)))


def optimizers(device: Any) -> None:
    parameters = [floats(*shape) for shape in ((5000,), (3, 7), (257,))]
    rates = [np.array(x) for x in (0.1, 0.1, 0.9, 0.01)]
    run(device, "sgd_update", DRAW, *rates, *parameters * 3, n=3, nesterov=False, maximize=False,
        has_momentum=True)
    run(device, "adam_update", DRAW, *rates, np.array(0.1), *parameters * 4, n=3, decoupled=True,
        amsgrad=False, maximize=False)
    run(device, "sum_of_squares", *parameters)
    run(device, "nonfinite", *parameters)


def integer_products(device: Any) -> None:
    a, b = (device.cp.asarray(integers(9, *shape)) for shape in ((2, 20, 40), (40, 50)))
    device.blas.gemm(a, b, device.cp.empty((2, 20, 50), np.int64))


FAMILIES: dict[Callable[[Any], None], set[str]] = {
    softmax: {"softmax", "softmax_grad", "logsumexp"},
    losses: {"cross_entropy", "cross_entropy_total", "cross_entropy_grad", "nll"},
    norms: {"layer_norm", "layer_norm_grad", "layer_norm_affine_grad", "column_sums"},
    batch_norms: {"batch_norm_sums", "batch_norm_each"}, pools: {"pool_largest", "pool_average"},
    convolutions: {"convolution"},
    picks: {"take", "row_keys", "segment_sums", "sums_of_few", "put_last", "sort", "random_choices"},
    randoms: {"random_values", "random_choices"}, recurrent: {"recurrent"},
    attentions: {"attention_weights", "attention_along"},
    optimizers: {"sgd", "adam", "nonfinite", "sum_of_squares"}, integer_products: {"integer_matmul"}}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_no_threads_of_a_kernel_race(checked: Any, family: Callable[[Any], None]) -> None:
    family(checked)
    functions = {(name, f) for name in FAMILIES[family] for f in SOURCES[name].functions}
    assert functions - checked.kernels.used <= {("random_choices", f) for f in ("integers", "bernoulli")}


def test_every_source_is_checked() -> None:
    assert set().union(*FAMILIES.values()) == set(SOURCES)


@pytest.mark.parametrize(("shape", "axis", "split"), [
    ((40, 30), None, False), ((40, 30), 1, False), ((3, 1200), 1, False), ((2, 9000), 1, True),
    ((70, 40), 0, False), ((9000, 2), 0, True)])
def test_no_threads_of_a_fused_chain_race(checked: Any, shape: Any, axis: Any, split: bool) -> None:
    p = Steps()
    x, y = p.input(shape), p.input(shape[-1:])
    a = p.op("mul", p.op("add", x, Number(1.5)), y)
    outs = [a, *(p.op(name, a, axis=axis) for name in ("sum", "max")[:0 if axis is None else 2])]
    fused, = fusion.fuse(p.steps, p.types, p.dead(*outs))
    run_fused(checked, [fused], {x: floats(*shape), y: floats(shape[-1])}, p.scalars)
    launch, = fused.call.function._launches.values()
    assert bool(launch.partials) == split
    assert {f for _, f in checked.kernels.used} == {"fused", *["finish"] * split}
