"""What is right and wrong with CUDA on this machine, judged from facts alone."""

from __future__ import annotations

from collections.abc import Iterator

from meshtape.cluster.findings import Finding
from meshtape.runtime.collectives.choice import version_text
from meshtape.runtime.cuda.survey import Survey

# The first driver of each CUDA (CUDA Toolkit release notes, table of minor version compatibility).
DRIVERS = {11: "450", 12: "525", 13: "580"}
NONE = "no GPU; workers compute with NumPy on CPU cores"


def judge(facts: Survey) -> Iterator[Finding]:
    """The findings, in the order in which things depend on each other."""
    driver = facts.driver
    if not driver.version:
        yield no_driver(facts)
        if not facts.gpus and not facts.device_files:
            return
    else:
        yield Finding("ok", f"NVIDIA driver {driver.version}, for CUDA up to {cuda_text(driver.cuda)}, "
                            f"{len(driver.cards)} GPUs")
    yield from access(facts)
    yield from cupy(facts)
    if facts.trouble and not facts.runtime:
        return
    yield from gpus(facts)
    yield from links(facts)
    yield nccl(facts)
    yield cudnn(facts)
    yield nvmath(facts)


def no_driver(facts: Survey) -> Finding:
    if facts.device_files:
        return Finding("wrong", f"there are {', '.join(facts.device_files[:3])}, but {facts.driver.trouble}",
                       "in a container: start it with the NVIDIA container toolkit (docker run --gpus all); "
                       "otherwise install the NVIDIA driver anew, and reboot if it was just updated")
    return Finding("note", f"{NONE} ({facts.driver.trouble})" if facts.driver.trouble else NONE)


def access(facts: Survey) -> Iterator[Finding]:
    """Whether this process may see and use the GPUs that the driver has."""
    if facts.driver.version and not facts.driver.cards:
        yield Finding("wrong", "the driver finds no GPU", "see `lspci | grep -i nvidia` and `dmesg`; in a "
                      "virtual machine or container, hand a GPU through to it")
    if facts.closed:
        yield Finding("wrong", f"no permission to open {', '.join(facts.closed)}",
                      "add this user to the group that owns the files (`ls -l /dev/nvidia*`), and log in "
                      "again; in a batch job, ask for a GPU")
    if facts.visible is not None and facts.visible.split(",")[0].strip() in ("", "-1", "NoDevFiles"):
        yield Finding("wrong", f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides all GPUs",
                      "unset CUDA_VISIBLE_DEVICES, or name GPUs in it (0,1)")


def cupy(facts: Survey) -> Iterator[Finding]:
    """CuPy: there, once, and of a CUDA that the driver can run."""
    found = [name for name in facts.wheels if name.startswith("cupy")]
    want = extra(facts)
    if len(found) > 1:
        yield Finding("wrong", f"{len(found)} packages of CuPy are installed, which write over each other: "
                               f"{', '.join(found)}",
                      f'pip uninstall -y {" ".join(found)} && pip install "meshtape[{want}]"')
        return
    if not found and not facts.runtime:
        yield Finding("wrong", "CuPy is not installed, so GPUs are not used",
                      f'pip install "meshtape[{want}]"')
        return
    text = f"{found[0]} {facts.wheels[found[0]]}" if found else "CuPy"
    most = facts.driver.cuda // 1000
    major = wheel_cuda(found[0]) if found else facts.runtime // 1000
    if facts.driver.version and major > most:
        yield Finding("wrong", f"{text} is for CUDA {major}, the driver {facts.driver.version} runs CUDA up "
                               f"to {cuda_text(facts.driver.cuda)}",
                      f"update the NVIDIA driver ({DRIVERS.get(major, 'newest')} or later)" + (
                          f', or pip uninstall -y {found[0]} && pip install "meshtape[{want}]"'
                          if found and most >= 12 else ""))
        return
    if facts.trouble:
        yield Finding("wrong", f"{text} cannot be used: {facts.trouble}",
                      f'pip install --force-reinstall "meshtape[{want}]", unless something above explains it')
        return
    yield Finding("ok", f"{text}, CUDA runtime {cuda_text(facts.runtime)}")


