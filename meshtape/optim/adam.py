"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshtape.autograd import Tensor
from meshtape.optim.optimizer import Group, Optimizer


class Adam(Optimizer):
    """Steps of the mean gradient over the root of the mean squared gradient (arXiv:1412.6980, algorithm 1).

    weight_decay adds weight_decay * p to the gradient; amsgrad divides by the largest mean square so far
    (Reddi, Kale, Kumar 2018); maximize ascends. Semantics of torch.optim.Adam.
    """

    by_parts = True
    decoupled = False

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, *,
                 maximize: bool = False, master_weights: bool = True) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "amsgrad": amsgrad, "maximize": maximize}, master_weights=master_weights)

    def update(self, group: Group, params: list[Tensor]) -> None:
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        rates = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        self.run("adam_update", (self.number(params), *map(float, rates)), params, names,
                 decoupled=self.decoupled, amsgrad=bool(group["amsgrad"]), maximize=bool(group["maximize"]))


class AdamW(Adam):
    """Adam with the weight decay taken off the parameter itself, p *= 1 - lr * weight_decay
    (arXiv:1711.05101).
    """

    decoupled = True

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False, *,
                 maximize: bool = False, master_weights: bool = True) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize,
                         master_weights=master_weights)


__all__ = ["Adam", "AdamW"]
