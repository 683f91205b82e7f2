"""The digits MLP, 64-128-128-10 in float64: data, initial weights and the losses that torch computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

import meshtape as mt
from meshtape import nn, optim

STEPS, BATCH, LR = 50, 100, 3e-3
SIZES = (64, 128, 128, 10)

# torch_losses(), so that the comparison needs no torch.
LOSSES = (
    2.318770855561592, 2.283378233882573, 2.269877434500816, 2.2380288709769793, 2.1866749546001887,
    2.1849884437462355, 2.1758535217641772, 2.110415732600337, 2.083280743781678, 2.018321973940145,
    1.908668334888428, 1.9160110539999138, 1.811137856054073, 1.7679889783594813, 1.6234528736708125,
    1.5616844776728762, 1.4454874691110264, 1.401676530859962, 1.317162146539088, 1.1918376565985571,
    1.195496650208843, 1.0741048742872825, 0.9780608473793351, 0.8617364722359349, 0.826223177494807,
    0.7083112035220097, 0.6560263869595664, 0.7022706810600607, 0.6009160776592503, 0.5354211855675578,
    0.5807922306276516, 0.4866855059188808, 0.63437822150601, 0.5693708136277933, 0.3864687310558414,
    0.5915908741329348, 0.46470027169243794, 0.4291718174604191, 0.3834622356536428, 0.3377276979079024,
    0.29939184480111686, 0.2874202713548821, 0.3000322531591109, 0.22665605747910295, 0.3580048085472656,
    0.3044753884436547, 0.2936024213389877, 0.3144298844197977, 0.31810431318030635, 0.34829954854699063,
)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 64) in [0, 1] and their classes."""
    from sklearn.datasets import load_digits
    found = load_digits()
    return found.data / 16.0, found.target.astype(np.int64)


def batches(steps: int = STEPS, size: int = BATCH):
    """The rows of every step: fixed, whatever the mesh."""
    x, y = data()
    rng = np.random.default_rng(7)
    for _ in range(steps):
        rows = rng.integers(0, len(x), size)
        yield x[rows], y[rows]


def weights() -> list[np.ndarray]:
    """Weight (out, in) and bias of every layer, uniform in +-1/sqrt(in) as torch draws them."""
    rng = np.random.default_rng(11)
    out = []
    for n_in, n_out in itertools.pairwise(SIZES):
        bound = n_in ** -0.5
        out += [rng.uniform(-bound, bound, (n_out, n_in)), rng.uniform(-bound, bound, n_out)]
    return out


def model() -> nn.Module:
    """The MLP with weights() in it, replicated."""
    made = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    made.to(mt.float64)
    made.load_state_dict(dict(zip(made.state_dict(), weights(), strict=True)))
    return made


def train(steps: int = STEPS, batch: int = BATCH, *, prepare: Callable[[nn.Module], Any] | None = None,
          look: Callable[[nn.Module, optim.Optimizer], Any] | None = None) -> list[float]:
    """The losses of `steps` steps. `prepare` lays the model out first; `look` sees it after each step."""
    net = model()
    if prepare is not None:
        prepare(net)
    opt = optim.AdamW(net.parameters(), lr=LR)
    losses = []
    for x, y in batches(steps, batch):
        images, classes = mt.tensor(x, layout=mt.Shard(0)), mt.tensor(y, layout=mt.Shard(0))
        loss = nn.functional.cross_entropy(net(images), classes)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if look is not None:
            look(net, opt)
        losses.append(loss.item())
    return losses


def torch_losses(steps: int = STEPS) -> list[float]:
    """The same in torch."""
    import torch
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128),
                              torch.nn.ReLU(), torch.nn.Linear(128, 10)).double()
    with torch.no_grad():
        for p, w in zip(net.parameters(), weights(), strict=True):
            p.copy_(torch.from_numpy(w))
    opt = torch.optim.AdamW(net.parameters(), lr=LR)
    losses = []
    for x, y in batches(steps):
        loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses
