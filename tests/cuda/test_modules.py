"""The emulation of CUDA C++ computes what CUDA does and refuses what it forbids; what the PRELUDE has."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator.modules import CompileError, KernelError

from meshtape.runtime.cuda.source import Source, ctype
from meshtape.runtime.errors import DTypeError

KERNELS = Source("tests", r'''
extern "C" __global__ void __launch_bounds__(256) row_sums(const float* x, float* out, int width, float by) {
  __shared__ float room[32];
  float total = 0;
  for (int i = threadIdx.x; i < width; i += blockDim.x) total += x[blockIdx.x * width + i];
  total = block_sum(total, room);
  if (threadIdx.x == 0) out[blockIdx.x] = total * by;
}
extern "C" __global__ void neighbours(int* out) {
  extern __shared__ int kept[];
  const int i = threadIdx.x, n = blockDim.x;
  kept[i] = i;
  __syncthreads();
  out[i] = kept[(i + 1) % n];
  out[n + i] = __shfl_up_sync(0xffffffffu, i, 1);
  out[2 * n + i] = __shfl_down_sync(0xffffffffu, i, 2, 8);
  out[3 * n + i] = __ballot_sync(0xffffffffu, i % 2);
  out[4 * n + i] = __match_any_sync(0xffffffffu, i / 4);
  out[5 * n + i] = __reduce_add_sync(0xffffffffu, i);
  out[6 * n + i] = __syncthreads_count(i < 5);
}
extern "C" __global__ void missing_barrier(int* out) {
  __shared__ int kept[256];
  kept[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = kept[(threadIdx.x + 1) % blockDim.x];
}
extern "C" __global__ void count(unsigned* out) { atomicAdd(out, 1u); }
struct Pair { const float* from; long long n; };
extern "C" __global__ void by_value(Pair pair, float* out) {
  out[threadIdx.x] = pair.from[pair.n + threadIdx.x];
}
extern "C" __global__ void divergent_barrier(float* x) { if (threadIdx.x < 3) __syncthreads(); }
extern "C" __global__ void divergent_shuffle(float* x) {
  if (threadIdx.x % 2) x[0] = __shfl_xor_sync(0xffffffffu, x[0], 1);
  else __syncwarp();
}
extern "C" __global__ void absent_lane(float* x) { if (threadIdx.x < 8) x[0] = __shfl_sync(0xff, x[0], 9); }
extern "C" __global__ void misaligned(float* x) { x[0] = load<4>(x + 1)[0]; }
extern "C" __global__ void far_away(float* x) { x[1ll << 40] = 1; }
extern "C" __global__ void shared_overrun(int* x) { extern __shared__ int kept[]; kept[threadIdx.x] = 1; }
extern "C" __global__ void convert(const float* x, unsigned short* half, unsigned short* brain, int n) {
  for (int i = threadIdx.x + blockIdx.x * blockDim.x; i < n; i += blockDim.x * gridDim.x)
    half[i] = float16(x[i]).bits, brain[i] = bfloat16(x[i]).bits;
}
extern "C" __global__ void widen(const float16* half, const bfloat16* brain, float* x, float* y) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  x[i] = half[i], y[i] = brain[i];
}
extern "C" __global__ void limits(long long* out) {
  out[0] = Limits<int8>::least, out[1] = Limits<int8>::greatest, out[2] = Limits<uint16>::greatest;
  out[3] = Limits<int64>::least, out[4] = Limits<int32>::greatest, out[5] = Limits<uint64>::greatest;
  const float nan = __int_as_float(0x7fc00000);
  out[6] = maximum(0.0f, nan) != 0.0f, out[7] = maximum(nan, 9.f) > 0;
}
''', ("row_sums",))


def test_a_kernel_with_reductions_runs_on_every_block(device: Any) -> None:
    x = device.cp.asarray(np.random.default_rng(0).normal(size=(40, 1000)).astype("f"))
    out = device.cp.empty(40, "f")
    device.kernels(KERNELS, "row_sums")((40,), (256,), (x, out, np.int32(1000), np.float32(2)))
    np.testing.assert_allclose(out.get(), 2 * x.get().sum(1), rtol=1e-4, atol=1e-4)


def test_shared_memory_and_operations_of_a_warp(device: Any) -> None:
    n = 64
    out = device.cp.empty((7, n), np.int32)
    device.kernels(KERNELS, "neighbours")((1,), (n,), (out,), shared_mem=4 * n)
    i = np.arange(n)
    first = i // 32 * 32
    wanted = [(i + 1) % n, np.where(i % 32 == 0, i, i - 1), np.where(i % 8 < 6, i + 2, i),
              np.full(n, np.uint32(0xaaaaaaaa).view(np.int32)),
              (np.uint32(15) << (i % 32 // 4 * 4).astype(np.uint32)).view(np.int32), 496 + 32 * first,
              np.full(n, 5)]
    np.testing.assert_array_equal(out.get(), wanted)


def test_atomics_count_all_threads(device: Any) -> None:
    out = device.cp.zeros(1, np.uint32)
    device.kernels(KERNELS, "count")((5, 3), (33,), (out,))
    assert out.get() == 5 * 3 * 33


def test_a_struct_is_passed_by_value(device: Any) -> None:
    x, out = device.cp.arange(10, dtype="f"), device.cp.empty(4, "f")
    pair = np.zeros(1, [("from", np.uint64), ("n", np.int64)])
    pair["from"], pair["n"] = x.data.ptr, 5
    device.kernels(KERNELS, "by_value")((1,), (4,), (pair, out))
    assert out.get().tolist() == [5, 6, 7, 8]


def test_16_bit_floats_round_as_numpy_does(device: Any) -> None:
    rng = np.random.default_rng(1)
    bits = np.concatenate([rng.integers(0, 2**32, 20000, np.uint32), np.arange(0, 2**32, 2**17, np.uint32),
                           np.arange(0, 2**32, 2**17, np.uint32) + 2**12 - 1,
                           np.arange(0, 2**32, 2**17, np.uint32) + 2**12])
    x = bits.view(np.float32)
    halves, brains = (device.cp.empty(x.size, np.uint16) for _ in range(2))
    device.kernels(KERNELS, "convert")((4,), (64,), (device.cp.asarray(x), halves, brains, np.int32(x.size)))
    with np.errstate(over="ignore", invalid="ignore"):
        for got, dtype in ((halves, np.dtype(np.float16)), (brains, np.dtype(ml_dtypes.bfloat16))):
            found, wanted = got.get(), x.astype(dtype)
            real = ~np.isnan(x)
            np.testing.assert_array_equal(found[real], wanted.view(np.uint16)[real])
            assert np.isnan(found.view(dtype).astype("f")[~real]).all()


def test_16_bit_floats_widen_exactly(device: Any) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    given = device.cp.asarray(bits)
    halves, brains = (device.cp.empty(bits.size, np.float32) for _ in range(2))
    device.kernels(KERNELS, "widen")((256,), (256,), (given, given, halves, brains))
    np.testing.assert_array_equal(halves.get(), bits.view(np.float16).astype("f"))
    np.testing.assert_array_equal(brains.get(), bits.view(ml_dtypes.bfloat16).astype("f"))


def test_limits_of_integers_and_a_maximum_that_keeps_nan(device: Any) -> None:
    out = device.cp.empty(8, np.int64)
    device.kernels(KERNELS, "limits")((1,), (1,), (out,))
    assert out.get().tolist() == [-128, 127, 65535, -2**63, 2**31 - 1, -1, 1, 0]


def test_names_of_dtypes_in_sources() -> None:
    assert [ctype(d) for d in ("float32", "float64", "float16", "bfloat16", "bool", "uint8", "int64")] == \
        ["float", "double", "float16", "bfloat16", "bool", "uint8", "int64"]
    with pytest.raises(DTypeError, match="complex64"):
        ctype("complex64")


# --- what only the emulation can tell -------------------------------------------------------------------

@pytest.fixture
def emulated() -> Any:
    import emulator
    device = emulator.device()
    with device.active():
        yield device


def test_a_missing_barrier_gives_wrong_numbers(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESHTAPE_EMULATOR_RACES", raising=False)
    out = emulated.cp.empty(256, np.int32)
    emulated.kernels(KERNELS, "missing_barrier")((1,), (256,), (out,))
    assert (out.get() != (np.arange(256) + 1) % 256).any()


@pytest.mark.parametrize(("name", "text"), [
    ("divergent_barrier", "has returned"), ("divergent_shuffle", "diverge.*a shuffle|diverge.*__syncwarp"),
    ("absent_lane", "from lane 9"), ("misaligned", "misaligned"), ("far_away", "no memory of the device")])
def test_what_cuda_forbids_is_an_error_that_names_the_thread(emulated: Any, name: str, text: str) -> None:
    x = emulated.cp.zeros(64, "f")
    with pytest.raises(KernelError, match=text):
        emulated.kernels(KERNELS, name)((2,), (64,), (x,))


def test_dynamic_shared_memory_has_the_size_of_the_launch(emulated: Any) -> None:
    kernel = emulated.kernels(KERNELS, "shared_overrun")
    x = emulated.cp.zeros(1, np.int32)
    kernel((1,), (64,), (x,), shared_mem=256)
    with pytest.raises(KernelError, match="byte 252"):
        kernel((1,), (64,), (x,), shared_mem=252)
    with pytest.raises(KernelError, match="max_dynamic_shared_size_bytes"):
        kernel((1,), (64,), (x,), shared_mem=50000)
    kernel.max_dynamic_shared_size_bytes = 60000
    kernel((1,), (64,), (x,), shared_mem=50000)


@pytest.mark.parametrize(("grid", "block", "change", "error"), [
    ((1,), (512,), {}, KernelError), ((1,), 64, {}, TypeError), ((1,), (64,), {2: 5}, TypeError),
    ((1,), (64,), {3: 1.0}, TypeError), ((1,), (64,), {3: np.int32(1)}, TypeError),
    ((1,), (64,), {0: np.zeros((1, 5), "f")}, TypeError), ((1,), (64,), {1: "x"}, TypeError)])
def test_arguments_that_are_not_the_kernels_parameters_are_refused(
        emulated: Any, grid: Any, block: Any, change: Any, error: Any) -> None:
    args = [emulated.cp.zeros((1, 5), "f"), emulated.cp.empty(1, "f"), np.int32(5), np.float32(1)]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(error):
        emulated.kernels(KERNELS, "row_sums")(grid, block, tuple(args))


def test_a_source_that_does_not_compile_and_a_name_that_is_not_there(emulated: Any) -> None:
    with pytest.raises(CompileError, match="undeclared"):
        emulated.cp.RawModule(code="int x = undeclared;").get_function("f")
    with pytest.raises(KernelError, match="NOT_FOUND"):
        emulated.kernels(KERNELS, "none")


def test_a_launch_in_a_capture_runs_when_the_graph_does(emulated: Any) -> None:
    out = emulated.cp.zeros(1, np.uint32)
    kernel = emulated.kernels(KERNELS, "count")
    emulated.stream.begin_capture()
    kernel((1,), (32,), (out,))
    graph = emulated.stream.end_capture()
    assert out.get() == 0
    graph.launch(emulated.stream)
    graph.launch(emulated.stream)
    assert out.get() == 64
