"""cuBLAS of the emulation: the functions of meshtape.runtime.cuda.cublas.Cublas on host memory.

Strict where the real one is silent: a product needs a workspace (lost when the stream is set, and filled with
garbage by every product), must go to the stream that is current, and handles are made outside of captures.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import ml_dtypes
import numpy as np

from emulator.memory import bytes_at
from emulator.order import READ, WRITE
from emulator.streams import current_stream, forbidden, work
from meshtape.runtime.cuda import cublas
from meshtape.runtime.cuda.cublas import CublasError

DTYPES = {0: np.dtype("f4"), 1: np.dtype("f8"), 2: np.dtype("f2"), 4: np.dtype("c8"), 5: np.dtype("c16"),
          14: np.dtype(ml_dtypes.bfloat16)}
# compute type -> (A and B, C) that cublasGemmEx takes with it
TAKES = {68: {(2, 2), (2, 0), (14, 14), (14, 0), (0, 0), (4, 4)}, 77: {(0, 0), (4, 4)}, 70: {(1, 1), (5, 5)}}


class Handle:
    def __init__(self) -> None:
        self.stream = 0
        self.workspace: tuple[int, int] | None = None
        self.math_mode = 0


class Cublas:
    """See runtime.cuda.cublas.Cublas. `calls` counts the products, `modes` are their compute types."""

    workspace = 4096

    def __init__(self) -> None:
        self.handles: dict[int, Handle] = {}
        self.calls = 0
        self.modes: list[int] = []
        self._numbers = itertools.count(1000)

    def create(self) -> int:
        forbidden("cublasCreate")
        name = next(self._numbers)
        self.handles[name] = Handle()
        return name

    def destroy(self, handle: int) -> None:
        forbidden("cublasDestroy")
        del self.handles[handle]

    def set_stream(self, handle: int, stream: int) -> None:
        self.handles[handle].stream = stream
        self.handles[handle].workspace = None

    def set_workspace(self, handle: int, address: int, size: int) -> None:
        if address % 256:
            raise CublasError("cublasSetWorkspace failed: CUBLAS_STATUS_INVALID_VALUE")
        self.handles[handle].workspace = address, size

    def set_math_mode(self, handle: int, mode: int) -> None:
        self.handles[handle].math_mode = mode

    def gemm_ex(self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int,
                a_type: int, lda: int, stride_a: int, b: int, b_type: int, ldb: int, stride_b: int, beta: int,
                c: int, c_type: int, ldc: int, stride_c: int, count: int, compute: int, algo: int) -> None:
        state = self.handles[handle]
        assert state.stream == current_stream().ptr, "the handle's stream is not the current one"
        assert state.workspace is not None, "no workspace: cublasSetStream forgets it"
        rows_a, cols_a = (k, m) if transa else (m, k)
        rows_b, cols_b = (n, k) if transb else (k, n)
        if (min(m, n, k) < 0 or lda < max(1, rows_a) or ldb < max(1, rows_b) or ldc < max(1, m) or count < 0
                or algo != cublas.GEMM_DEFAULT or not {transa, transb} <= {0, 1}):
            raise CublasError("cublasGemmEx failed: CUBLAS_STATUS_INVALID_VALUE")
        if a_type != b_type or (a_type, c_type) not in TAKES.get(compute, ()):
            raise CublasError("cublasGemmEx failed: CUBLAS_STATUS_NOT_SUPPORTED")
        wide = scale_type(compute, a_type)
        scale, keep = scalar(alpha, wide), scalar(beta, wide)
        workspace = state.workspace
        self.modes.append(compute)

        def multiply() -> None:
            self.calls += 1
            bytes_at(*workspace)[:] = 0xFF
            for i in range(count):
                left = matrix(a, a_type, rows_a, cols_a, lda, i * stride_a).astype(wide)
                right = matrix(b, b_type, rows_b, cols_b, ldb, i * stride_b).astype(wide)
                out = matrix(c, c_type, m, n, ldc, i * stride_c)
                found = scale * ((left.T if transa else left) @ (right.T if transb else right))
                out[...] = found if keep == 0 else found + keep * out.astype(wide)

        last = max(0, count - 1)
        work(multiply, touches=[
            (a, extent(a_type, rows_a, cols_a, lda, last * stride_a), READ),
            (b, extent(b_type, rows_b, cols_b, ldb, last * stride_b), READ),
            (c, extent(c_type, m, n, ldc, last * stride_c), WRITE), (*workspace, WRITE)])


def scale_type(compute: int, data: int) -> Any:
    """The dtype of alpha and beta, in which everything is summed."""
    wide = np.dtype("f8") if compute == cublas.COMPUTE_64F else np.dtype("f4")
    return np.result_type(wide, np.complex64) if data in (4, 5) else wide


def scalar(address: int, dtype: Any) -> Any:
    """A number on the host."""
    return np.frombuffer(ctypes.string_at(address, dtype.itemsize), dtype)[0]


def extent(data: int, rows: int, cols: int, ld: int, offset: int = 0) -> int:
    """Bytes from the beginning of a column-major matrix to the end of one that lies `offset` behind it."""
    return (offset + ld * (cols - 1) + rows) * DTYPES[data].itemsize if rows and cols else 0


def matrix(address: int, data: int, rows: int, cols: int, ld: int, offset: int = 0) -> Any:
    """A column-major matrix at an address."""
    dtype = DTYPES[data]
    step = dtype.itemsize
    size = ld * (cols - 1) + rows if rows and cols else 0
    assert address % step == 0
    raw = bytes_at(address + offset * step, size * step).view(dtype)
    return np.lib.stride_tricks.as_strided(raw, (rows, cols), (step, ld * step))
