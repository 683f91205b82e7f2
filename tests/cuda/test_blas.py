"""Products on a device, against NumPy."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import pytest

from meshtape.runtime.cuda import cublas
from meshtape.runtime.errors import ShapeError

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = ("float16", BF16, "float32", "float64", "complex64", "complex128")
INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-6, "float64": 1e-14, "complex64": 2e-6,
             "complex128": 1e-14}

SHAPES = [((5,), (5,)), ((4, 5), (5,)), ((5,), (5, 3)), ((4, 5), (5, 3)), ((1, 5), (5, 1)), ((4, 1), (1, 3)),
          ((4, 0), (0, 3)), ((0, 4), (4, 3)), ((2, 4, 5), (5, 3)), ((2, 4, 5), (5,)), ((5,), (2, 5, 3)),
          ((4, 5), (2, 5, 3)), ((2, 4, 5), (2, 5, 3)), ((2, 1, 4, 5), (3, 5, 2)), ((0, 4, 5), (5, 3)),
          ((2, 0, 5), (2, 5, 3)), ((3, 4, 0), (3, 0, 2)), ((33, 17), (17, 65))]


def values(shape, dtype, seed=0):
    """Random numbers; integers over the whole range of their dtype, so that sums wrap around."""
    rng = np.random.default_rng((seed, *shape))
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.3
    if dtype.kind in "iu":
        return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if dtype.kind == "c" else x).astype(dtype)


def expected(a, b):
    """a @ b, 16-bit floats summed in 64 bits."""
    if a.dtype.name in ("float16", "bfloat16"):
        return a.astype(np.float64) @ b.astype(np.float64)
    return a @ b


def near(got, want, dtype):
    tolerance = TOLERANCE[np.dtype(dtype).name]
    np.testing.assert_allclose(np.asarray(got, want.dtype), want, rtol=tolerance, atol=tolerance * 4)


def same(got, a, b):
    """a @ b, exactly for integers."""
    if a.dtype.kind in "iu":
        np.testing.assert_array_equal(got, a @ b)
    else:
        near(got, expected(a, b), a.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("a_shape, b_shape", SHAPES, ids=str)
def test_matmul_is_that_of_numpy(device, a_shape, b_shape, dtype):
    a, b = values(a_shape, dtype), values(b_shape, dtype, 1)
    out = device.blas.matmul(device.cp.asarray(a), device.cp.asarray(b))
    assert out.dtype == dtype
    near(out.get(), expected(a, b), dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("a_shape, b_shape", SHAPES, ids=str)
def test_integers_wrap_around_as_in_numpy(device, a_shape, b_shape, dtype):
    a, b = values(a_shape, dtype), values(b_shape, dtype, 1)
    out = device.blas.matmul(device.cp.asarray(a), device.cp.asarray(b)).get()
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, a @ b)


VIEWS = {
    "transposed": lambda x: x.swapaxes(-1, -2), "every other row": lambda x: x[..., ::2, :],
    "every other column": lambda x: x[..., ::2], "backwards": lambda x: x[..., ::-1, :],
    "an inner block": lambda x: x[..., 1:-1, 1:-1], "one row": lambda x: x[..., 2:3, :],
    "one column": lambda x: x[..., 2:3], "batches turned": lambda x: x.swapaxes(0, 1),
}


@pytest.mark.parametrize("dtype", ["float32", BF16, "int32"], ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_multiplied_like_arrays(device, name, dtype):
    view, cp = VIEWS[name], device.cp
    a, b = values((3, 2, 6, 8), dtype), values((3, 2, 8, 6), dtype, 1)
    for left in (lambda x: x, view):
        for right in (lambda x: x, view):
            x, y = left(a), right(b)
            k = min(x.shape[-1], y.shape[-2])
            batch = slice(None, min(x.shape[0], y.shape[0])), slice(None, min(x.shape[1], y.shape[1]))
            x, y = x[(*batch, slice(None), slice(None, k))], y[(*batch, slice(None, k))]
            dx = left(cp.asarray(a))[(*batch, slice(None), slice(None, k))]
            dy = right(cp.asarray(b))[(*batch, slice(None, k))]
            same(device.blas.matmul(dx, dy).get(), x, y)


@pytest.mark.parametrize("dtype", ["float32", BF16, "int16"], ids=str)
@pytest.mark.parametrize("name", ["transposed", "an inner block", "every other column"])
def test_out_may_have_any_strides_and_nothing_beside_it_is_written(device, name, dtype):
    a, b = values((2, 4, 5), dtype), values((2, 5, 4), dtype, 1)
    room = device.cp.asarray(values((2, 6, 6) if name == "an inner block" else (
        (2, 4, 8) if name == "every other column" else (2, 4, 4)), dtype, 2))
    before = room.get()
    view = VIEWS[name]
    assert device.blas.matmul(device.cp.asarray(a), device.cp.asarray(b), out=view(room)).shape == (2, 4, 4)
    after = room.get()
    want = before.copy()
    view(want)[...] = view(after)
    np.testing.assert_array_equal(after, want)
    same(view(after), a, b)


def test_sixteen_bits_are_summed_in_float32(device):
    """4096 ones: float16 alone would stop at 2048."""
    ones = device.cp.asarray(np.ones((1, 4096), np.float16))
    assert float(device.blas.matmul(ones, ones.T).get()[0, 0]) == 4096


def test_dtypes_meet(device):
    cp = device.cp
    a, b = values((3, 4), "float32"), values((4, 2), "float64")
    out = device.blas.matmul(cp.asarray(a), cp.asarray(b))
    assert out.dtype == np.float64
    near(out.get(), a @ b, "float64")
    half, single = values((3, 4), "float16"), cp.asarray(np.ones((3, 2), np.float32))
    out = device.blas.gemm(cp.asarray(half), cp.asarray(half[:2]), single, transpose_b=True, beta=2.0)
    near(out.get(), expected(half, half[:2].T) + 2, "float16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64", "int64"])
@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
def test_gemm_scales_transposes_and_adds(device, ta, tb, dtype):
    cp = device.cp
    a, b = values((5, 4) if ta else (4, 5), dtype), values((3, 5) if tb else (5, 3), dtype, 1)
    c = values((4, 3), dtype, 2)
    wide = (lambda x: x.astype(np.float64)) if dtype == "float16" else (lambda x: x)
    want = 2 * (wide(a.T if ta else a) @ wide(b.T if tb else b)) + 3 * wide(c)
    out = device.blas.gemm(cp.asarray(a), cp.asarray(b), cp.asarray(c), transpose_a=ta, transpose_b=tb,
                           alpha=2.0, beta=3.0).get()
    near(out, want, dtype) if dtype != "int64" else np.testing.assert_array_equal(out, want)
    nothing = cp.asarray(np.zeros((4, 0), dtype))
    out = device.blas.gemm(nothing, nothing[:3], cp.asarray(c), transpose_b=True, beta=3.0).get()
    near(out, wide(c) * 3, dtype) if dtype != "int64" else np.testing.assert_array_equal(out, c * 3)


def test_what_does_not_fit_is_refused(device):
    cp = device.cp
    with pytest.raises(ShapeError, match="inner axes differ"):
        device.blas.matmul(cp.empty((3, 4)), cp.empty((3, 4)))
    with pytest.raises(ShapeError, match="at least one dimension"):
        device.blas.matmul(cp.empty(()), cp.empty((3, 4)))
    with pytest.raises(ShapeError, match="out is"):
        device.blas.matmul(cp.empty((3, 4)), cp.empty((4, 3)), cp.empty((3, 4)))


@pytest.mark.parametrize("dtype", ["float32", BF16, "float64"], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (5,), (0, 5), (2, 4, 5), (1, 1)], ids=str)
def test_linear_adds_the_bias_before_rounding(device, shape, dtype):
    cp = device.cp
    x, w, b = values(shape, dtype), values((3, shape[-1]), dtype, 1), values((3,), dtype, 2)
    want = expected(x, w.T) + b.astype(np.float64)
    near(device.blas.linear(*map(cp.asarray, (x, w, b))).get(), want, dtype)
    near(device.blas.linear(cp.asarray(x), cp.asarray(w)).get(), expected(x, w.T), dtype)
    out = cp.empty(want.shape, np.dtype(dtype))
    assert device.blas.linear(*map(cp.asarray, (x, w, b)), out=out) is out


def test_a_captured_product_is_replayed_with_new_numbers_and_gives_the_same_bits(device):
    cp = device.cp
    a, b = values((2, 3, 4), "float32"), values((2, 4, 5), "float32", 1)
    da, db, out = cp.asarray(a), cp.asarray(b), cp.empty((2, 3, 5), np.float32)
    first = device.blas.matmul(da, db).get()
    device.stream.begin_capture()
    device.blas.matmul(da, db, out)
    graph = device.stream.end_capture()
    graph.launch(device.stream)
    np.testing.assert_array_equal(out.get(), first)
    da[...] = da * 2
    graph.launch(device.stream)
    np.testing.assert_array_equal(out.get(), device.blas.matmul(da, db).get())


def test_work_follows_the_current_stream(device):
    cp = device.cp
    other = cp.cuda.Stream(non_blocking=True)
    a = cp.asarray(values((3, 3), "float32"))
    first = device.blas.matmul(a, a).get()
    device.synchronize()
    with other:
        got = device.blas.matmul(a, a)
        other.synchronize()
        np.testing.assert_array_equal(got.get(), first)
    device.stream.begin_capture()
    out = device.blas.matmul(a, a)
    device.stream.end_capture().launch(device.stream)
    np.testing.assert_array_equal(out.get(), first)


def test_what_was_taken_is_given_back():
    import emulator
    binding = emulator.libraries().cublas
    before = len(binding.handles)
    device = emulator.device()
    assert len(binding.handles) == before + 1 and device.pool.used_bytes()
    device.blas.close()
    assert len(binding.handles) == before and not device.pool.used_bytes()


def test_tf32_is_used_where_it_was_asked_for_only():
    import emulator
    device = emulator.device()
    with device.active():
        a = device.cp.asarray(values((3, 3), "float32"))
        seen = device.libraries.cublas.modes
        device.blas.matmul(a, a)
        device.blas.tf32 = True
        device.blas.matmul(a, a)
        device.blas.matmul(a.astype("float64"), a.astype("float64"))
        device.blas.matmul(a.astype("float16"), a.astype("float16"))
    assert seen[-4:] == [cublas.COMPUTE_32F, cublas.COMPUTE_32F_FAST_TF32, cublas.COMPUTE_64F,
                         cublas.COMPUTE_32F]


# --- the binding ------------------------------------------------------------------------------------------

class Library:
    """Stands for libcublas: notes arguments and answers with a status."""

    def __init__(self, status=0):
        self.called, self.status = [], status

    def __getattr__(self, name):
        def call(*args):
            self.called.append((name, args))
            return self.status
        call.__name__ = name
        setattr(self, name, call)
        return call


def test_the_binding_takes_64_bit_sizes_where_they_are_needed():
    library = Library()
    binding = cublas.Cublas(library)
    few = (1, 0, 1, 2, 3, 4, 10, 20, 0, 5, 6, 30, 0, 7, 8, 11, 40, 0, 9, 12)
    binding.gemm_ex(*few, 1, 68, -1)
    binding.gemm_ex(*few, 5, 68, -1)
    binding.gemm_ex(1, 0, 1, 2**31, *few[4:], 1, 68, -1)
    names = [name for name, _ in library.called]
    assert names == ["cublasGemmEx", "cublasGemmStridedBatchedEx", "cublasGemmEx_64"]
    assert library.called[0][1] == (1, 0, 1, 2, 3, 4, 10, 20, 0, 5, 30, 0, 7, 11, 40, 0, 9, 68, -1)
    assert library.called[1][1] == (*few, 5, 68, -1)
    for name, args in library.called:
        declared = getattr(library, name).argtypes
        assert len(declared) == len(args)
        assert (ctypes.c_int64 if name.endswith("64") else ctypes.c_int) is declared[3]


def test_a_failure_is_an_error_with_cublas_name_of_it():
    binding = cublas.Cublas(Library(15))
    with pytest.raises(cublas.CublasError, match=r"\(2 x 3 x 4, 1 times.*CUBLAS_STATUS_NOT_SUPPORTED"):
        binding.gemm_ex(1, 0, 1, 2, 3, 4, 10, 20, 0, 5, 6, 30, 0, 7, 8, 11, 40, 0, 9, 12, 1, 68, -1)
    with pytest.raises(cublas.CublasError, match="CUBLAS_STATUS_99"):
        cublas.Cublas(Library(99)).set_stream(1, 2)
