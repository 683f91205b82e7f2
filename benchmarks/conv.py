"""Milliseconds of forward and backward of convolutional networks: meshtape on 1 and 2 workers beside torch.

    python benchmarks/conv.py [--rounds 9] [--models cnn28,block64] [--contenders torch,mesh1,mesh2]

Every contender runs in a process of its own with one BLAS thread per worker, and takes turns with the others.
Whole networks are trained (cross-entropy, AdamW); of single layers, the gradients of input and weights are
computed. Batches start as NumPy arrays. Figures are medians over rounds.

On some processors NumPy's OpenBLAS chooses older kernels than the processor allows; OPENBLAS_CORETYPE
(SkylakeX for AVX-512) overrides it. The heading prints what is in use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import _runner
import numpy as np
from _models import cnn

CONTENDERS = ("torch", "mesh1", "mesh2")


class Model(NamedTuple):
    """Layers from torch's or meshtape's nn, the input's shape, whether it is trained, steps a round."""

    layers: Callable[[Any], list[Any]]
    shape: tuple[int, ...]
    trained: bool
    steps: int


def block64(nn: Any) -> list[Any]:
    parts: list[Any] = []
    for _ in range(2):
        parts += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return [*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]


MODELS = {
    "cnn28": Model(lambda nn: [cnn(nn)], (128, 1, 28, 28), True, 6),
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


def build(role: _runner.Role) -> tuple[_runner.Run, None]:
    model = MODELS[role.case]
    step = (torch_step(model) if role.name == "torch" else
            meshtape_step(model, int(role.name.removeprefix("mesh"))))

    def run(n: int) -> None:
        for _ in range(n):
            step()

    run(4)
    return _runner.timed(run), None


def compare(model: str, names: list[str], rounds: int) -> dict[str, float]:
    with _runner.contenders(__file__, model, {name: (1, {}) for name in names}) as running:
        turns = {name: (lambda c=c: 1e3 * c.seconds(MODELS[model].steps)) for name, c in running.items()}
        return _runner.medians(_runner.take_turns(turns, rounds))


def main() -> None:
    parser = _runner.parser(__doc__, MODELS, CONTENDERS, rounds=9, case="models")
    options = parser.parse_args()
    if options.serve:
        _runner.serve(build, options)
        return
    names = options.contenders.split(",")
    print(f"OPENBLAS_CORETYPE: {os.environ.get('OPENBLAS_CORETYPE', 'not set')}")
    print(_runner.row("ms per step", [*names, "mesh1/torch"]))
    for model in options.models.split(","):
        found = compare(model, names, options.rounds)
        ratio = f"{found['mesh1'] / found['torch']:.2f}" if {"mesh1", "torch"} <= set(names) else "-"
        print(_runner.row(model, [*found.values(), ratio]), flush=True)


if __name__ == "__main__":
    main()
