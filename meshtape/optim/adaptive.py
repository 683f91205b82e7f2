"""RMSprop and Adagrad, composed of tensor operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshtape.autograd import Tensor
from meshtape.creation import full_like
from meshtape.optim.optimizer import Group, Optimizer


def descent_direction(group: Group, p: Tensor, grad: Tensor) -> Tensor:
    """The gradient, turned around to maximize, with weight_decay * p added."""
    if group["maximize"]:
        grad = -grad
    return grad + p * group["weight_decay"] if group["weight_decay"] else grad


class RMSprop(Optimizer):
    """Steps of the gradient over the root of its running mean square (Tieleman, Hinton 2012, lecture 6.5).

    centered subtracts the square of the running mean first. Semantics of torch.optim.RMSprop.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
                 weight_decay: float = 0.0, momentum: float = 0.0, centered: bool = False, *,
                 maximize: bool = False, master_weights: bool = True) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay,
                                  "momentum": momentum, "centered": centered, "maximize": maximize},
                         master_weights=master_weights)

    def update(self, group: Group, params: list[Tensor]) -> None:
        names = ("square_avg", *(("momentum_buffer",) if group["momentum"] else ()),
                 *(("grad_avg",) if group["centered"] else ()))
        alpha = group["alpha"]
        for p in params:
            state = self.state_of(p, names)
            weight = self.weight(p)
            g = descent_direction(group, weight, self.gradient(p))
            mean_square = self.put(state, "square_avg", state["square_avg"] * alpha + g * g * (1 - alpha))
            if group["centered"]:
                mean = self.put(state, "grad_avg", state["grad_avg"] * alpha + g * (1 - alpha))
                mean_square = mean_square - mean * mean
            move = g / (mean_square.sqrt() + group["eps"])
            if group["momentum"]:
                move = self.put(state, "momentum_buffer", state["momentum_buffer"] * group["momentum"] + move)
            self.rebind(p, weight - move * group["lr"])
        self.count([self.state[p] for p in params])


class Adagrad(Optimizer):
    """Steps of the gradient over the root of the sum of its squares (Duchi, Hazan, Singer 2011).

    The rate at step t (from 1) is lr / (1 + (t - 1) * lr_decay). Semantics of torch.optim.Adagrad.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, lr_decay: float = 0.0,
                 weight_decay: float = 0.0, initial_accumulator_value: float = 0.0, eps: float = 1e-10, *,
                 maximize: bool = False, master_weights: bool = True) -> None:
        super().__init__(params, {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay,
                                  "initial_accumulator_value": initial_accumulator_value, "eps": eps,
                                  "maximize": maximize}, master_weights=master_weights)

    def update(self, group: Group, params: list[Tensor]) -> None:
        for p in params:
            state = self.state_of(p, ())
            weight = self.weight(p)
            if "sum" not in state:
                state["sum"] = full_like(weight, group["initial_accumulator_value"])
            rate = group["lr"] / (1 + state["step"] * group["lr_decay"])
            g = descent_direction(group, weight, self.gradient(p))
            total = self.put(state, "sum", state["sum"] + g * g)
            self.rebind(p, weight - g / (total.sqrt() + group["eps"]) * rate)
        self.count([self.state[p] for p in params])


__all__ = ["Adagrad", "RMSprop"]
