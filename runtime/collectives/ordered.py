"""A reduction over the ranks' addends on a device, in rank order: what NCCL does not offer."""

from __future__ import annotations

from typing import Any

import numpy as np

from meshtape.runtime.collectives.base import Array
from meshtape.runtime.collectives.reduction import UFUNCS, accumulator


def reduce_stack(xp: Any, stack: Array, op: str, out: Array) -> None:
    """out = stack[0] op stack[1] op ..., left to right; `out` is not part of the stack.

    16-bit floats are reduced as float32 and rounded once.
    """
    narrow = stack.dtype.name in ("float16", "bfloat16")
    wide = np.dtype(np.float32) if narrow else accumulator(stack.dtype, op)
    total = stack[0].astype(wide)       # a copy
    for part in stack[1:]:
        part = part.astype(wide, copy=False)
        if op == "prod" and wide.kind == "c":
            total = _product(xp, total, part)
        else:
            function = getattr(xp, UFUNCS[op].__name__)
            function(total, part, out=total)
    out[...] = total.astype(out.dtype, copy=False)


def _product(xp: Any, a: Array, b: Array) -> Array:
    """a * b with every product and sum rounded, as on the host."""
    out = xp.empty_like(a)
    out.real = a.real * b.real - a.imag * b.imag
    out.imag = a.real * b.imag + a.imag * b.real
    return out
