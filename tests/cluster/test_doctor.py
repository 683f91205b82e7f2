"""What the doctor says about GPUs, from made-up facts."""

from __future__ import annotations

from pathlib import Path

import pytest

import meshtape as mt
from meshtape.cluster.doctor_gpu import judge
from meshtape.runtime.cuda.nvml import Card, Driver
from meshtape.runtime.cuda.survey import Survey, survey
from meshtape.runtime.gpu import Gpu, numa_node

WHEELS = {"cupy-cuda13x": "14.2.0", "ml-dtypes": "0.6.0", "nvidia-cudnn-cu13": "9.13.0",
          "nvidia-cudnn-frontend": "1.28.0", "nvidia-nccl-cu13": "2.28.3", "nvmath-python": "1.0.0"}


def pci(k: int) -> str:
    return f"0000:{k:02X}:00.0"


def machine(count: int = 2, linked: bool = True, **changes: object) -> Survey:
    """One where all is well, but for `changes`."""
    others = [tuple(pci(j) for j in range(count) if j != k and linked) for k in range(count)]
    cards = tuple(Card(pci(k), "H200", 150 << 30) for k in range(count))
    gpus = tuple(Gpu(k, "H200", pci(k), 150 << 30, "9.0", 0, others[k], 22803) for k in range(count))
    facts = Survey(Driver("580.65", 13000, cards), WHEELS, tuple(f"/dev/nvidia{k}" for k in range(count)),
                   runtime=13000, nccl=22803, cudnn=91300, gpus=gpus)
    return facts._replace(**changes)        # type: ignore[arg-type]


def told(facts: Survey) -> str:
    """All findings that are not fine, with what to do."""
    return "\n".join(f"{f.verdict}: {f.text} -> {f.fix}" for f in judge(facts) if f.verdict != "ok")


def test_a_machine_where_all_is_well_has_nothing_to_fix() -> None:
    findings = list(judge(machine()))
    assert {f.verdict for f in findings} == {"ok"}
    text = "\n".join(f.text for f in findings)
    for part in ("driver 580.65, for CUDA up to 13.0, 2 GPUs", "cupy-cuda13x 14.2.0, CUDA runtime 13.0",
                 "GPU 1: H200, 150 GiB, PCI 0000:01:00.0, compute capability 9.0, memory node 0",
                 "NVLink joins every GPU with every other", "NCCL 2.28.3", "cuDNN 9.13.0, frontend 1.28.0",
                 "nvmath-python 1.0.0"):
        assert part in text


def test_without_a_driver_there_is_nothing_wrong() -> None:
    facts = Survey(Driver(trouble="there is no NVIDIA driver"), {})
    assert [f.verdict for f in judge(facts)] == ["note"] and "NumPy" in told(facts)


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in WHEELS.items() if name not in names}


MISSING = "No module named 'cupy'"
OLD = Driver("535.54", 12020, (Card(pci(0), "A100", 80 << 30),))


@pytest.mark.parametrize(("facts", "text", "fix"), [
    (machine(wheels=without("cupy-cuda13x"), runtime=0, gpus=(), trouble=MISSING),
     "CuPy is not installed", 'pip install "meshtape[cuda13]"'),
    (machine(wheels=without("cupy-cuda13x"), runtime=0, gpus=(), trouble=MISSING, driver=OLD),
     "CuPy is not installed", 'pip install "meshtape[cuda12]"'),
    (machine(wheels=WHEELS | {"cupy-cuda12x": "14.2.0"}), "2 packages of CuPy are installed",
     'pip uninstall -y cupy-cuda13x cupy-cuda12x && pip install "meshtape[cuda13]"'),
    (machine(driver=OLD, trouble="cudaErrorInsufficientDriver", gpus=()),
     "cupy-cuda13x 14.2.0 is for CUDA 13, the driver 535.54 runs CUDA up to 12.2",
     "update the NVIDIA driver (580 or later), or pip uninstall -y cupy-cuda13x && "
     'pip install "meshtape[cuda12]"'),
    (machine(wheels=without("cupy-cuda13x") | {"cupy-cuda12x": "14"}, runtime=12090, trouble="x",
             driver=Driver("470.1", 11040, OLD.cards), gpus=()),
     "runs CUDA up to 11.4", "update the NVIDIA driver (525 or later)"),
    (machine(trouble="libcublas.so.13: cannot open shared object file"), "cannot be used: libcublas.so.13",
     "pip install --force-reinstall"),
    (machine(closed=("/dev/nvidia0",)), "no permission to open /dev/nvidia0", "add this user to the group"),
    (machine(visible="", gpus=()), "CUDA_VISIBLE_DEVICES='' hides all GPUs", "unset CUDA_VISIBLE_DEVICES"),
    (machine(visible="-1", gpus=()), "hides all GPUs", "unset"),
    (machine(driver=Driver("580.65", 13000), gpus=()), "the driver finds no GPU", "lspci"),
    (machine(driver=Driver(trouble="Driver/library version mismatch"), gpus=()),
     "there are /dev/nvidia0, /dev/nvidia1, but Driver/library version mismatch", "reboot"),
    (machine(nccl=0, wheels=without("nvidia-nccl-cu13")), "wrong: no NCCL", "pip install nvidia-nccl-cu13"),
    (machine(1, nccl=0, wheels=without("nvidia-nccl-cu13")), "note: no NCCL", "pip install nvidia-nccl-cu13"),
    (machine(wheels=WHEELS | {"nvidia-nccl-cu12": "2.25.1"}), "nvidia-nccl-cu12 is for another CUDA than",
     "pip uninstall -y nvidia-nccl-cu12 && pip install nvidia-nccl-cu13"),
    (machine(cudnn=0), "no cuDNN (the library itself is not installed)", 'pip install "meshtape[cudnn13]"'),
    (machine(cudnn=0, wheels=without("nvidia-cudnn-frontend")), "no cuDNN (its frontend is not installed)",
     'pip install "meshtape[cudnn13]"'),
    (machine(linked=False), "no NVLink between the GPUs", ""),
    (machine(1, gpus=(Gpu(0, "V100", pci(0), 16 << 30, "7.0"),)), "compute capability 7.0", "8.0 and later"),
])
def test_what_is_missing_or_does_not_fit_says_how_to_fix_it(facts: Survey, text: str, fix: str) -> None:
    lines = [line for line in told(facts).split("\n") if text in line]
    assert lines and fix in lines[0], told(facts)


def test_pairs_that_nvlink_joins_are_named() -> None:
    facts = machine(4, linked=False)
    gpus = tuple(g._replace(linked=(pci(g.number ^ 1),)) for g in facts.gpus)
    assert "NVLink joins GPU 0 with 1; 1 with 0; 2 with 3; 3 with 2" in [f.text for f in judge(
        facts._replace(gpus=gpus))]


def test_the_survey_of_this_machine_can_be_judged() -> None:
    assert [f.verdict for f in judge(survey())]


def test_the_memory_node_of_a_gpu_is_read_where_the_system_says_it(tmp_path: Path) -> None:
    assert numa_node("0000:3B:00.0", tmp_path) == -1
    (tmp_path / "0000:3b:00.0").mkdir()
    (tmp_path / "0000:3b:00.0" / "numa_node").write_text("1\n")
    assert numa_node("0000:3B:00.0", tmp_path) == 1


def test_the_front_door_counts_devices_and_calls_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert mt.device_count() >= 0
    assert mt.doctor() is True
    assert "everything meshtape needs is here" in capsys.readouterr().out
