"""Clipping gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from meshtape.autograd import Tensor, apply
from meshtape.creation import zeros
from meshtape.gradmode import no_grad
from meshtape.manipulation import stack
from meshtape.runtime.errors import GradError
from meshtape.runtime.op import lookup


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0,
                    error_if_nonfinite: bool = False) -> Tensor:
    """Scale the gradients so that the norm of all of them together is at most `max_norm`; returns the norm
    before.

    The norm is that of one vector made of all gradients, whatever their layouts. Waits only if
    error_if_nonfinite (then GradError for a norm that is not finite).
    """
    held = _with_grad(parameters)
    if not held:
        return zeros(())
    with no_grad():
        total = grad_norm([g for _, g in held], norm_type)
        if error_if_nonfinite and not math.isfinite(total.item()):
            raise GradError(f"clip_grad_norm_: the gradients' norm is {total.item()}; look for inf or nan "
                            f"in the loss")
        # The constant is torch's; it keeps the quotient finite where all gradients are 0.
        factor = (max_norm / (total + 1e-6)).clip(max=1.0)
        for p, g in held:
            p.grad = g * (factor if factor.dtype == g.dtype else factor.astype(g.dtype))
    return total


def grad_norm(grads: list[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm (2, inf, or any p > 0) of all gradients as one vector: a tensor of shape (), not waited for.
    """
    if norm_type == 2.0:
        return _sum_of_squares(grads).sqrt()
    sizes = [g.abs() for g in grads]
    if norm_type == math.inf:
        return stack([s.max() for s in sizes]).max()
    powers = stack([(s ** norm_type).sum() for s in sizes])
    return powers.sum() ** (1.0 / norm_type)


def _sum_of_squares(grads: list[Tensor]) -> Tensor:
    """One instruction for all gradients that every worker holds whole, one for each that is split.

    The split ones give Partial numbers, which meet in one all-reduce.
    """
    row = lookup("sum_of_squares")
    whole = [g for g in grads if g.spec.placements == g.spec.owner.axes.replicated]
    parts: list[Any] = [apply(row, (g,)) for g in grads if g.spec.placements != g.spec.owner.axes.replicated]
    total: Any = parts[0] if parts else None
    for part in parts[1:]:
        total = total + part
    if whole:
        found = apply(row, tuple(whole))
        total = found if total is None else total + found
    return total


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Lower every gradient's elements to `clip_value` and raise them to `-clip_value`."""
    with no_grad():
        for p, g in _with_grad(parameters):
            p.grad = g.clip(-clip_value, clip_value)


def _with_grad(parameters: Tensor | Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return [(p, p.grad) for p in given if p.grad is not None]


__all__ = ["clip_grad_norm_", "clip_grad_value_", "grad_norm"]
