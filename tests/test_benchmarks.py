"""The benchmark programs run, in small, and the page is made of what they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Sizes and contenders that take a moment.
SMALL = {
    "machine": ["--contenders", "1"],
    "train_step": ["--tiny", "--models", "charlm", "--contenders", "mesh1"],
    "arrays": ["--shrink", "4096", "--cases", "chain", "--contenders", "numpy,mesh1"],
    "all_reduce": ["--largest", "4096", "--contenders", "threads,shm"],
    "controller": ["--workers", "2", "--models", "mlp64", "--contenders", "mesh1"],
    "record": [],
}


def test_every_program_runs_and_the_page_is_made_of_their_figures(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    running = [subprocess.Popen([sys.executable, BENCHMARKS / f"{name}.py", "--rounds", "4", *options,
                                 "--json", tmp_path / "figures" / f"{name}.json"],
                                cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
               for name, options in SMALL.items()]
    for process in running:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    report = subprocess.run([sys.executable, BENCHMARKS / "report.py", "--figures", tmp_path / "figures",
                             "--out", tmp_path / "page"], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "page" / "cpu.md").read_text()
    assert "| charlm |" in page
    assert all((tmp_path / "page" / plot).stat().st_size for plot in (
        "train_step.png", "scaling.png", "arrays.png", "all_reduce.png", "controller.png"))


def test_the_gpus_program_runs_on_a_cpu_and_makes_its_page(tmp_path):
    pytest.importorskip("torch")
    run = subprocess.run([sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--rounds", "1",
                          "--cases", "mlp,chain", "--contenders", "mesh,torch,copy",
                          "--json", tmp_path / "gpu.json", "--page", tmp_path / "gpu.md"],
                         capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert {case: set(found["seconds"]) for case, found in figures.items()} == {
        "mlp": {"mesh", "torch"}, "chain": {"mesh", "torch", "copy"}}
    page = (tmp_path / "gpu.md").read_text()
    assert "on a CPU: " in page and "| chain | mesh " in page and "| not measured yet |" in page


def test_the_gpus_page_is_what_its_program_writes(tmp_path, monkeypatch):
    """Also while there are no figures."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _gpu_page import INTRODUCTION, page

    kept = (BENCHMARKS.parent / "docs" / "benchmarks" / "gpu.md").read_text()
    assert kept.startswith(INTRODUCTION) and (kept == page({}) or "Measured on 2" in kept)


def test_both_libraries_compute_the_same_losses(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _models import TINY
    from _training import meshtape_run, torch_run

    for model in TINY.values():
        ours, theirs = meshtape_run(model), torch_run(model)
        np.testing.assert_allclose([ours(1) for _ in range(3)], [theirs(1) for _ in range(3)], rtol=1e-4)
