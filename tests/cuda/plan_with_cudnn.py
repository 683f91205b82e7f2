"""Asks the real cuDNN, for an H200 that need not be there, for plans for all graphs of runtime.cuda.dnn.

    python plan_with_cudnn.py FOLDER

cuDNN plans and compiles for a device that is described to it in JSON; it wants to load its kernels as well,
into a libcuda that accepts everything, which is made in FOLDER with gcc. Prints a line for each graph that is
refused, and how many were planned. Needs nvidia-cudnn-frontend and nvidia-cudnn-cu13 or -cu12.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

H200 = {
    "deviceName": "NVIDIA H200", "cudaDeviceId": 0, "deviceVer": 900, "driverVer": 13000,
    "totalGlobalMem": 150754820096, "maxGridSize": [2147483647, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536, "multiProcessorCount": 132, "smCountOrigin": 0,
    "warpSize": 32, "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448,
    "oversizedSharedMemoryPerBlock": 0, "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536,
    "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "pciDeviceId": 0,
    "isTccDriver": 0, "supportCoopLaunch": 1, "smClockRateKHz": 1980000, "memClockRateKHz": 3201000,
    "memoryBusWidth": 6144, "l2CacheSize": 62914560}
# Functions that write a handle through their first argument; all others do nothing.
HANDLES = ("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuModuleLoadData",
           "cuModuleGetFunction")
OTHERS = (
    "cuGetErrorString", "cuGetErrorName", "cuModuleUnload", "cuTensorMapEncodeIm2col",
    "cuTensorMapEncodeTiled", "cuCtxGetCurrent", "cuCtxGetLimit", "cuCtxPopCurrent", "cuCtxPushCurrent",
    "cuStreamGetCtx", "cuLinkCreate", "cuLinkAddData", "cuLinkComplete", "cuLinkDestroy", "cuDeviceGetCount",
    "cuDeviceGet", "cuLibraryLoadFromFile", "cuLibraryUnload", "cuKernelSetAttribute", "cuKernelGetAttribute",
    "cuOccupancyMaxPotentialClusterSize", "cuLaunchKernel", "cuLaunchCooperativeKernel", "cuLaunchKernelEx")

def libcuda(folder: Path) -> None:
    """A libcuda.so.1 for which everything succeeds."""
    code = "static char found[4096];\nint cuDriverGetVersion(int* v) { *v = 13000; return 0; }\n"
    code += "".join(f"int {name}(void** p) {{ *p = found; return 0; }}\n" for name in HANDLES)
    code += "".join(f"int {name}(void** p) {{ return 0; }}\n" for name in OTHERS)
    (folder / "cuda.c").write_text(code)
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o",
                    str(folder / "libcuda.so.1"), str(folder / "cuda.c")], check=True)


def folders() -> list[str]:
    """Where NVIDIA's wheels keep libraries."""
    spec = importlib.util.find_spec("nvidia")
    return [str(folder) for root in (spec.submodule_search_locations or [] if spec else [])
            for folder in Path(root).glob("*/lib")]


def device() -> Any:
    """An emulated device whose cuDNN is the real one, for planning alone."""
    import cudnn
    import emulator

    from meshtape.runtime.cuda.device import Device
    properties = cudnn.create_device_properties(json.dumps(H200))

    class Graph(cudnn.pygraph):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "handle": None}, device_property=properties, sm_version=90)

        def check_support(self) -> None:
            """Asks the CUDA runtime for the current device."""

    names = ("data_type", "heur_mode", "numerical_note", "diagonal_alignment", "cudnnGraphNotSupportedError")
    library = SimpleNamespace(**{name: getattr(cudnn, name) for name in names}, pygraph=Graph,
                              create_handle=lambda: None)
    made = Device(emulator.libraries()._replace(cudnn=library))
    made.dnn.run = lambda plan, arrays: None
    return made


def main() -> None:
    import numpy as np
    import test_attention_kernels
    import test_dnn

    from meshtape.runtime.op import TABLE
    dev = device()
    with dev.active(), np.errstate(all="ignore"):
        for dtype in ("float32", "float16", "bfloat16"):
            for name in test_dnn.CONVOLUTIONS:
                for case in test_dnn.CASES.values():
                    arrays, attrs = test_dnn.given(name, *case, test_dnn.DTYPES[dtype])
                    TABLE[name].device.run(dev, *map(dev.cp.asarray, arrays), **attrs)
        for name in ("attention", "attention_grad"):
            for case in ("plain", "causal", "causal, fewer queries", "causal, later queries", "one query"):
                sample = test_attention_kernels.sample_of(name, case)
                given = test_attention_kernels.inputs(name, sample, test_dnn.DTYPES["bfloat16"])
                attrs = test_attention_kernels.attrs_of(name, sample.attrs)
                test_attention_kernels.run(dev, name, given, attrs)
    planned = sum(plan is not None for plan in dev.dnn._plans.values())
    for (key, _), reason in dev.dnn.refused.items():
        print("refused:", key, reason[:500].replace("\n", " "))
    print(planned, "planned,", len(dev.dnn.refused), "refused")
    sys.stdout.flush()
    os._exit(0)         # what cuDNN loaded cannot be unloaded from there


def restart(folder: Path) -> None:
    """This program again, with the libcuda made here, and the wheels' libraries, to be found."""
    libcuda(folder)
    here = Path(__file__).resolve()
    found = os.pathsep.join((str(folder), os.environ.get("LD_LIBRARY_PATH", ""), *folders()))
    path = os.pathsep.join((str(here.parent.parent), str(here.parent)))
    os.execve(sys.executable, [sys.executable, str(here)],
              {**os.environ, "LD_LIBRARY_PATH": found, "PYTHONPATH": path})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        restart(Path(sys.argv[1]))
    main()
