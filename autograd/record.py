"""apply: the one way an op is recorded, with its plan, its blocks and its place on the tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meshtape.autograd.tape import Node
from meshtape.autograd.tensor import Tensor, as_tensor, make
from meshtape.runtime.errors import SessionClosed
from meshtape.runtime.op import Op
from meshtape.runtime.shards import Placements
from meshtape.scheduler import current
from meshtape.scheduler.layout import Spec
from meshtape.scheduler.planner import Plan
from meshtape.scheduler.session import Draw, Session
from meshtape.scheduler.sites import user_site


def apply(op: Op, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = (),
          placements: Placements | None = None) -> Any:
    """Record `op` on tensors and Python scalars; returns a tensor, or a tuple of them.

    NumPy arrays and nested lists become tensors first. `attrs` are the op's attribute values in wire order;
    `placements` fixes the layout of what a creation op makes.
    """
    session = current.active or current.session()
    key: list[Any] = [op, attrs]
    blocks: list[Any] = []
    edges: list[Any] = []
    tracked = False
    for x in inputs:
        if isinstance(x, Tensor):
            key.append(x.spec)
            blocks.append(x.block)
            edge = x.edge
            edges.append(edge)
            if edge is not None:
                tracked = True
            continue
        spec = session.weak.get(type(x))
        if spec is None:
            return apply(op, tuple([as_operand(y) for y in inputs]), attrs, placements)
        key.append(spec)
        blocks.append(x)
        edges.append(None)
    if placements is not None:
        key.append(placements)
    full_key = tuple(key)
    plan = session.plans.get(full_key)
    if plan is None:
        plan = new_plan(session, op, attrs, key[2:2 + len(inputs)], placements)
        session.plans[full_key] = plan
    site = session.site or user_site()
    made = session.record(plan, blocks, site)
    node = None
    if tracked and session.grad_enabled and plan.differentiable:
        node = Node(plan, tuple(edges), blocks, made, site)
    single = plan.single
    if single is not None:
        out: Tensor = _new(Tensor)
        out.block = made[0]
        out.spec = single
        out.edge = node if node is None else (node, 0)
        return out
    return tuple([make(b, s, (node, i) if node is not None and s.differentiable else None)
                  for i, (b, s) in enumerate(zip(made, plan.outs, strict=True))])


_new = object.__new__


def new_plan(session: Session, op: Op, attrs: tuple[Any, ...], specs: Sequence[Spec],
             placements: Placements | None) -> Plan:
    """Plan an op that was not seen with these specs before."""
    session.check()
    for spec in specs:
        if spec.owner is not session.specs:
            raise SessionClosed(f"{op.name}: a tensor of shape {spec.shape} belongs to a mesh that was shut "
                                f"down or replaced; make it again on the current mesh")
    return session.planner.plan(op, attrs, tuple(specs), placements)


def as_operand(x: Any) -> Any:
    """A tensor, or a Python scalar (NumPy's scalars count as Python's: they never widen a result)."""
    if isinstance(x, Tensor) or type(x) in (bool, int, float, complex, Draw):
        return x
    if isinstance(x, np.generic | bool | int | float | complex):
        return x.item() if isinstance(x, np.generic) else complex(x) if isinstance(x, complex) else float(x)
    return as_tensor(x)


Tensor._apply = staticmethod(apply)
