"""How float32 products are computed, and the dtypes that ops compute in inside autocast()."""

from __future__ import annotations

from meshtape.autograd.autocast import autocast
from meshtape.scheduler import current

PRECISIONS = ("highest", "high", "medium")


def set_float32_matmul_precision(precision: str) -> None:
    """How products of float32 matrices are computed from now on, on any mesh.

    "highest": in float32. "high" and "medium": on GPUs with TF32 (10 bits of mantissa, sums in float32). CPUs
    always compute in float32. Raises ValueError.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"set_float32_matmul_precision: {precision!r} given; use one of {PRECISIONS}")
    current.set_precision(precision)


def get_float32_matmul_precision() -> str:
    """What set_float32_matmul_precision was given last; "highest" before."""
    return current.precision


__all__ = ["autocast", "get_float32_matmul_precision", "set_float32_matmul_precision"]
