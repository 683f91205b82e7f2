"""Layouts for a model's parameters, by name."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from meshtape.autograd import Tensor
from meshtape.nn.module import Module
from meshtape.nn.parameter import rebind
from meshtape.runtime.errors import LayoutError
from meshtape.scheduler.layout import AnyLayout, parse_layout

M = TypeVar("M", bound=Module)


def parallelize(model: M, plan: Mapping[str, AnyLayout]) -> M:
    """Lay out the model's parameters and buffers by name, in place, and return the model.

    `plan` maps names or glob patterns ("0.weight", "blocks.*.up.weight", "*") to layouts; where several
    match, the last one counts. Gradients move along. Raises LayoutError, before anything moves, for a pattern
    that matches nothing or a layout that does not fit.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    chosen: dict[str, AnyLayout] = {}
    for pattern, layout in plan.items():
        found = [n for n in tensors if n == pattern or fnmatchcase(n, pattern)]
        if not found:
            raise LayoutError(f"parallelize: {pattern!r} matches no parameter; this model has "
                              f"{', '.join(tensors)}")
        chosen.update(dict.fromkeys(found, layout))
    placed = []
    for name, layout in chosen.items():
        spec = tensors[name].spec
        try:
            placed.append((tensors[name], parse_layout(layout, spec.owner.axes, spec.ndim)))
        except LayoutError as error:
            raise LayoutError(f"parallelize: {name} of shape {spec.shape}: {error}") from error
    for tensor, placements in placed:
        moved = tensor.detach().to_placements(placements)
        grad = tensor.grad
        rebind(tensor, moved.block, moved.spec)
        if grad is not None:
            tensor.grad = grad.to_placements(placements)
    return model


__all__ = ["parallelize"]
