"""Products with what follows them in one kernel, by cublasLt (nvmath.bindings.cublasLt): bias, ReLU, GELU,
and their gradients.

A matrix product takes a plan of runtime.cuda.gemm. In cuBLAS's column-major terms a row-major result is the
transpose: its rows are our columns, so a bias for each of our columns is one for each of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.cuda import cublas
from meshtape.runtime.cuda.gemm import Plan, plan

# cublasLtEpilogue_t
BIAS, RELU_BIAS, RELU_AUX_BIAS, GELU_BIAS, GELU_AUX_BIAS = 4, 6, 134, 36, 164
DRELU, DRELU_BGRAD, DGELU, DGELU_BGRAD, BGRADB = 136, 152, 192, 208, 512
# cublasLtMatmulDescAttributes_t, cublasLtMatmulPreferenceAttributes_t
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD = 3, 4, 7, 8, 11, 12
MAX_WORKSPACE_BYTES, REDUCTION_SCHEME_MASK, MIN_ALIGNMENT = 1, 3, (5, 6, 7, 8)
REDUCED_IN_COMPUTE_TYPE = 2     # of cublasLtReductionScheme_t: parts of a sum are kept in float32
NOT_SUPPORTED = 15              # of cublasStatus_t

DTYPES = ("float16", "bfloat16", "float32")
MASK_LD = 128               # bits; rows of ReLU's bit mask are a multiple of this


class Problem(NamedTuple):
    """What decides how a product is computed. `aligned` are the bytes that divide the addresses of cuBLAS's
    A, B, D, of the bias and of the auxiliary matrix, `aux_ld` is that matrix's leading dimension."""

    plan: Plan
    kind: int
    compute: int
    epilogue: int
    aux_ld: int
    aligned: tuple[int, ...]


class Algorithm(NamedTuple):
    """How a problem is computed: descriptors of cublasLt, and the address of the chosen algorithm (kept alive
    by `result`)."""

    plan: Plan
    desc: int
    layouts: tuple[int, int, int]
    algo: int
    result: Any


class Call(NamedTuple):
    """A product that was found an algorithm for, and its operands' addresses."""

    algorithm: Algorithm
    a: int
    b: int
    d: int
    bias: int
    aux: int


