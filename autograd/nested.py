"""Differentiation inside a vjp: the gradient of a composition, itself on the tape when that is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from meshtape.autograd.tape import AnyNode, Edge, set_grad_enabled, walk
from meshtape.autograd.tensor import Tensor, make
from meshtape.runtime.dtypes import is_differentiable
from meshtape.scheduler import current
from meshtape.scheduler.session import Session


class Gate(AnyNode):
    """Where an input enters a composition. While it has no edges, gradients end here; with the input's edge
    they pass."""

    __slots__ = ()

    def __init__(self) -> None:
        self.edges = ()
        self.hooks = None

    def backward(self, grads: list[Tensor | None], session: Session) -> Sequence[Tensor | None]:
        return grads


def differentiate(function: Callable[..., Any], inputs: Sequence[Any],
                  cotangents: Sequence[Any]) -> list[Tensor | None]:
    """See meshtape.runtime.ops.nested.differentiate.

    `function` runs on inputs that are cut off from what they were computed from; when the walk that asked for
    this is recorded, they are joined to it afterwards.
    """
    session = current.session()
    recorded = session.grad_enabled
    gates = [Gate() if isinstance(x, Tensor) and is_differentiable(x.dtype) else None for x in inputs]
    fresh = [x if gate is None else make(x.block, x.spec, (gate, 0))
             for x, gate in zip(inputs, gates, strict=True)]
    with set_grad_enabled(True):
        outs = function(*fresh)
    roots = [(o.edge, c) for o, c in zip(outs, cotangents, strict=True)
             if c is not None and o is not None and o.edge is not None]
    captured: dict[Edge, Tensor | None] = {(gate, 0): None for gate in gates if gate is not None}
    walk(roots, retain_graph=True, create_graph=recorded, captured=captured)
    for x, gate in zip(inputs, gates, strict=True):
        if gate is not None:
            gate.edges = (x.edge,)
    return [None if gate is None else captured[gate, 0] for gate in gates]


Tensor._differentiate = staticmethod(differentiate)  # type: ignore[attr-defined]
