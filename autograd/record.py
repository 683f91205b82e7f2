"""apply: the one way an op is recorded, with its plan, its blocks and its place on the tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meshtape.autograd.tape import Leaf, Node
from meshtape.autograd.tensor import Tensor, as_tensor
from meshtape.runtime.errors import SessionClosed
from meshtape.runtime.op import Op, lookup
from meshtape.runtime.shards import Placements
from meshtape.scheduler import current
from meshtape.scheduler.layout import Spec
from meshtape.scheduler.planner import Plan
from meshtape.scheduler.session import Draw, Session
from meshtape.scheduler.sites import user_site

ASTYPE = lookup("astype")


def apply(op: Op, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = (),
          placements: Placements | None = None) -> Any:
    """Record `op` on tensors and Python scalars; returns a tensor, or a tuple of them.

    NumPy arrays and nested lists become tensors first. `attrs` are the op's attribute values in wire order;
    `placements` fixes the layout of what a creation op makes.
    """
    session = current.active or current.session()
    count = len(inputs)
    # Up to three tensors, nearly all calls, are taken apart without a loop: that halves the cost.
    if count == 2 and isinstance(x := inputs[0], Tensor) and isinstance(y := inputs[1], Tensor):
        key: tuple[Any, ...] = (op, attrs, x.spec, y.spec)
        blocks: list[Any] = [x.block, y.block]
        edges: tuple[Any, ...] = (x.edge, y.edge)
        tracked = x.edge is not None or y.edge is not None
    elif count == 1 and isinstance(x := inputs[0], Tensor):
        key = (op, attrs, x.spec)
        blocks = [x.block]
        edges = (x.edge,)
        tracked = x.edge is not None
    elif (count == 3 and isinstance(x := inputs[0], Tensor) and isinstance(y := inputs[1], Tensor)
          and isinstance(z := inputs[2], Tensor)):
        key = (op, attrs, x.spec, y.spec, z.spec)
        blocks = [x.block, y.block, z.block]
        edges = (x.edge, y.edge, z.edge)
        tracked = x.edge is not None or y.edge is not None or z.edge is not None
    else:
        specs, blocks, edges, tracked = taken_apart(inputs, session)
        key = (op, attrs, *specs)
    if placements is not None:
        key = (*key, placements)
    plan = session.plans.get(key)
    if plan is None:
        region = session.autocast
        change = None if region is None else region.change(op, attrs, key[2:2 + count])
        if change is not None:
            return apply(op, cast_inputs(inputs, change.dtypes, session), change.attrs, placements)
        plan = session.plans[key] = new_plan(session, key, key[2:2 + count], placements)
    site = session.site or user_site()
    made = session.record(plan, blocks, site)
    if tracked and plan.differentiable and session.grad_enabled:
        node = _new(Node)
        node.plan = plan
        node.edges = edges
        node.hooks = None
        node.kept_in = plan.keep(blocks)
        node.kept_out = made if plan.kept_outputs else None
        node.site = site
    else:
        node = None
    single = plan.single
    if single is not None:
        out: Tensor = _new(Tensor)
        out.block = made[0]
        out.spec = single
        out.edge = node if node is None else (node, 0)
        return out
    outs: list[Tensor] = []
    for block, spec in zip(made, plan.outs, strict=True):
        out = _new(Tensor)
        out.block = block
        out.spec = spec
        out.edge = (node, len(outs)) if node is not None and spec.differentiable else None
        outs.append(out)
    return tuple(outs)


_new = object.__new__


def taken_apart(inputs: Sequence[Any],
                session: Session) -> tuple[list[Spec], list[Any], tuple[Any, ...], bool]:
    """Specs, operands (blocks and scalars) and edges of any inputs, and whether there is an edge at all."""
    specs: list[Spec] = []
    blocks: list[Any] = []
    edges: list[Any] = []
    tracked = False
    for x in inputs:
        if isinstance(x, Tensor):
            specs.append(x.spec)
            blocks.append(x.block)
            edge = x.edge
            edges.append(edge)
            if edge is not None:
                tracked = True
            continue
        spec = session.weak.get(type(x))
        if spec is None:
            return taken_apart([as_operand(y) for y in inputs], session)
        specs.append(spec)
        blocks.append(x)
        edges.append(None)
    return specs, blocks, tuple(edges), tracked


def new_plan(session: Session, key: tuple[Any, ...], specs: Sequence[Spec],
             placements: Placements | None) -> Plan:
    """Plan an op that was not seen with these specs before, in this region of autocast."""
    session.check()
    known = session.planner.plans.get(key)
    if known is not None:
        return known
    op, attrs = key[:2]
    for spec in specs:
        if spec.owner is not session.specs:
            raise SessionClosed(f"{op.name}: a tensor of shape {spec.shape} belongs to a mesh that was shut "
                                f"down or replaced; make it again on the current mesh")
    plan = session.planner.plans[key] = session.planner.plan(op, attrs, tuple(specs), placements)
    return plan


def cast_inputs(inputs: Sequence[Any], dtypes: Sequence[Any], session: Session) -> tuple[Any, ...]:
    """The inputs in these dtypes (None: as it is).

    The 16-bit copy of a leaf that requires grad is shared by all that read it in the outermost region.
    """
    return tuple([x if d is None else _cast(as_tensor(x), d, session)
                  for x, d in zip(inputs, dtypes, strict=True)])


def _cast(x: Tensor, dtype: Any, session: Session) -> Tensor:
    if x.edge is None or type(x.edge[0]) is not Leaf or dtype.itemsize != 2:
        return apply(ASTYPE, (x,), (dtype.name,))  # type: ignore[no-any-return]
    key = (x.edge[0], dtype, session.grad_enabled)
    found = session.casts.get(key)
    if found is None or found[0] != x.block:        # a number: the parameter's old block is not kept alive
        found = session.casts[key] = (+x.block, apply(ASTYPE, (x,), (dtype.name,)))
    return found[1]  # type: ignore[no-any-return]


def as_operand(x: Any) -> Any:
    """A tensor, or a Python scalar (NumPy's scalars count as Python's: they never widen a result)."""
    if isinstance(x, Tensor) or type(x) in (bool, int, float, complex, Draw):
        return x
    if isinstance(x, np.generic | bool | int | float | complex):
        return x.item() if isinstance(x, np.generic) else complex(x) if isinstance(x, complex) else float(x)
    return as_tensor(x)


Tensor._apply = staticmethod(apply)
