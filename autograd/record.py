"""apply: the one way an op is recorded, with its plan, its blocks and its place on the tape."""

from __future__ import annotations

from typing import Any

import numpy as np

from meshtape.autograd.tape import Node
from meshtape.autograd.tensor import Tensor, as_tensor, make
from meshtape.runtime.errors import SessionClosed
from meshtape.runtime.op import Op
from meshtape.runtime.shards import Placements
from meshtape.scheduler import current
from meshtape.scheduler.planner import Plan
from meshtape.scheduler.session import Session


def apply(op: Op, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = (),
          placements: Placements | None = None) -> Any:
    """Record `op` on tensors and Python scalars; returns a tensor, or a tuple of them.

    NumPy arrays and nested lists become tensors first. `attrs` are the op's attribute values in wire order;
    `placements` fixes the layout of what a creation op makes.
    """
    session = current.active or current.session()
    weak = session.specs.weak
    specs: list[Any] = [op, attrs, placements]
    blocks: list[Any] = []
    tracked = False
    for x in inputs:
        if isinstance(x, Tensor):
            specs.append(x.spec)
            blocks.append(x.block)
            if x.edge is not None:
                tracked = True
            continue
        spec = weak.get(type(x))
        if spec is None:
            return apply(op, tuple(as_operand(y) for y in inputs), attrs, placements)
        specs.append(spec)
        blocks.append(x)
    key = tuple(specs)
    plan = session.plans.get(key)
    if plan is None:
        plan = new_plan(session, key)
    made = session.record(plan, blocks)
    single = plan.single
    if tracked and session.grad_enabled and plan.differentiable:
        node = Node(plan, tuple([x.edge if isinstance(x, Tensor) else None for x in inputs]), blocks, made,
                    session)
        if single is not None:
            return make(made[0], single, (node, 0))
        return tuple([make(b, s, (node, i) if s.differentiable else None)
                      for i, (b, s) in enumerate(zip(made, plan.outs, strict=True))])
    if single is not None:
        return make(made[0], single, None)
    return tuple([make(b, s, None) for b, s in zip(made, plan.outs, strict=True)])


def new_plan(session: Session, key: tuple[Any, ...]) -> Plan:
    """Plan an op that was not seen with these specs before."""
    session.check()
    op, attrs, placements, *specs = key
    for spec in specs:
        if spec.owner is not session.specs:
            raise SessionClosed(f"{op.name}: a tensor of shape {spec.shape} belongs to a mesh that was shut down "
                                f"or replaced; make it again on the current mesh")
    plan = session.planner.plan(op, attrs, tuple(specs), placements)
    session.plans[key] = plan
    return plan


def as_operand(x: Any) -> Any:
    """A tensor, or a Python scalar (NumPy's scalars count as Python's: they never widen a result)."""
    if isinstance(x, Tensor) or type(x) in (bool, int, float, complex):
        return x
    if isinstance(x, np.generic | bool | int | float | complex):
        return x.item() if isinstance(x, np.generic) else complex(x) if isinstance(x, complex) else float(x)
    return as_tensor(x)


Tensor._apply = staticmethod(apply)
