"""Every example runs as a user runs it, and what it prints is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(script: str, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run an example with options; its exit code must be `code`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MESHTAPE_")}
    found = subprocess.run([sys.executable, str(EXAMPLES / script), *options], capture_output=True, text=True,
                           env=environment, timeout=110)
    assert found.returncode == code, found.stdout + found.stderr
    return found


@pytest.mark.parametrize("options", [("--backend", "inline"), ("--backend", "local", "--workers", "3")])
def test_gradients_by_hand_and_by_tape_agree(options):
    text = run("gradients.py", *options).stdout
    assert text.rstrip().endswith("The gradients agree.")
    assert all(f"d/d{name}" in text for name in "xyz")


@pytest.mark.ray
def test_digits_train_on_two_ray_workers(tmp_path):
    found = run("train_digits.py", "--workers", "2", "--epochs", "20", "--out", str(tmp_path))
    text = found.stdout
    assert "workers: 2 (ray, cpu)" in text and re.search(r"images .*Shard\(0\)", text)
    assert re.search(r"0\.weight .*Replicate\(\)", text)
    assert "all_reduce_bucket" in text and "adam_update" in text        # the plan of one step
    assert held_out_accuracy(text) >= 97.0
    assert "samples/s" in found.stderr and "loss=" in found.stderr      # the progress bar
    assert is_picture(tmp_path / "digits.png")


@pytest.mark.parametrize("workers", [1, 3])
def test_digits_train_on_threads_to_the_same_loss(workers, tmp_path):
    options = ("--backend", "local", "--epochs", "2", "--hidden", "32", "--out", str(tmp_path))
    text = run("train_digits.py", *options, "--workers", str(workers)).stdout
    alone = run("train_digits.py", *options[2:], "--backend", "inline").stdout
    assert losses(text) == pytest.approx(losses(alone), abs=2e-4)
    assert is_picture(tmp_path / "digits.png")


@pytest.mark.parametrize("options", [("--workers", "0"), ("--backend", "mpi"), ("--lr", "-1"),
                                     ("--out", "/dev/null/out"), ("--pace", "3")])
def test_a_wrong_option_is_one_sentence(options):
    text = run("train_digits.py", *options, code=2).stderr
    assert text.count("\n") == 1 and options[-2] in text


def test_a_mesh_that_cannot_be_had_is_one_sentence():
    text = run("train_digits.py", "--address", "127.0.0.1:1", code=1).stderr
    assert text.count("\n") == 1 and "no Ray head answers there" in text


def test_both_ways_to_split_a_model_give_the_same_losses():
    text = run("tensor_parallel.py", "--steps", "20").stdout
    assert "hidden    (256, 256)  {data: Shard(0), model: Shard(1)}" in text
    gap = re.search(r"largest difference of the losses (\S+): rounding", text)
    assert gap and float(gap[1]) < 1e-5


@pytest.mark.parametrize("options", [("--backend", "inline"), ("--workers", "3")])
def test_the_covariance_is_that_of_numpy(options):
    text = run("covariance.py", "--rows", "20000", *options).stdout
    assert text.rstrip().endswith("The covariances agree.")


def held_out_accuracy(text: str) -> float:
    """Percent, as printed at the end."""
    found = re.search(r"held-out accuracy ([\d.]+)% after", text)
    assert found, text
    return float(found[1])


def losses(text: str) -> list[float]:
    """The mean loss of every epoch, as printed."""
    return [float(x) for x in re.findall(r"epoch +\d+  loss ([\d.]+)", text)]


def is_picture(path: Path) -> bool:
    """Whether a PNG of reasonable size shows more than one colour."""
    pixels = np.asarray(image.imread(path))
    return min(pixels.shape[:2]) > 300 and float(pixels[..., :3].std()) > 0.02
