"""The CUDA libraries of this process, as one value that is passed around; tests pass an emulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from meshtape.runtime.errors import MeshError


class Libraries(NamedTuple):
    """`cupy` is CuPy itself, `cublas` our binding of cuBLAS (runtime.cuda.cublas), `special` is
    cupyx.scipy.special, `nccl` is cupy.cuda.nccl; `module(code, options)` compiles CUDA C++ for the current
    device and loads it (runtime.cuda.nvrtc).

    None where they are not installed: `cublaslt` (nvmath.bindings.cublasLt), `cudnn` (the cuDNN frontend),
    `nccl`.
    """

    cupy: Any
    cublas: Any
    special: Any
    module: Callable[[str, tuple[str, ...]], Any]
    nccl: Any = None
    cublaslt: Any = None
    cudnn: Any = None


def load() -> Libraries:
    """The real libraries. Raises MeshError if CuPy or a device is missing."""
    from meshtape.runtime.gpu import gpu_here
    name, reason = gpu_here()
    if not name:
        raise MeshError(f"no GPU can be used here: {reason}; run `meshtape doctor` for what to install")
    import cupy
    from cupy.cuda import nccl
    from cupyx.scipy import special

    from meshtape.runtime.cuda import cublas, nvrtc
    return Libraries(cupy, cublas.load(), special, nvrtc.module, nccl if nccl.available else None,
                     _cublaslt(), find_cudnn())


def _cublaslt() -> Any:
    """cublasLt by nvmath-python; None if that, or what it is imported with, is not installed."""
    try:
        from nvmath.bindings import cublasLt
    except ImportError:
        return None
    return cublasLt


def find_cudnn() -> Any:
    """The cuDNN frontend; None if that, or what it is imported with, or cuDNN itself is not installed."""
    try:
        import cudnn
    except ImportError:
        return None
    try:
        cudnn.backend_version()
    except RuntimeError as error:
        if "Unable to find symbol" in str(error):       # no libcudnn was found
            return None
        raise
    return cudnn