class Lt:
    """Products with epilogues, of float32 and 16-bit matrices, summed in float32, on the current stream.

    `workspace()` gives address and size of memory for the current stream; `scalar(dtype, value)` the address
    of a number on the host. Algorithms are chosen once for each problem by cublasLt's heuristic, which only
    asks the host, so equal calls are computed alike, in a graph too.
    """

    def __init__(self, lt: Any, workspace: Callable[[], tuple[int, int, int]],
                 scalar: Callable[[Any, float], int]) -> None:
        self._lt = lt
        self._workspace, self._scalar = workspace, scalar
        self._handle = lt.create()
        self._found: dict[Problem, Algorithm | None] = {}

    def close(self) -> None:
        """Give the handle back."""
        self._lt.destroy(self._handle)

    def find(self, a: Any, b: Any, out: Any, epilogue: int, *, bias: Any = None, aux: Any = None,
             aux_ld: int = 0, tf32: bool = False) -> Call | None:
        """How to compute out (m, n) = a (m, k) @ b (k, n) with an epilogue; None if cublasLt cannot.

        All are of one dtype, `out` is in C order. `bias` (n,) is added, or written by epilogues of gradients:
        the sum over the rows of out, or for BGRADB (m,) that over the columns of a. `aux` is ReLU's bit mask
        or the matrix before GELU, `aux_ld` bits or elements from row to row of it.
        """
        vectors = [x for x in (bias, aux) if x is not None]
        if out.dtype.name not in DTYPES or not all(x.flags.c_contiguous for x in (out, *vectors)) or any(
                x.dtype != out.dtype for x in (a, b, *vectors[:bias is not None])):
            return None
        found = plan(a.shape, a.strides, b.shape, b.strides, out.strides, a.itemsize)
        if len(found.calls) != 1 or found.copy_a or found.copy_b or not found.swapped or found.through:
            return None
        addresses = (b.data.ptr, a.data.ptr, out.data.ptr, 0 if bias is None else bias.data.ptr,
                     0 if aux is None else aux.data.ptr)
        compute = cublas.COMPUTE_32F_FAST_TF32 if tf32 and out.itemsize == 4 else cublas.COMPUTE_32F
        problem = Problem(found, cublas.DATA_TYPES[out.dtype.name], compute, epilogue, aux_ld,
                          tuple(map(alignment, addresses)))
        if problem not in self._found:
            self._found[problem] = self._choose(problem, addresses)
        algorithm = self._found[problem]
        return None if algorithm is None else Call(algorithm, *addresses)

    def run(self, call: Call) -> None:
        """Compute it."""
        algorithm = call.algorithm
        c, d = algorithm.layouts[2], call.d
        self._set_pointers(algorithm.desc, call.bias, call.aux)
        one, zero = self._scalar(np.float32, 1.0), self._scalar(np.float32, 0.0)
        address, size, stream = self._workspace()
        self._lt.matmul(self._handle, algorithm.desc, one, call.a, algorithm.layouts[0], call.b,
                        algorithm.layouts[1], zero, d, c, d, c, algorithm.algo, address, size, stream)

    def _choose(self, problem: Problem, addresses: tuple[int, ...]) -> Algorithm | None:
        """cublasLt's first choice; None if it supports no such problem."""
        lt, p = self._lt, problem.plan
        desc = lt.matmul_desc_create(problem.compute, cublas.DATA_TYPES["float32"])
        set_desc = lt.matmul_desc_set_attribute
        put(set_desc, desc, TRANSA, np.int32(p.transa))
        put(set_desc, desc, TRANSB, np.int32(p.transb))
        put(set_desc, desc, EPILOGUE, np.uint32(problem.epilogue))
        if problem.aux_ld:
            put(set_desc, desc, AUX_LD, np.int64(problem.aux_ld))
        self._set_pointers(desc, *addresses[3:])
        rows_a, cols_a = (p.k, p.m) if p.transa else (p.m, p.k)
        rows_b, cols_b = (p.n, p.k) if p.transb else (p.k, p.n)
        layouts = (lt.matrix_layout_create(problem.kind, rows_a, cols_a, p.lda),
                   lt.matrix_layout_create(problem.kind, rows_b, cols_b, p.ldb),
                   lt.matrix_layout_create(problem.kind, p.m, p.n, p.ldc))
        result = np.zeros(1, lt.matmul_heuristic_result_dtype)
        if self._ask(desc, layouts, problem.aligned, result):
            return Algorithm(p, desc, layouts, int(result.ctypes.data), result)
        for layout in layouts:
            lt.matrix_layout_destroy(layout)
        lt.matmul_desc_destroy(desc)
        return None

    def _ask(self, desc: int, layouts: tuple[int, int, int], aligned: tuple[int, ...], result: Any) -> bool:
        """Let the heuristic write its first choice to `result`; False if it has none."""
        lt = self._lt
        preference = lt.matmul_preference_create()
        put(lt.matmul_preference_set_attribute, preference, MAX_WORKSPACE_BYTES,
            np.uint64(self._workspace()[1]))
        put(lt.matmul_preference_set_attribute, preference, REDUCTION_SCHEME_MASK,
            np.uint32(REDUCED_IN_COMPUTE_TYPE))
        a, b, d = aligned[:3]
        for attribute, bytes_ in zip(MIN_ALIGNMENT, (a, b, d, d), strict=True):
            put(lt.matmul_preference_set_attribute, preference, attribute, np.uint32(bytes_))
        count = np.zeros(1, np.int32)
        try:
            lt.matmul_algo_get_heuristic(self._handle, desc, layouts[0], layouts[1], layouts[2], layouts[2],
                                         preference, 1, result.ctypes.data, count.ctypes.data)
        except lt.cuBLASLtError as error:
            if error.status != NOT_SUPPORTED:
                raise
        finally:
            lt.matmul_preference_destroy(preference)
        return bool(count[0] and result["state"][0] == 0)

    def _set_pointers(self, desc: int, bias: int, aux: int) -> None:
        if bias:
            put(self._lt.matmul_desc_set_attribute, desc, BIAS_POINTER, np.uint64(bias))
        if aux:
            put(self._lt.matmul_desc_set_attribute, desc, AUX_POINTER, np.uint64(aux))


def put(function: Callable[..., None], desc: int, attribute: int, value: Any) -> None:
    """Set an attribute, whose value cublasLt copies from memory."""
    held = np.array([value])
    function(desc, attribute, held.ctypes.data, held.nbytes)


def alignment(address: int) -> int:
    """The largest power of two, up to 256, that divides an address (256 for none)."""
    return min(address & -address, 256) if address else 256
