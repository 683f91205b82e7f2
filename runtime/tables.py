"""Small tables of numbers that kernels need beside their inputs, made on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def tables(xp: Any, make: Callable[..., tuple[np.ndarray[Any, Any], ...]], *args: Any) -> tuple[Any, ...]:
    """The arrays make(*args), where `xp` computes; a device keeps them, so that graphs find them in place.

    `args` are hashable and say all that the tables depend on; nobody writes to the result.
    """
    found: tuple[Any, ...] = make(*args) if xp is np else xp.tables(make, *args)
    return found
