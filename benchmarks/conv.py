"""Milliseconds of forward and backward of convolutional networks: meshtape on 1 and 2 workers beside torch.

    python benchmarks/conv.py [--rounds 9] [--models cnn28,block64] [--contenders torch,mesh1,mesh2]

Every contender runs in a process of its own with one BLAS thread per worker, and takes turns with the others.
Whole networks are trained (cross-entropy, AdamW); of single layers, the gradients of input and weights are
computed. Batches start as NumPy arrays. Figures are medians over rounds.

On some processors NumPy's OpenBLAS chooses older kernels than the processor allows; OPENBLAS_CORETYPE
(SkylakeX for AVX-512) overrides it. The heading prints what is in use.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np

CONTENDERS = ("torch", "mesh1", "mesh2")


class Model(NamedTuple):
    """Layers from torch's or meshtape's nn, the input's shape, whether it is trained, steps a round."""

    layers: Callable[[Any], list[Any]]
    shape: tuple[int, ...]
    trained: bool
    steps: int


def cnn28(nn: Any) -> list[Any]:
    return [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10)]


def block64(nn: Any) -> list[Any]:
    parts: list[Any] = []
    for _ in range(2):
        parts += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return [*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]


MODELS = {
    "cnn28": Model(cnn28, (128, 1, 28, 28), True, 6),
    "block64": Model(block64, (32, 64, 32, 32), True, 2),
    "conv16-32": Model(lambda nn: [nn.Conv2d(16, 32, 3, padding=1)], (128, 16, 14, 14), False, 10),
    "conv64-64": Model(lambda nn: [nn.Conv2d(64, 64, 3, padding=1)], (32, 64, 32, 32), False, 2),
    "conv64-128/2": Model(lambda nn: [nn.Conv2d(64, 128, 3, 2, 1)], (32, 64, 32, 32), False, 2),
    "conv1x1": Model(lambda nn: [nn.Conv2d(64, 64, 1)], (32, 64, 32, 32), False, 4),
    "depthwise": Model(lambda nn: [nn.Conv2d(64, 64, 3, padding=1, groups=64)], (32, 64, 32, 32), False, 4),
    "maxpool": Model(lambda nn: [nn.MaxPool2d(2)], (32, 64, 32, 32), False, 4),
    "batchnorm": Model(lambda nn: [nn.BatchNorm2d(64)], (32, 64, 32, 32), False, 4),
}


def data(model: Model) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(model.shape, dtype=np.float32), rng.integers(0, 10, model.shape[0])


# --- contenders: each returns step(), which does one step and waits for it --------------------------------

def meshtape_step(model: Model, workers: int) -> Callable[[], None]:
    import meshtape as mt
    from meshtape import nn, optim

    if workers > 1:
        mt.init(workers=workers, threads_per_worker=1)
    net = nn.Sequential(*model.layers(nn))
    images, labels = data(model)

    def place(array: Any, **options: Any) -> Any:
        return mt.tensor(array, layout=mt.Shard(0), **options)

    if model.trained:
        opt = optim.AdamW(net.parameters())

        def train() -> None:
            loss = nn.functional.cross_entropy(net(place(images)), place(labels))
            opt.zero_grad()
            loss.backward()
            opt.step()
            loss.item()

        return train
    x = place(images, requires_grad=True)

    def differentiate() -> None:
        net.zero_grad()
        x.grad = None
        y = net(x)
        y.backward(y.detach())
        # Values that are asked for end the step: one number of each gradient.
        for t in (x, *net.parameters()):
            t.grad.reshape(-1)[0].item()

    return differentiate


def torch_step(model: Model) -> Callable[[], None]:
    import torch

    torch.set_num_threads(1)
    net = torch.nn.Sequential(*model.layers(torch.nn))
    images, labels = (torch.from_numpy(a) for a in data(model))
    if model.trained:
        opt = torch.optim.AdamW(net.parameters())

        def train() -> None:
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            opt.zero_grad()
            loss.backward()
            opt.step()

        return train
    x = images.requires_grad_()

    def differentiate() -> None:
        net.zero_grad()
        x.grad = None
        y = net(x)
        y.backward(y.detach())

    return differentiate


def serve(contender: str, model: Model) -> None:
    """A contender's process: do as many steps as each line asks for, answer with seconds a step."""
    step = torch_step(model) if contender == "torch" else meshtape_step(model,
                                                                        int(contender.removeprefix("mesh")))
    for _ in range(4):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        n = int(line)
        start = time.perf_counter()
        for _ in range(n):
            step()
        print((time.perf_counter() - start) / n, flush=True)


class Contender:
    """A contender's process, driven through its standard input."""

    def __init__(self, name: str, model: str) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", name, "--models", model],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while self.answer() != "ready":
            pass

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended with status {self.process.wait()}")
        return line.strip()

    def measure(self, steps: int) -> float:
        """Milliseconds a step."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return 1e3 * float(self.answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def compare(name: str, names: list[str], rounds: int) -> dict[str, float]:
    running = {c: Contender(c, name) for c in names}
    times: dict[str, list[float]] = {c: [] for c in names}
    try:
        for _ in range(rounds):
            for c, contender in running.items():
                times[c].append(contender.measure(MODELS[name].steps))
    finally:
        for contender in running.values():
            contender.close()
    return {c: statistics.median(t) for c, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, MODELS[options.models])
        return
    names = options.contenders.split(",")
    print(f"OPENBLAS_CORETYPE: {os.environ.get('OPENBLAS_CORETYPE', 'not set')}")
    print(f"{'ms per step':14}" + "".join(f"{c:>10}" for c in names) + f"{'mesh1/torch':>13}")
    for model in options.models.split(","):
        found = compare(model, names, options.rounds)
        ratio = f"{found['mesh1'] / found['torch']:.2f}" if {"mesh1", "torch"} <= set(names) else "-"
        print(f"{model:14}" + "".join(f"{found[c]:10.2f}" for c in names) + f"{ratio:>13}", flush=True)


if __name__ == "__main__":
    main()