def gpus(facts: Survey) -> Iterator[Finding]:
    for gpu in facts.gpus:
        text = (f"GPU {gpu.number}: {gpu.name}, {gpu.memory / 2**30:.0f} GiB, PCI {gpu.pci}, compute "
                f"capability {gpu.capability}" + (f", memory node {gpu.numa}" if gpu.numa >= 0 else ""))
        if int(gpu.capability.partition(".")[0]) < 8:
            yield Finding("note", text, "kernels are written for compute capability 8.0 and later; "
                                        "bfloat16 needs it")
        else:
            yield Finding("ok", text)


def links(facts: Survey) -> Iterator[Finding]:
    """How several GPUs are joined."""
    if len(facts.gpus) < 2:
        return
    by_pci = {gpu.pci: gpu.number for gpu in facts.gpus}
    joined = {gpu.number: sorted(by_pci[pci] for pci in gpu.linked if pci in by_pci) for gpu in facts.gpus}
    if all(len(others) == len(facts.gpus) - 1 for others in joined.values()):
        yield Finding("ok", "NVLink joins every GPU with every other")
    elif any(joined.values()):
        pairs = "; ".join(f"{number} with {', '.join(map(str, others))}" for number, others in joined.items()
                          if others)
        yield Finding("ok", f"NVLink joins GPU {pairs}")
    else:
        yield Finding("note", "no NVLink between the GPUs: collectives go over PCIe")


def nccl(facts: Survey) -> Finding:
    major = facts.runtime // 1000
    package = f"nvidia-nccl-cu{major}"
    if not facts.nccl:
        return Finding("wrong" if len(facts.gpus) > 1 else "note",
                       "no NCCL: workers with GPUs would exchange arrays through their hosts",
                       f"pip install {package}")
    other = [name for name in facts.wheels if name.startswith("nvidia-nccl-cu") and name != package]
    if other:
        return Finding("note", f"NCCL {version_text(facts.nccl)}, but {', '.join(other)} is for another CUDA "
                               "than CuPy", f"pip uninstall -y {' '.join(other)} && pip install {package}")
    return Finding("ok", f"NCCL {version_text(facts.nccl)}")


def cudnn(facts: Survey) -> Finding:
    frontend = facts.wheels.get("nvidia-cudnn-frontend")
    major = facts.runtime // 1000
    if frontend is None or not facts.cudnn:
        lacking = "its frontend" if frontend is None else "the library itself"
        return Finding("note", f"no cuDNN ({lacking} is not installed): convolutions are slower",
                       f'pip install "meshtape[cudnn{major}]"')
    back = f"{facts.cudnn // 10000}.{facts.cudnn // 100 % 100}.{facts.cudnn % 100}"
    return Finding("ok", f"cuDNN {back}, frontend {frontend}")


def nvmath(facts: Survey) -> Finding:
    version = facts.wheels.get("nvmath-python")
    if version is None:
        return Finding("note", "no nvmath-python; matrix products go to cuBLAS directly")
    return Finding("ok", f"nvmath-python {version}")


def extra(facts: Survey) -> str:
    """The extra of meshtape's that fits the driver."""
    return "cuda13" if facts.driver.cuda >= 13000 or not facts.driver.cuda else "cuda12"


def wheel_cuda(name: str) -> int:
    """12 from cupy-cuda12x; 0 where the name does not say."""
    digits = name.removeprefix("cupy-cuda").rstrip("x")
    return int(digits[:2]) if digits.isdigit() else 0


def cuda_text(number: int) -> str:
    """13.2 from 13020."""
    return f"{number // 1000}.{number % 1000 // 10}"
