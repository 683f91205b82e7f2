"""cupyx.scipy.special of the emulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from emulator.array import dtype_of, run


def erf(x: Any) -> Any:
    """The loops of CuPy's: float32 and float64; float16 gives float64."""
    if dtype_of(x.dtype).kind == "V":
        raise TypeError("Wrong type (bfloat16) of arguments for cupyx_scipy_special_erf")
    kind = np.float32 if x.dtype == np.float32 else np.float64
    return run(lambda a: np.vectorize(math.erf, otypes=[kind])(a) if a.size else a.astype(kind), x)
