"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshtape.autograd import Tensor
from meshtape.creation import full
from meshtape.elementwise import where
from meshtape.optim.optimizer import Group, Optimizer


class SGD(Optimizer):
    """p -= lr * d, with d the gradient, or with momentum b = momentum * b + (1 - dampening) * g (the first b
    is g).

    weight_decay adds weight_decay * p to the gradient; nesterov uses g + momentum * b; maximize ascends.
    Semantics of torch.optim.SGD.
    """

    by_parts = True

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
                 weight_decay: float = 0.0, nesterov: bool = False, *, maximize: bool = False,
                 master_weights: bool = True) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "dampening": dampening,
                                  "weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize},
                         master_weights=master_weights)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(f"SGD: nesterov needs momentum > 0 and dampening 0, got "
                             f"momentum={group['momentum']} and dampening={group['dampening']}")

    def update(self, group: Group, params: list[Tensor]) -> None:
        momentum = group["momentum"] != 0
        fresh = all("momentum_buffer" not in self.state.get(p, ()) for p in params)
        dampening, step = 0.0 if fresh else float(group["dampening"]), self.number(params)
        if dampening and isinstance(step, Tensor):      # whether this is the first step, the workers know
            dampening = where(step > 1, full((), dampening, dtype="float64"), 0.0)
        rates = (group["lr"], group["momentum"], group["weight_decay"])
        self.run("sgd_update", (step, dampening, *map(float, rates)), params,
                 ("momentum_buffer",) if momentum else (),
                 nesterov=bool(group["nesterov"]), maximize=bool(group["maximize"]), has_momentum=momentum)


__all__ = ["SGD"]
