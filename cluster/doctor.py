"""What this machine offers to meshtape, what is wrong with it, and how to fix that."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator

import numpy as np

from meshtape.cluster.doctor_gpu import judge
from meshtape.cluster.findings import Finding
from meshtape.runtime.cuda.survey import survey
from meshtape.runtime.errors import MeshtapeError


def examine(workers: int = 0) -> Iterator[Finding]:
    """The findings, in the order in which things depend on each other; starts a mesh if workers > 0."""
    yield python()
    yield numpy()
    yield cores()
    yield ray_version()
    yield from judge(survey())
    yield bfloat16()
    if workers:
        yield mesh(workers)


def python() -> Finding:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding("note", text, "several processes need Linux; init(backend=\"local\") works anywhere")
    return Finding("ok", text)


def numpy() -> Finding:
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    text = f"numpy {np.__version__} with {blas.get('name', 'no BLAS')} {blas.get('version', '')}".rstrip()
    if "blas" not in text.lower() and "mkl" not in text.lower():
        return Finding("wrong", text, "matrix products will be slow: pip install --force-reinstall numpy")
    return Finding("ok", text)


def cores() -> Finding:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    text = f"{usable} of {there} cores usable, OMP_NUM_THREADS={threads or 'unset'}"
    if usable < there:
        return Finding("note", text, "something confines this process: taskset, a container, a batch system")
    return Finding("ok", text)


def ray_version() -> Finding:
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Finding("wrong", "Ray is not installed", 'pip install "ray>=2.50,<3"')
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 50):
        return Finding("wrong", f"Ray {version}", 'pip install "ray>=2.50,<3"')
    return Finding("ok", f"Ray {version}")


def bfloat16() -> Finding:
    try:
        return Finding("ok", f"ml_dtypes {importlib.metadata.version('ml_dtypes')} (bfloat16)")
    except importlib.metadata.PackageNotFoundError:
        return Finding("note", "no bfloat16", "pip install ml_dtypes if you need it")


def mesh(workers: int) -> Finding:
    """Start Ray workers for real, and end them."""
    from meshtape.cluster.launch import make_mesh

    started = time.monotonic()
    try:
        with make_mesh(workers, backend="ray") as made:
            return Finding("ok", f"{made!r} started in {time.monotonic() - started:.1f} s")
    except MeshtapeError as error:
        return Finding("wrong", f"a mesh of {workers} workers does not start", str(error))


def report(workers: int = 0) -> int:
    """Print the findings; 1 if anything is wrong."""
    wrong = 0
    for finding in examine(workers):
        print(f"{finding.verdict:<5}  {finding.text}")
        if finding.fix:
            print(f"       -> {finding.fix}")
        wrong += finding.verdict == "wrong"
    print("everything meshtape needs is here" if not wrong else f"{wrong} of these must be fixed")
    return 1 if wrong else 0
