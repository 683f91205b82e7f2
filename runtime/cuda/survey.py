"""Facts about CUDA on this machine, for `meshtape doctor`: gathered without judging."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from meshtape.runtime.cuda import nvml
from meshtape.runtime.gpu import Gpu, describe

# Distributions whose names begin so have to do with GPUs.
WHEELS = ("cupy", "nvidia-nccl", "nvidia-cudnn", "nvmath-python", "ml-dtypes")
DEVICES = Path("/dev")


class Survey(NamedTuple):
    """What was found. `wheels` are versions of distributions by name (with "-", in lower case), `closed` the
    device files that this user may not open, `visible` is CUDA_VISIBLE_DEVICES. The rest is CuPy's: `trouble`
    is why it cannot be used, `runtime` the CUDA that it runs (13020 for 13.2), `nccl` the version of the NCCL
    that it loads (22803 for 2.28.3), `cudnn` that of cuDNN (91300 for 9.13.0), `gpus` those that CUDA shows
    to this process.
    """

    driver: nvml.Driver
    wheels: Mapping[str, str]
    device_files: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    visible: str | None = None
    trouble: str = ""
    runtime: int = 0
    nccl: int = 0
    cudnn: int = 0
    gpus: tuple[Gpu, ...] = ()


def survey() -> Survey:
    """Look around."""
    files = tuple(sorted(str(f) for f in DEVICES.glob("nvidia[0-9]*"))) + tuple(
        str(f) for f in (DEVICES / "nvidiactl", DEVICES / "nvidia-uvm") if f.exists())
    closed = tuple(f for f in files if not os.access(f, os.R_OK | os.W_OK))
    found = Survey(nvml.driver(), wheels(), files, closed, os.environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as error:
        return found._replace(trouble=str(error).strip().split("\n")[0])
    try:
        gpus = tuple(describe(k) for k in range(cupy.cuda.runtime.getDeviceCount()))
        trouble = ""
    except cupy.cuda.runtime.CUDARuntimeError as error:
        gpus, trouble = (), str(error)
    return found._replace(trouble=trouble, gpus=gpus, runtime=cupy.cuda.runtime.runtimeGetVersion(),
                          nccl=nccl.get_version() if nccl.available else 0, cudnn=cudnn_version())


def cudnn_version() -> int:
    """The cuDNN that the frontend finds (91300 for 9.13.0); 0 without either."""
    from meshtape.runtime.cuda.libraries import find_cudnn
    cudnn = find_cudnn()
    return 0 if cudnn is None else int(cudnn.backend_version())


def wheels() -> dict[str, str]:
    """The installed distributions that have to do with GPUs."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.name or "").lower().replace("_", "-")
        if name.startswith(WHEELS):
            found[name] = distribution.version
    return dict(sorted(found.items()))
