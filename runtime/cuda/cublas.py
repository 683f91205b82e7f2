"""cuBLAS through ctypes: the few functions that products need, on handles of our own.

CuPy's binding refuses to work while a stream is captured, and casts and copies operands. cuBLAS itself can be
captured if its stream and workspace were set before. Signatures are those of cublas_api.h (CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_int64, c_longlong, c_size_t, c_void_p
from typing import Any

from meshtape.runtime.errors import MeshtapeError

# cublasStatus_t
STATUS = {1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH",
          11: "MAPPING_ERROR", 13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED",
          16: "LICENSE_ERROR"}
# cublasOperation_t, cudaDataType, cublasComputeType_t, cublasMath_t, cublasGemmAlgo_t
OP_N, OP_T = 0, 1
DATA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "complex64": 4, "complex128": 5, "bfloat16": 14}
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77
DISALLOW_REDUCED_PRECISION_REDUCTION = 16
GEMM_DEFAULT = -1

WORKSPACE = 32 << 20        # bytes that NVIDIA advises for Hopper; elsewhere 4 MiB would do
INT_MAX = 2**31 - 1

SIZE = object()             # an argument that is int here and int64_t in the function with "_64"
ARGUMENTS = {
    "cublasGemmEx": (
        c_void_p, c_int, c_int, SIZE, SIZE, SIZE, c_void_p, c_void_p, c_int, SIZE, c_void_p, c_int, SIZE,
        c_void_p, c_void_p, c_int, SIZE, c_int, c_int),
    "cublasGemmStridedBatchedEx": (
        c_void_p, c_int, c_int, SIZE, SIZE, SIZE, c_void_p, c_void_p, c_int, SIZE, c_longlong, c_void_p,
        c_int, SIZE, c_longlong, c_void_p, c_void_p, c_int, SIZE, c_longlong, SIZE, c_int, c_int),
}


class CublasError(MeshtapeError):
    """A call of cuBLAS failed."""


class Cublas:
    """The functions, on addresses given as integers. Every one raises CublasError.

    `workspace` is how many bytes a handle's workspace should have.
    """

    workspace = WORKSPACE

    def __init__(self, library: ctypes.CDLL) -> None:
        self._create = _bound(library, "cublasCreate_v2", POINTER(c_void_p))
        self._destroy = _bound(library, "cublasDestroy_v2", c_void_p)
        self._set_stream = _bound(library, "cublasSetStream_v2", c_void_p, c_void_p)
        self._set_workspace = _bound(library, "cublasSetWorkspace_v2", c_void_p, c_void_p, c_size_t)
        self._set_math_mode = _bound(library, "cublasSetMathMode", c_void_p, c_int)
        self._gemm = _sized(library, "cublasGemmEx")
        self._batched = _sized(library, "cublasGemmStridedBatchedEx")

    def create(self) -> int:
        """A handle for the current device. Takes device memory; not inside a capture."""
        handle = c_void_p()
        _check("cublasCreate", self._create(byref(handle)))
        return handle.value or 0

    def destroy(self, handle: int) -> None:
        _check("cublasDestroy", self._destroy(handle))

    def set_stream(self, handle: int, stream: int) -> None:
        """Where work goes from now on. cuBLAS forgets the workspace by this."""
        _check("cublasSetStream", self._set_stream(handle, stream))

    def set_workspace(self, handle: int, address: int, size: int) -> None:
        """`size` bytes, aligned to 256, that no other stream's handle uses."""
        _check("cublasSetWorkspace", self._set_workspace(handle, address, size))

    def set_math_mode(self, handle: int, mode: int) -> None:
        _check("cublasSetMathMode", self._set_math_mode(handle, mode))

    def gemm_ex(self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int,
                a_type: int, lda: int, stride_a: int, b: int, b_type: int, ldb: int, stride_b: int, beta: int,
                c: int, c_type: int, ldc: int, stride_c: int, count: int, compute: int, algo: int) -> None:
        """C[i] = alpha op(A[i]) op(B[i]) + beta C[i] for i < count, with column-major matrices.

        Strides are in elements. `alpha` and `beta` are addresses on the host, of the compute type (complex
        where the operands are).
        """
        wide = max(m, n, k, lda, ldb, ldc, count) > INT_MAX
        if count == 1:
            status = self._gemm[wide](handle, transa, transb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb,
                                      beta, c, c_type, ldc, compute, algo)
        else:
            status = self._batched[wide](handle, transa, transb, m, n, k, alpha, a, a_type, lda, stride_a, b,
                                         b_type, ldb, stride_b, beta, c, c_type, ldc, stride_c, count,
                                         compute, algo)
        if status:
            _check(f"cublasGemmEx ({m} x {n} x {k}, {count} times, leading dimensions {lda}, {ldb}, {ldc})",
                   status)


def _bound(library: ctypes.CDLL, name: str, *argtypes: Any) -> Any:
    found = getattr(library, name)
    found.argtypes, found.restype = argtypes, c_int
    return found


def _sized(library: ctypes.CDLL, name: str) -> tuple[Any, Any]:
    """The function with sizes of 32 bits, and that with 64."""
    narrow = [c_int if kind is SIZE else kind for kind in ARGUMENTS[name]]
    wide = [c_int64 if kind is SIZE else kind for kind in ARGUMENTS[name]]
    return _bound(library, name, *narrow), _bound(library, f"{name}_64", *wide)


def _check(what: str, status: int) -> None:
    if status:
        raise CublasError(f"{what} failed: CUBLAS_STATUS_{STATUS.get(status, status)}")


def load() -> Cublas:
    """The cuBLAS that CuPy uses: what is loaded already, or else found in NVIDIA's wheels, by the system's
    loader, or under CUDA_PATH, in the order of cuda.pathfinder (a dependency of CuPy 14). Raises CublasError.
    """
    from cuda import pathfinder
    try:
        path = pathfinder.load_nvidia_dynamic_lib("cublas").abs_path
    except pathfinder.DynamicLibNotFoundError as error:
        raise CublasError(f"libcublas cannot be found ({error}); pip install nvidia-cublas, or set CUDA_PATH "
                          f"to a CUDA toolkit") from error
    return Cublas(ctypes.CDLL(path))
