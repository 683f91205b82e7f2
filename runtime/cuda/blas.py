"""Matrix products of one device: NumPy's matmul by cuBLAS, capturable, of strided operands in place."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda import cublas
from meshtape.runtime.cuda.gemm import Plan, broadcast, plan
from meshtape.runtime.cuda.kernels.integer_matmul import INTEGER_MATMUL, TILE, TYPES
from meshtape.runtime.cuda.lt import BGRADB, BIAS, Lt
from meshtape.runtime.errors import ShapeError

# What is summed in which type: 16-bit floats in float32. The number is cuBLAS's for the operands' type.
_SCALES = {"float16": np.float32, "bfloat16": np.float32, "float32": np.float32, "float64": np.float64,
           "complex64": np.complex64, "complex128": np.complex128}
_SIXTEEN = ("float16", "bfloat16")


def as_rows(x: Any) -> Any:
    """(..., n) as a matrix; a view where x is in C order."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


class Blas:
    """Products of device arrays on the current stream, on a handle and workspace of its own.

    A handle is made once; its stream and workspace are set when the stream changes, which a capture allows.
    Each stream has a workspace of its own, so equal calls give equal bits.

    lt      products with epilogues (runtime.cuda.lt.Lt), or None without cublasLt
    tf32    whether float32 (and complex64) is multiplied with 10 bits of mantissa; read at every call, and
            kept by graphs as it was when they were captured
    """

    def __init__(self, device: Any) -> None:
        self.tf32 = False
        self._device = device
        self._cp = device.cp
        self._binding = device.libraries.cublas
        self._workspaces: dict[int, Any] = {}
        self._stream = -1
        self._scalars: dict[Any, Any] = {}
        with device.handle:
            self._handle = self._binding.create()
            self._binding.set_math_mode(self._handle, cublas.DISALLOW_REDUCED_PRECISION_REDUCTION)
            with device.stream:
                self._go_to(device.stream.ptr)
                lt = device.libraries.cublaslt
                self.lt = None if lt is None else Lt(lt, self._workspace, self._scalar)

    def close(self) -> None:
        """Give handles and workspaces back; not inside a capture."""
        self._binding.destroy(self._handle)
        if self.lt is not None:
            self.lt.close()
        self._workspaces.clear()

    # --- products ---------------------------------------------------------------------------------------

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        """As numpy.matmul: (..., m, k) @ (..., k, n), or with vectors; the dtypes meet by NumPy's rules.

        16-bit floats are summed in float32. `out` may have any strides and must not overlap with a or b.
        Raises ShapeError.
        """
        if a.ndim == 0 or b.ndim == 0:
            raise ShapeError(f"matmul: needs at least one dimension, got {a.shape} @ {b.shape}")
        left = a[None, :] if a.ndim == 1 else a
        right = b[:, None] if b.ndim == 1 else b
        if left.shape[-1] != right.shape[-2]:
            raise ShapeError(f"matmul: inner axes differ, {a.shape} @ {b.shape}")
        batch = broadcast(left.shape[:-2], right.shape[:-2])
        shape = batch + (() if a.ndim == 1 else left.shape[-2:-1]) + (() if b.ndim == 1 else right.shape[-1:])
        dtype = np.result_type(a.dtype, b.dtype)
        if out is None:
            out = self._cp.empty(shape, dtype)
        elif out.shape != shape:
            raise ShapeError(f"matmul: the result is {shape}, out is {out.shape}")
        self.gemm(left, right, self._as_matrices(out, a.ndim == 1, b.ndim == 1))
        return out

    def _as_matrices(self, out: Any, row: bool, column: bool) -> Any:
        """A view with the dimensions of 1 that vectors stand for."""
        if column:
            out = out[..., None]
        return out[..., None, :] if row else out

    def gemm(self, a: Any, b: Any, out: Any = None, *, transpose_a: bool = False, transpose_b: bool = False,
             alpha: float = 1.0, beta: float = 0.0) -> Any:
        """alpha a @ b + beta out for matrices, in batches that broadcast; transposed if asked.

        `out` is of the dtype that a and b meet in, or float32 for 16-bit floats (anything else is cast);
        without `out`, beta is not used. It must not overlap with a or b.
        """
        a = a.swapaxes(-1, -2) if transpose_a else a
        b = b.swapaxes(-1, -2) if transpose_b else b
        dtype = a.dtype if a.dtype == b.dtype else np.result_type(a.dtype, b.dtype)
        if out is None:
            out = self._cp.empty((*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), dtype)
            beta = 0.0
        a, b = a.astype(dtype, copy=False), b.astype(dtype, copy=False)
        wide = out.dtype == np.float32 and dtype.name in _SIXTEEN
        if out.dtype != dtype and not wide:
            part = self._multiply(a, b, self._cp.empty(out.shape, dtype), alpha, 0.0)
            out[...] = part if beta == 0 else part + beta * out
            return out
        return self._multiply(a, b, out, alpha, beta)

    def _multiply(self, a: Any, b: Any, out: Any, alpha: float, beta: float) -> Any:
        if a.dtype.name in TYPES:
            return self._multiply_integers(a, b, out, alpha, beta)
        found = plan(a.shape, a.strides, b.shape, b.strides, out.strides, a.itemsize, out.itemsize)
        if found.zero:
            out[...] = 0 if beta == 0 else beta * out
            return out
        if not found.calls:
            return out
        a = a if found.copy_a is None else self._copied(a, found.copy_a)
        b = b if found.copy_b is None else self._copied(b, found.copy_b)
        if not found.through:
            self._call(found, a, b, out, alpha, beta)
            return out
        whole = self._cp.empty(out.shape, out.dtype)
        if beta != 0:
            whole[...] = out
        self._call(found, a, b, whole, alpha, beta)
        out[...] = whole
        return out

    def _copied(self, x: Any, shape: tuple[int, ...]) -> Any:
        """`x` broadcast to a shape, in C order."""
        copy = self._cp.empty(shape, x.dtype)
        copy[...] = x
        return copy

    def _call(self, p: Plan, a: Any, b: Any, out: Any, alpha: float, beta: float) -> None:
        """Carry a plan out."""
        name = a.dtype.name
        self._go_to(self._cp.cuda.get_current_stream().ptr)
        first, second = (b, a) if p.swapped else (a, b)
        kind, out_kind = cublas.DATA_TYPES[name], cublas.DATA_TYPES[out.dtype.name]
        scale = _SCALES[name]
        alpha_at, beta_at = self._scalar(scale, alpha), self._scalar(scale, beta)
        a0, b0, c0, step, out_step = first.data.ptr, second.data.ptr, out.data.ptr, a.itemsize, out.itemsize
        for a_at, b_at, c_at, count in p.calls:
            self._binding.gemm_ex(
                self._handle, p.transa, p.transb, p.m, p.n, p.k, alpha_at, a0 + a_at * step, kind, p.lda,
                p.stride_a, b0 + b_at * step, kind, p.ldb, p.stride_b, beta_at, c0 + c_at * out_step,
                out_kind, p.ldc, p.stride_c, count, self._compute_type(name), cublas.GEMM_DEFAULT)

    def _compute_type(self, name: str) -> int:
        if name in ("float64", "complex128"):
            return cublas.COMPUTE_64F
        tf32 = self.tf32 and name not in _SIXTEEN
        return cublas.COMPUTE_32F_FAST_TF32 if tf32 else cublas.COMPUTE_32F

    def _scalar(self, dtype: Any, value: float) -> int:
        """The address of a number on the host, a multiple of 16, which stays there."""
        found = self._scalars.get((dtype, value))
        if found is None:
            room = np.zeros(32, np.uint8)
            start = -int(room.ctypes.data) % 16
            room[start:start + np.dtype(dtype).itemsize].view(dtype)[:] = value
            found = self._scalars[dtype, value] = (int(room.ctypes.data) + start, room)
        return int(found[0])

    def _go_to(self, stream: int) -> None:
        """Let the handle's work go to a stream."""
        if stream == self._stream:
            return
        address, size, _ = self._workspace(stream)
        self._binding.set_stream(self._handle, stream)
        self._binding.set_workspace(self._handle, address, size)
        self._stream = stream

    def _workspace(self, stream: int | None = None) -> tuple[int, int, int]:
        """Address and size of a stream's workspace, and the stream; by default the current one."""
        stream = self._cp.cuda.get_current_stream().ptr if stream is None else stream
        size = self._binding.workspace
        if stream not in self._workspaces:
            self._workspaces[stream] = self._device.pool.malloc(size)
        return self._workspaces[stream].ptr, size, stream

    def _multiply_integers(self, a: Any, b: Any, out: Any, alpha: float, beta: float) -> Any:
        batch, (m, n), k = out.shape[:-2], out.shape[-2:], a.shape[-1]
        if out.size:
            flat = [self._in_one_batch(x, batch) for x in (a, b)]
            plain = (alpha, beta) == (1, 0)
            whole = out if plain and out.flags.c_contiguous else self._cp.empty(out.shape, out.dtype)
            batches = whole.size // (m * n)
            blocks = min(batches * -(-m // TILE) * -(-n // TILE), 132 * 16)
            strides = [x.shape[-2] * x.shape[-1] if x.ndim > 2 else 0 for x in flat]
            self._device.kernels(INTEGER_MATMUL, "integer_matmul", T=TYPES[a.dtype.name])(
                (blocks,), (TILE, TILE), (*flat, whole, *map(np.int64, (batches, m, n, k, *strides))))
            if whole is not out:
                out[...] = whole if plain else whole * int(alpha) + out * int(beta)
        return out

    def _in_one_batch(self, x: Any, batch: tuple[int, ...]) -> Any:
        """(all batches, rows, columns) in C order, or (rows, columns) where all batches share the matrix."""
        if x.size == x.shape[-2] * x.shape[-1]:
            return self._cp.ascontiguousarray(x.reshape(x.shape[-2:]))
        return self._copied(x, (*batch, *x.shape[-2:])).reshape(-1, *x.shape[-2:])

    # --- layers -----------------------------------------------------------------------------------------

    def linear(self, x: Any, w: Any, b: Any = None, out: Any = None) -> Any:
        """x (..., in) @ w (out, in) transposed, plus b (out,): the bias is added before rounding to 16 bits.
        """
        if out is None:
            out = self._cp.empty((*x.shape[:-1], w.shape[0]), x.dtype)
        rows, to = (x, out) if x.ndim > 1 else (x[None, :], out[None, :])
        if b is None:
            self.gemm(rows, w, to, transpose_b=True)
        elif not self.finished(as_rows(x), w.T, out, BIAS, bias=b):
            to[...] = b
            self.gemm(rows, w, to, transpose_b=True, beta=1.0)
        return out

    def weight_and_bias_grad(self, g: Any, x: Any, by_weight: Any = None,
                             by_bias: Any = None) -> tuple[Any, Any]:
        """g (..., n), x (..., k): sums over all rows of g[..., n] x[..., k], (n, k), and of g, (n,)."""
        g, x = as_rows(g), as_rows(x)
        by_weight = self._cp.empty((g.shape[1], x.shape[1]), g.dtype) if by_weight is None else by_weight
        by_bias = self._cp.empty(g.shape[1:], g.dtype) if by_bias is None else by_bias
        if not self.finished(g.T, x, by_weight, BGRADB, bias=by_bias):
            self.gemm(g, x, by_weight, transpose_a=True)
            self.gemm(self._cp.ones((1, len(g)), g.dtype), g, by_bias[None, :])
        return by_weight, by_bias

    def finished(self, a: Any, b: Any, out: Any, epilogue: int, **operands: Any) -> bool:
        """Compute out = a @ b with an epilogue (see Lt.find), where out (..., n) has as many rows as the
        matrix a; False if nothing was done, because cublasLt cannot.
        """
        if self.lt is None or not out.flags.c_contiguous:
            return False
        call = self.lt.find(a, b, as_rows(out), epilogue, tf32=self.tf32, **operands)
        if call is None:
            return False
        self.lt.run(call)
        return True
