"""Products of matrices of few rows and very many columns on a CPU.

OpenBLAS copies its operands into panels first, which takes as long as multiplying by a few rows. Small
products it does in place where it has kernels for AVX-512 (see runtime/panels.py), so that pieces are faster:
32 x 576 by 576 x 1024 at 149 instead of 95 GFLOP/s on a Zen 5 core.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meshtape.runtime.blas import blas_core
from meshtape.runtime.panels import CORES

ROWS = 48               # up to which pieces are faster
IN_PLACE = 10 ** 6      # multiplications up to which OpenBLAS does not copy operands
BLOCK = 64              # columns of a piece, at least
RESULTS = 1200          # elements of a product up to which sums in pieces are faster


def multiply(left: Any, right: Any, out: Any) -> None:
    """out = left @ right for stacks of matrices (groups, rows, inner) and (groups, inner, columns)."""
    rows, inner = left.shape[1:]
    if not 1 < rows <= ROWS or rows * inner * right.shape[2] <= IN_PLACE or blas_core() not in CORES:
        np.matmul(left, right, out=out)
        return
    parts = -(-rows * inner * BLOCK // IN_PLACE)
    step = -(-inner // parts)
    _multiply_by_blocks(left[:, :, :step], right[:, :step], out)
    for at in range(step, inner, step):
        addend = np.empty_like(out)
        _multiply_by_blocks(left[:, :, at:at + step], right[:, at:at + step], addend)
        out += addend


def inner_products(left: Any, right: Any) -> Any:
    """left @ right' for stacks of matrices (groups, rows, inner) and (groups, columns, inner)."""
    if left.shape[1] < right.shape[1]:          # BLAS is faster with more rows than columns
        return inner_products(right, left).swapaxes(1, 2)
    inner, results = left.shape[2], left.shape[1] * right.shape[1]
    right = right.swapaxes(1, 2)
    if not 0 < results <= RESULTS or results * inner <= IN_PLACE or blas_core() not in CORES:
        return np.matmul(left, right)
    step = max(1, IN_PLACE // results)
    step = -(-inner // -(-inner // step))
    total = np.matmul(left[:, :, :step], right[:, :step])
    for at in range(step, inner, step):
        total += np.matmul(left[:, :, at:at + step], right[:, at:at + step])
    return total


def _multiply_by_blocks(left: Any, right: Any, out: Any) -> None:
    (groups, rows, inner), columns = left.shape, right.shape[2]
    width = BLOCK
    while width < 512 and 2 * width * rows * inner <= IN_PLACE:
        width *= 2
    many = columns // width
    cut = many * width
    if many:
        blocks = right[:, :, :cut].reshape(groups, inner, many, width).swapaxes(1, 2)
        target = out[:, :, :cut].reshape(groups, rows, many, width).swapaxes(1, 2)
        np.matmul(left[:, None], blocks, out=target)
    if cut < columns:
        np.matmul(left, right[:, :, cut:], out=out[:, :, cut:])
