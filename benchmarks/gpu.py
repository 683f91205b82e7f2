"""One GPU: meshtape beside torch and plain CuPy on the same machine, in one run of about 8 minutes.

    python benchmarks/gpu.py [--cases mlp,gpt2,...] [--json build/benchmarks/gpu.json] [--page gpu.md]

mlp       training step of an MLP 64-128-128-10, batch 64, float32: bound by launches
gpt2      training step of GPT-2 small, bf16 autocast, T 1024, the largest batch that all of torch eager,
          torch.compile and meshtape fit
resnet18  training step of ResNet-18 at 64 x 64, batch 256, float32 with TF32 products
chain     six pointwise operations on 64 Mi float32 elements, in parts of the bandwidth of a copy
gemm      bfloat16 product of 8192 x 8192
overhead  products and ReLUs on one worker, beside the same kernels called from Python without meshtape
digits    training step of an MLP on batches of 16384 digits, on a GPU worker and on a CPU worker

A contender is a process. Those of a case take turns, but for gpt2, where each has the GPU to itself. Times
are medians, between synchronisations. torch's optimizer is AdamW(fused=True). Of a case with a contender that
fails the rest is not measured; what went wrong stands on standard error. No case begins after --minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import _runner
import numpy as np
from _gpu_models import GPTSize, gpt, resnet18
from _gpu_page import page, tables

CASES = ("mlp", "gpt2", "resnet18", "chain", "gemm", "overhead", "digits")
CONTENDERS = {
    "mlp": ("mesh", "torch", "compile"), "gpt2": ("mesh", "torch", "compile"), "resnet18": ("mesh", "torch"),
    "chain": ("mesh", "copy", "torch"), "gemm": ("mesh", "torch"), "overhead": ("mesh", "plain"),
    "digits": ("mesh", "cpu"),
}
BATCHES = (128, 96, 64, 48, 32, 16, 8)      # of GPT-2, tried from the left
ALONE = {"gpt2"}


class Sizes(NamedTuple):
    """What is measured; `tiny` is for trying the program."""

    batch: int = 64
    gpt: GPTSize = GPTSize()
    gpt_batches: tuple[int, ...] = BATCHES
    resnet: int = 256
    image: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    elements: int = 64 << 20
    gemm: int = 8192
    overhead: int = 2048
    digits: int = 16384


TINY = Sizes(8, GPTSize(2, 2, 32, 16, 64), (4, 2), 4, 32, (8, 8, 16, 16), 4096, 64, 32, 64)


# --- in a contender's process -------------------------------------------------------------------------------

class Library(NamedTuple):
    """One library's way to say the same things; `device` is torch's name of where tensors are."""

    nn: Any
    tensor: Callable[[Any], Any]
    low: Callable[[], Any]                  # a context of bf16 autocast
    adamw: Callable[[Any], Any]
    wait: Callable[[], Any]


def meshtape_library(device: str) -> Library:
    import meshtape as mt
    from meshtape import nn, optim
    mt.init(devices=device)
    mt.set_float32_matmul_precision("high")
    return Library(nn, mt.tensor, lambda: mt.autocast(mt.bfloat16),
                   lambda p: optim.AdamW(p, lr=1e-3), mt.synchronize)


def torch_library(device: str) -> Library:
    import torch
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    where = "cuda" if device == "gpu" else "cpu"
    torch.set_default_device(where)
    return Library(torch.nn, lambda a: torch.as_tensor(a, device=where),
                   lambda: torch.autocast(where, torch.bfloat16),
                   lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
                   torch.cuda.synchronize if where == "cuda" else lambda: None)


def library(name: str, device: str) -> Library:
    return torch_library(device) if name in ("torch", "compile") else meshtape_library(
        "cpu" if name == "cpu" else device)


def training(lib: Library, net: Any, compiled: bool, low: bool, x: Any, y: Any) -> _runner.Run:
    """Steps on one batch that is on the device already."""
    opt = lib.adamw(net.parameters())

    def forward(x: Any, y: Any) -> Any:
        return lib.nn.functional.cross_entropy(net(x), y)

    if compiled:
        import torch
        forward = torch.compile(forward, mode="reduce-overhead")

    def run(n: int) -> None:
        for _ in range(n):
            if low:
                with lib.low():
                    loss = forward(x, y)
            else:
                loss = forward(x, y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        lib.wait()

    return run


def mlp(lib: Library, name: str, sizes: Sizes, batch: int) -> _runner.Run:
    rng = np.random.default_rng(0)
    nn = lib.nn
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return training(lib, net, name == "compile", False,
                    lib.tensor(rng.standard_normal((batch, 64), dtype=np.float32)),
                    lib.tensor(rng.integers(0, 10, batch)))


def gpt2(lib: Library, name: str, sizes: Sizes, batch: int) -> _runner.Run:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, sizes.gpt.words, (batch, sizes.gpt.length))
    return training(lib, gpt(lib.nn, sizes.gpt), name == "compile", True, lib.tensor(ids),
                    lib.tensor(ids.reshape(-1)))


def resnet(lib: Library, name: str, sizes: Sizes, batch: int) -> _runner.Run:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 3, sizes.image, sizes.image), dtype=np.float32)
    return training(lib, resnet18(lib.nn, widths=sizes.widths), name == "compile", False, lib.tensor(images),
                    lib.tensor(rng.integers(0, 1000, batch)))


def chain(lib: Library, name: str, sizes: Sizes, elements: int) -> _runner.Run:
    """Six operations, or a copy: both read and write every element once."""
    x = lib.tensor(np.random.default_rng(0).standard_normal(elements, dtype=np.float32))

    def run(n: int) -> None:
        for _ in range(n):
            if name == "copy":
                target.copy_(x)
            else:
                y = abs(x * 1.5 + 0.5) * x - 0.25
                y = y * y
                del y
                flush()
        lib.wait()

    flush: Callable[[], Any] = lambda: None
    if name == "copy":
        target = x.clone()
    elif name == "mesh":
        import meshtape as mt
        flush = mt.flush
    return run


def gemm(lib: Library, name: str, sizes: Sizes, size: int) -> _runner.Run:
    rng = np.random.default_rng(0)
    a, b = (lib.tensor(rng.standard_normal((size, size), dtype=np.float32)) for _ in range(2))
    if name == "mesh":
        import meshtape as mt
        a, b, flush = a.astype(mt.bfloat16), b.astype(mt.bfloat16), mt.flush
    else:
        a, b, flush = a.bfloat16(), b.bfloat16(), lambda: None

    def run(n: int) -> None:
        for _ in range(n):
            c = a @ b
            del c
            flush()
        lib.wait()

    return run


LAYERS = 8


def overhead(lib: Library, name: str, sizes: Sizes, size: int) -> _runner.Run:
    """A chain of products and ReLUs by the same GEMM and pointwise kernels, recorded or called."""
    rng = np.random.default_rng(0)
    a, w = (rng.standard_normal((size, size), dtype=np.float32) / size**0.5 for _ in range(2))
    if name == "mesh":
        import meshtape as mt
        x, m = lib.tensor(a), lib.tensor(w)

        def run(n: int) -> None:
            for _ in range(n):
                y = x
                for _ in range(LAYERS):
                    y = mt.maximum(y @ m, 0)
                mt.flush()
            lib.wait()

        return run
    return plain_calls(a, w) if lib is None else numpy_calls(a, w)


def numpy_calls(a: Any, w: Any) -> _runner.Run:
    """plain_calls() with NumPy."""
    y, z = np.empty_like(a), np.empty_like(a)

    def run(n: int) -> None:
        for _ in range(n):
            given = a
            for _ in range(LAYERS):
                given = np.maximum(np.matmul(given, w, out=y), 0, out=z)

    return run


def plain_calls(a: Any, w: Any) -> _runner.Run:
    """The kernels of `overhead` called one after the other, without recording, planning or messages."""
    from meshtape.runtime.cuda.device import Device
    from meshtape.runtime.cuda.libraries import load
    device = Device(load())
    cp = device.cp
    with device.active():
        x, m, y, z = cp.asarray(a), cp.asarray(w), cp.empty_like(a), cp.empty_like(a)
        device.blas.tf32 = True

    def run(n: int) -> None:
        with device.active():
            for _ in range(n):
                given = x
                for _ in range(LAYERS):
                    given = cp.maximum(device.blas.matmul(given, m, out=y), 0, out=z)
            device.synchronize()

    return run


BUILD: dict[str, tuple[Callable[..., _runner.Run], Callable[[Sizes], int]]] = {
    "mlp": (mlp, lambda s: s.batch), "gpt2": (gpt2, lambda s: s.gpt_batches[0]),
    "resnet18": (resnet, lambda s: s.resnet), "chain": (chain, lambda s: s.elements),
    "gemm": (gemm, lambda s: s.gemm), "overhead": (overhead, lambda s: s.overhead),
    "digits": (mlp, lambda s: s.digits),
}


def build(role: _runner.Role) -> tuple[_runner.Run, Any]:
    """`answer(n, size)`: seconds per step of n steps at that size, or None where memory does not do."""
    case, tiny, device = role.case.split(":")
    sizes = TINY if tiny == "tiny" else Sizes()
    lib = (torch_library(device) if role.name == "copy" else
           None if role.name == "plain" and device == "gpu" else library(role.name, device))
    made: dict[int, _runner.Run] = {}

    def answer(n: int, size: int) -> float | None:
        try:
            if size not in made:
                made.clear()
                made[size] = BUILD[case][0](lib, role.name, sizes, size)
                made[size](WARM)
            return float(_runner.timed(made[size])(n))
        except Exception as error:
            if "memory" not in str(error).lower():
                raise
            made.clear()
            return None

    return answer, describe(role.name)


WARM = 6            # steps before the first measured one: compilation, and capture of CUDA graphs


def describe(name: str) -> dict[str, Any]:
    """The versions and the device that a contender has found."""
    found: dict[str, Any] = {}
    with suppress(ImportError):
        if name in ("torch", "compile", "copy"):
            import torch
            found = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
                     "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else ""}
        else:
            import cupy
            found = {"cupy": cupy.__version__}
            if cupy.cuda.is_available():
                driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
                found |= {"gpu": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
                          "driver's CUDA": f"{driver // 1000}.{driver % 1000 // 10}",
                          "CuPy's CUDA": f"{runtime // 1000}.{runtime % 1000 // 10}"}
    return found


# --- in the program that compares ---------------------------------------------------------------------------

STEPS = {"mlp": 200, "gpt2": 5, "resnet18": 10, "chain": 50, "gemm": 20, "overhead": 20, "digits": 20}


Measured = tuple[dict[str, list[float]], dict[str, Any]]


def measure(case: str, options: argparse.Namespace) -> Measured:
    """Seconds per step of every contender, by rounds, and what they say about themselves."""
    size = BUILD[case][1](TINY if options.tiny else Sizes())
    steps = 2 if options.tiny else STEPS[case]
    wanted = [c for c in CONTENDERS[case] if c in options.contenders.split(",")]
    if case in ALONE:
        return alone(case, wanted, options, steps)
    with _runner.contenders(__file__, f"{case}:{options.sizes}:{options.device}",
                            {name: (1, {}) for name in wanted}) as running:
        turns = {name: (lambda c=c: c.seconds(steps, size)) for name, c in running.items()}
        about = {name: c.about[0] for name, c in running.items()}
        return _runner.take_turns(turns, options.rounds), about


def alone(case: str, wanted: list[str], options: argparse.Namespace, steps: int) -> Measured:
    """Each contender by itself, at the largest batch that all of them fit."""
    found: dict[str, list[float]] = {}
    about: dict[str, Any] = {}
    batches = (TINY if options.tiny else Sizes()).gpt_batches
    largest = 0                             # position in `batches` of what fitted everybody so far
    for name in sorted(wanted, key=lambda name: name == "compile"):
        with _runner.contenders(__file__, f"{case}:{options.sizes}:{options.device}", {name: (1, {})}) as one:
            about[name] = one[name].about[0]
            while one[name].ask(1, batches[largest])[0] is None:
                largest += 1
            found[f"{name} B{batches[largest]}"] = [
                one[name].ask(steps, batches[largest])[0] for _ in range(max(3, options.rounds // 3))]
    batch = batches[largest]
    again = [key.split()[0] for key in found if key.split()[1] != f"B{batch}"]
    for name in again:                      # those that fitted a larger one
        with _runner.contenders(__file__, f"{case}:{options.sizes}:{options.device}", {name: (1, {})}) as one:
            found[f"{name} B{batch}"] = [one[name].ask(steps, batch)[0] for _ in range(3)]
    return {name: found[f"{name} B{batch}"] for name in wanted} | {"batch": [float(batch)]}, about


def main() -> None:
    parser = _runner.parser(__doc__, CASES, ["mesh", "torch", "compile", "copy", "plain", "cpu"], rounds=9)
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the program")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no case is begun")
    parser.add_argument("--page", type=Path, help="also write the page here")
    options = parser.parse_args()
    if options.serve:
        _runner.serve(build, options)
        return
    options.sizes = "tiny" if options.tiny else "full"
    figures: dict[str, Any] = {}
    started = time.perf_counter()
    for case in [case for case in options.cases.split(",") if case]:
        began = time.perf_counter()
        if began - started > 60 * options.minutes:
            figures[case] = {"error": f"not begun within {options.minutes:g} minutes"}
            continue
        try:
            seconds, about = measure(case, options)
            figures[case] = {"seconds": seconds, "about": about}
        except SystemExit as error:         # a contender ended; its traceback went to standard error
            figures[case] = {"error": str(error)}
        print(f"{case}: {time.perf_counter() - began:.0f} s", flush=True)
        _runner.write_json(options.json, figures)
    print("\n".join(tables(figures)))
    if options.page is not None:
        options.page.write_text(page(figures))


if __name__ == "__main__":
    main()
