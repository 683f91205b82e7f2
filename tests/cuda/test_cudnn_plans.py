"""The real cuDNN plans all our graphs for an H200; neither a GPU nor a driver is needed, cuDNN is."""

from __future__ import annotations

import ctypes.util
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_cudnn_has_a_plan_for_every_graph(tmp_path: Path) -> None:
    if importlib.util.find_spec("cudnn") is None or importlib.util.find_spec("nvidia.cudnn") is None:
        pytest.skip("cuDNN is not installed: nvidia-cudnn-frontend and nvidia-cudnn-cu13")
    if ctypes.util.find_library("cuda"):
        pytest.skip("there is a CUDA driver, whose place would have to be taken")
    program = Path(__file__).with_name("plan_with_cudnn.py")
    run = subprocess.run([sys.executable, str(program), str(tmp_path)], text=True, capture_output=True)
    last = run.stdout.strip().splitlines()[-1:]
    assert last and last[0].endswith(" planned, 0 refused"), run.stdout[-3000:] + run.stderr[-3000:]
