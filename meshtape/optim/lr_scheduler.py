"""Learning-rate schedules: Python arithmetic on an optimizer's groups, by torch.optim.lr_scheduler's names.

A rate is a scalar operand of the update, so changing it changes no program. Every schedule is a formula of
the number of steps t since it began and of the group's initial rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meshtape.optim.optimizer import Optimizer
from meshtape.runtime.errors import StateError


class LRScheduler:
    """Base of all schedules: sets each group's "lr" when made and at every step()."""

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(self).__name__}: needs an Optimizer, got a {type(optimizer).__name__}")
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_lrs = [float(g["initial_lr"]) for g in optimizer.param_groups]
        self.last_epoch = last_epoch
        self.step()

    def rate(self, t: int, base: float, index: int) -> float:
        """The learning rate of group `index` after t steps, given its initial rate."""
        raise NotImplementedError

    def step(self) -> None:
        """Count one step and set the groups' learning rates. Call it after optimizer.step()."""
        self.last_epoch += 1
        self.set_rates(self.last_epoch)

    def set_rates(self, t: int) -> None:
        """Set the groups' learning rates to those after t steps."""
        for i, (group, base) in enumerate(zip(self.optimizer.param_groups, self.base_lrs, strict=True)):
            group["lr"] = self.rate(t, base, i)

    def get_last_lr(self) -> list[float]:
        """The groups' learning rates now."""
        return [float(g["lr"]) for g in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict needs to go on from here."""
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict(); sets the groups' rates. Raises StateError."""
        if not {"last_epoch", "base_lrs"} <= set(state) or len(state["base_lrs"]) != len(self.base_lrs):
            raise StateError(f"{type(self).__name__}: a scheduler's state has 'last_epoch' and "
                             f"{len(self.base_lrs)} 'base_lrs', got {dict(state)}")
        self.last_epoch, self.base_lrs = int(state["last_epoch"]), [float(b) for b in state["base_lrs"]]
        self.set_rates(self.last_epoch)


class StepLR(LRScheduler):
    """base * gamma^(t // step_size)."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1,
                 last_epoch: int = -1) -> None:
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer, last_epoch)

    def rate(self, t: int, base: float, index: int) -> float:
        return float(base * self.gamma ** (t // self.step_size))


class MultiStepLR(LRScheduler):
    """base * gamma^(number of milestones passed)."""

    def __init__(self, optimizer: Optimizer, milestones: Sequence[int], gamma: float = 0.1,
                 last_epoch: int = -1) -> None:
        self.milestones, self.gamma = sorted(milestones), gamma
        super().__init__(optimizer, last_epoch)

    def rate(self, t: int, base: float, index: int) -> float:
        return float(base * self.gamma ** sum(m <= t for m in self.milestones))


class ExponentialLR(LRScheduler):
    """base * gamma^t."""

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def rate(self, t: int, base: float, index: int) -> float:
        return float(base * self.gamma ** t)


class LambdaLR(LRScheduler):
    """base * lr_lambda(t); one function, or one for each group."""

    def __init__(self, optimizer: Optimizer,
                 lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
                 last_epoch: int = -1) -> None:
        n = len(optimizer.param_groups)
        self.lr_lambdas = [lr_lambda] * n if callable(lr_lambda) else list(lr_lambda)
        if len(self.lr_lambdas) != n:
            raise ValueError(f"LambdaLR: {len(self.lr_lambdas)} functions for {n} parameter groups; give "
                             f"one for each")
        super().__init__(optimizer, last_epoch)

    def rate(self, t: int, base: float, index: int) -> float:
        return base * self.lr_lambdas[index](t)


class LinearLR(LRScheduler):
    """base times a factor that goes from start_factor to end_factor in total_iters steps: a warm-up."""

    def __init__(self, optimizer: Optimizer, start_factor: float = 1 / 3, end_factor: float = 1.0,
                 total_iters: int = 5, last_epoch: int = -1) -> None:
        if not 0 < start_factor <= 1 or not 0 <= end_factor <= 1:
            raise ValueError(f"LinearLR: factors {start_factor} and {end_factor}; start lies in (0, 1], end "
                             f"in [0, 1]")
        self.start_factor, self.end_factor, self.total_iters = start_factor, end_factor, total_iters
        super().__init__(optimizer, last_epoch)

    def rate(self, t: int, base: float, index: int) -> float:
        done = min(t, self.total_iters) / self.total_iters
        return base * (self.start_factor + (self.end_factor - self.start_factor) * done)


class CosineAnnealingLR(LRScheduler):
    """eta_min + (base - eta_min) * (1 + cos(pi t / T_max)) / 2 (arXiv:1608.03983, eq. 5)."""

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer, last_epoch)

    def rate(self, t: int, base: float, index: int) -> float:
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * t / self.T_max)) / 2


class OneCycleLR(LRScheduler):
    """Up to max_lr and down again within total_steps (arXiv:1708.07120); torch's defaults, without momentum
    cycling.

    The rate starts at max_lr / div_factor, rises over the first pct_start of the steps, and ends at the
    start's value divided by final_div_factor; anneal_strategy is "cos" or "linear".
    """

    def __init__(self, optimizer: Optimizer, max_lr: float | Sequence[float], total_steps: int | None = None,
                 epochs: int | None = None, steps_per_epoch: int | None = None, pct_start: float = 0.3,
                 anneal_strategy: str = "cos", div_factor: float = 25.0, final_div_factor: float = 1e4,
                 last_epoch: int = -1) -> None:
        if total_steps is None:
            if epochs is None or steps_per_epoch is None:
                raise ValueError("OneCycleLR: give total_steps, or epochs and steps_per_epoch")
            total_steps = epochs * steps_per_epoch
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"OneCycleLR: anneal_strategy is {anneal_strategy!r}; use 'cos' or 'linear'")
        self.total_steps, self.pct_start, self.anneal_strategy = total_steps, pct_start, anneal_strategy
        self.div_factor, self.final_div_factor = div_factor, final_div_factor
        n = len(optimizer.param_groups)
        self.max_lrs = [float(max_lr)] * n if isinstance(max_lr, int | float) else [float(v) for v in max_lr]
        if len(self.max_lrs) != n:
            raise ValueError(f"OneCycleLR: {len(self.max_lrs)} rates for {n} parameter groups; give one "
                             f"for each")
        super().__init__(optimizer, last_epoch)

    def rate(self, t: int, base: float, index: int) -> float:
        if t > self.total_steps:
            raise ValueError(f"OneCycleLR: step {t} of {self.total_steps}; it was made for fewer steps")
        top = self.max_lrs[index]
        start = top / self.div_factor
        turn = self.pct_start * self.total_steps - 1
        if t <= turn:
            return self._between(start, top, t / turn)
        return self._between(top, start / self.final_div_factor, (t - turn) / (self.total_steps - 1 - turn))

    def _between(self, a: float, b: float, part: float) -> float:
        if self.anneal_strategy == "linear":
            return a + (b - a) * part
        return b + (a - b) / 2 * (math.cos(math.pi * part) + 1)


class SequentialLR(LRScheduler):
    """The schedules one after the other; schedule i + 1 begins (at its own step 0) at milestones[i]."""

    def __init__(self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], milestones: Sequence[int],
                 last_epoch: int = -1) -> None:
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(f"SequentialLR: {len(schedulers)} schedules need {len(schedulers) - 1} "
                             f"milestones, got {len(milestones)}")
        if any(s.optimizer is not optimizer for s in schedulers):
            raise ValueError("SequentialLR: all schedules must be of the same optimizer")
        self.schedulers, self.milestones = list(schedulers), list(milestones)
        super().__init__(optimizer, last_epoch)

    def rate(self, t: int, base: float, index: int) -> float:
        phase = sum(m <= t for m in self.milestones)
        begun = self.milestones[phase - 1] if phase else 0
        return self.schedulers[phase].rate(t - begun, base, index)


__all__ = ["CosineAnnealingLR", "ExponentialLR", "LRScheduler", "LambdaLR", "LinearLR", "MultiStepLR",
           "OneCycleLR", "SequentialLR", "StepLR"]
