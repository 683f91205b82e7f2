"""meshtape: define-by-run tensors on a cluster of GPUs.

One Python program sees whole tensors; a scheduler splits every operation over workers (Ray actors, threads,
or this process), and one tape in the program takes gradients of all of it.
"""

from __future__ import annotations

import importlib
from typing import Any

from meshtape import methods as _methods
from meshtape.autograd import Tensor, checkpoint, grad
from meshtape.autograd.foreign import as_cupy, from_cupy
from meshtape.contraction import *  # noqa: F403
from meshtape.creation import *  # noqa: F403
from meshtape.elementwise import *  # noqa: F403
from meshtape.explain import explain, visualize
from meshtape.gradmode import enable_grad, is_grad_enabled, no_grad, set_grad_enabled
from meshtape.manipulation import *  # noqa: F403
from meshtape.precision import autocast, get_float32_matmul_precision, set_float32_matmul_precision
from meshtape.profiling import profile, stats
from meshtape.reductions import *  # noqa: F403
from meshtape.runtime.dtypes import (
    bool_,
    complex64,
    complex128,
    float16,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
)
from meshtape.runtime.errors import (
    DTypeError,
    GradError,
    LayoutError,
    MeshError,
    MeshtapeError,
    SessionClosed,
    ShapeError,
    StateError,
    WorkerError,
    WorkerLost,
)
from meshtape.scheduler.layout import Layout, Partial, Replicate, Shard
from meshtape.session import (
    current_mesh,
    device_count,
    doctor,
    flush,
    init,
    manual_seed,
    shutdown,
    synchronize,
)

_methods.install()

__version__ = "0.1.0"
__array_api_version__ = "2024.12"

e, pi, inf, nan, newaxis = 2.718281828459045, 3.141592653589793, float("inf"), float("nan"), None

_LAZY = {"amp", "nn", "optim", "data", "random"}
_LAZY_NAMES = {"save": "checkpoint_file", "load": "checkpoint_file", "load_metadata": "checkpoint_file"}


def __getattr__(name: str) -> Any:
    """Submodules are imported when first asked for, so that `import meshtape` stays quick."""
    if name in _LAZY:
        return importlib.import_module(f"meshtape.{name}")
    if name in _LAZY_NAMES:
        found = getattr(importlib.import_module(f"meshtape.{_LAZY_NAMES[name]}"), name)
        globals()[name] = found
        return found
    if name == "bfloat16":
        from meshtape.runtime.dtypes import bfloat16
        return bfloat16()
    raise AttributeError(f"module 'meshtape' has no attribute {name!r}")
