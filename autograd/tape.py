"""The tape: one Node per recorded op that a gradient flows through, and the walk backwards over it.

Define-by-run: a node is made when its op is recorded, knows its inputs' nodes, and keeps alive only the
blocks that its op's `keeps` names. The vjps record ordinary ops, so a gradient is planned and split like
anything else, and with create_graph it is itself on the tape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from typing import Any

from meshtape.autograd.autocast import Region, enter, resumed
from meshtape.autograd.replay import Survey, Trace, noted_walk, remember, replay, survey
from meshtape.autograd.tensor import Tensor, make
from meshtape.runtime.dtypes import is_differentiable
from meshtape.runtime.errors import GradError, ShapeError
from meshtape.runtime.op import lookup
from meshtape.runtime.shards import is_partial
from meshtape.scheduler import current
from meshtape.scheduler.interrupt import Whole
from meshtape.scheduler.planner import Plan
from meshtape.scheduler.session import Session
from meshtape.scheduler.sites import Site, site_text, user_site

Edge = tuple["AnyNode", int]
FULL = lookup("full")
Hook = Callable[[Tensor], Tensor | None]


class AnyNode:
    """A place on the tape: `edges` lead to where the gradients of the inputs go."""

    __slots__ = ("__weakref__", "edges", "hooks")

    edges: tuple[Edge | None, ...]
    hooks: dict[int, list[Hook]] | None
    plan: Plan | None = None
    replayable = False

    @property
    def n_out(self) -> int:
        return 1

    def backward(self, grads: list[Tensor | None], session: Session) -> Sequence[Tensor | None]:
        """Gradients of the inputs, given those of the outputs."""
        return [None] * len(self.edges)

    def release(self) -> None:
        """Drop what was kept for backward."""

    def hook(self, index: int, function: Hook) -> Callable[[], None]:
        """Call `function` on the gradient of output `index`; returns what removes it."""
        if self.hooks is None:
            self.hooks = {}
        here = self.hooks.setdefault(index, [])
        here.append(function)
        return lambda: here.remove(function)


class Node(AnyNode):
    """One recorded op, made by apply(): `kept_in` are the inputs at `plan.kept`, `kept_out` all outputs."""

    __slots__ = ("kept_in", "kept_out", "plan", "site")

    plan: Plan  # type: ignore[assignment]
    kept_in: Sequence[Any] | None       # None: freed by a backward
    kept_out: Any                       # list of Blocks, or None
    site: Site

    @property
    def n_out(self) -> int:
        return len(self.plan.outs)

    @property
    def name(self) -> str:
        return self.plan.op.name

    def release(self) -> None:
        if self.plan.frees:
            self.kept_in = self.kept_out = None

    def backward(self, grads: list[Tensor | None], session: Session) -> Sequence[Tensor | None]:
        if self.kept_in is None:
            where = f" (recorded at {site_text(self.site)})" if self.site else ""
            raise GradError(f"backward a second time through {self.name}{where}: what it kept was freed by "
                            f"the first; pass retain_graph=True to the first backward()")
        plan, edges = self.plan, self.edges
        inputs: list[Any] = list(plan.in_specs)
        for i, x in zip(plan.kept, self.kept_in, strict=True):
            inputs[i] = x if inputs[i].weak else make(x, inputs[i], edges[i])
        out: Any
        g: Any
        if plan.single is not None:
            g = grads[0]
            out = make(self.kept_out[0], plan.single, (self, 0)) if self.kept_out is not None else plan.single
        else:
            g = tuple(grads)
            out = tuple(make(self.kept_out[k], s, (self, k) if s.differentiable else None)
                        if k in plan.kept_outputs else s for k, s in enumerate(plan.outs))
        vjp = plan.op.vjp
        if not isinstance(vjp, tuple):
            assert vjp is not None
            found = vjp(g, out, *inputs, **plan.attrs)
        else:
            if plan.op.variadic and len(vjp) != len(inputs):
                vjp = (*vjp, *[vjp[-1]] * (len(inputs) - len(vjp)))
            found = [f(g, out, *inputs, **plan.attrs) if edge is not None and f is not None else None
                     for f, edge in zip(vjp, edges, strict=True)]
        return [r if r is None or e is None or r.dtype == s.dtype else r.astype(s.dtype)
                for r, s, e in zip(found, plan.in_specs, edges, strict=True)]


class Leaf(AnyNode):
    """Where a gradient ends: it is laid out like its tensor, or Partial, and added to `.grad`."""

    __slots__ = ("tensor",)
    replayable = True

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.edges = ()
        self.hooks = None

    def accumulate(self, grad: Tensor) -> None:
        tensor = self.tensor()
        if tensor is None:
            return
        if grad.spec is not tensor.spec:
            # Addends stay where they are: whoever reads the gradient knows best how to reduce it.
            grad = grad.to_placements(tuple(
                g if is_partial(g) else t
                for g, t in zip(grad.spec.placements, tensor.spec.placements, strict=True)))
        old = tensor.raw_grad
        tensor._grad = grad if old is None else old + grad


class CheckpointNode(AnyNode):
    """A function whose inner tape is thrown away after forward and recorded again for backward."""

    __slots__ = ("args", "count", "draws", "function", "region")

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], draws: int,
                 region: Region | None) -> None:
        self.function = function
        self.region = region
        self.args: Sequence[Any] | None = args
        self.draws = draws
        self.hooks = None
        self.edges = tuple(a.edge if isinstance(a, Tensor) else None for a in args)
        self.count = 1

    @property
    def n_out(self) -> int:
        return self.count

    def release(self) -> None:
        self.args = None

    def backward(self, grads: list[Tensor | None], session: Session) -> Sequence[Tensor | None]:
        if self.args is None:
            raise GradError(
                "backward a second time through checkpoint(): pass retain_graph=True to the first"
            )
        args = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.edge is not None else a
                for a in self.args]
        draws = session.draws
        try:
            session.draws = self.draws
            with set_grad_enabled(True), resumed(session, self.region):
                out = self.function(*args)
        finally:
            session.draws = draws
        outs = out if isinstance(out, tuple | list) else (out,)
        roots = [
            (o.edge, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.edge is not None
        ]
        if roots:
            walk(roots, retain_graph=False, create_graph=session.grad_enabled)
        return [a.grad if isinstance(a, Tensor) and e is not None else None
                for a, e in zip(args, self.edges, strict=True)]


# --- the walk -----------------------------------------------------------------------------------------

def walk(roots: Sequence[tuple[Edge, Tensor | Callable[[], Tensor]]], *, retain_graph: bool,
         create_graph: bool, captured: dict[Edge, Tensor | None] | None = None) -> None:
    """Send gradients from `roots` back over the tape, without recursion.

    A gradient is a tensor, or what records it. Leaves accumulate into `.grad`, unless `captured` names the
    edges whose gradients are wanted instead. Nothing is cast by autocast: a derivative computes in the dtypes
    that its op did.
    """
    session = current.session()
    enabled, site, region = session.grad_enabled, session.site, session.autocast
    try:
        if region is not None:
            enter(session, None)
        session.grad_enabled = create_graph
        session.site = site or user_site()
        if len(roots) == 1 and not create_graph and captured is None and "record" not in vars(session):
            (root, index), gradient = roots[0]
            known = gradient if isinstance(gradient, Tensor) else None
            seen = None if index else survey(root, known, session)
            if seen is not None:
                _remembered(roots, seen, session, session.site)
                if not retain_graph:
                    for node in seen.freed:
                        node.kept_in = node.kept_out = None
                return
        _walk(roots, session, retain_graph, captured)
    finally:
        session.grad_enabled = enabled
        session.site = site
        if region is not None:
            enter(session, region)


def _remembered(roots: Sequence[tuple[Edge, Tensor | Callable[[], Tensor]]], seen: Survey, session: Session,
                site: Site) -> None:
    """Replay the walk if one over such a tape was noted; else walk and note it."""
    found = session.replays.get(seen.key)
    if found is not None:
        replay(found, seen, session, site)
        return
    with Whole(), Trace(session) as trace:
        _walk(roots, session, True, None)
    remember(session.replays, seen.key, noted_walk(trace, seen))


def _walk(roots: Sequence[tuple[Edge, Tensor | Callable[[], Tensor]]], session: Session, retain_graph: bool,
          captured: dict[Edge, Tensor | None] | None) -> None:
    """Node by node: run hooks, run the vjp, pass on the gradients; a node runs once all its consumers have.
    """
    waiting = count_consumers([edge[0] for edge, _ in roots])
    grads: dict[AnyNode, list[Tensor | None]] = {}
    for (node, index), g in roots:
        add_grad(grads, node, index, g if isinstance(g, Tensor) else g())
    ready = [node for node in dict.fromkeys(edge[0] for edge, _ in roots) if node not in waiting]
    wanted: dict[AnyNode, list[int]] = {}
    for edge in captured or ():
        wanted.setdefault(edge[0], []).append(edge[1])
    while ready:
        node = ready.pop()
        here = grads.pop(node, None)
        if here is not None:
            if node.hooks:
                run_hooks(node.hooks, here)
            if captured is not None:
                captured.update({(node, k): here[k] for k in wanted.get(node, ())})
            elif isinstance(node, Leaf) and here[0] is not None:
                node.accumulate(here[0])
        edges = node.edges
        if not edges:
            continue
        results = node.backward(here, session) if here is not None else [None] * len(edges)
        if not retain_graph:
            node.release()
        for target_edge, result in zip(edges, results, strict=True):
            if target_edge is None:
                continue
            target = target_edge[0]
            if result is not None:
                add_grad(grads, target, target_edge[1], result)
            left = waiting[target] - 1
            waiting[target] = left
            if not left:
                ready.append(target)


def count_consumers(roots: Sequence[AnyNode]) -> dict[AnyNode, int]:
    """How many edges lead to each node that can be reached from the roots."""
    waiting: dict[AnyNode, int] = {}
    seen = set(roots)
    stack = list(seen)
    while stack:
        for edge in stack.pop().edges:
            if edge is not None:
                node = edge[0]
                if node in waiting:
                    waiting[node] += 1
                else:
                    waiting[node] = 1
                    if node not in seen:
                        seen.add(node)
                        stack.append(node)
    return waiting


def add_grad(grads: dict[AnyNode, list[Tensor | None]], node: AnyNode, index: int, g: Tensor) -> None:
    here = grads.get(node)
    if here is None:
        here = grads[node] = [None] * node.n_out
    old = here[index]
    here[index] = g if old is None else old + g


def run_hooks(hooks: dict[int, list[Hook]], grads: list[Tensor | None]) -> None:
    for index, functions in hooks.items():
        for hook in list(functions):
            g = grads[index]
            if g is not None:
                changed = hook(g)
                grads[index] = g if changed is None else changed


# --- what users call ------------------------------------------------------------------------------------

def backward(tensor: Tensor, gradient: Tensor | None = None, *, retain_graph: bool | None = None,
             create_graph: bool = False) -> None:
    """Accumulate the gradient of `tensor` into the `.grad` of every leaf it was computed from.

    `gradient` (same shape) is the gradient of whatever is differentiated with respect to `tensor`; a tensor
    of one element needs none. Raises GradError.
    """
    edge = root_edge(tensor, "backward()")
    walk([(edge, initial(tensor, gradient, "backward()"))],
         retain_graph=create_graph if retain_graph is None else retain_graph, create_graph=create_graph)


Tensor._backward = staticmethod(backward)


def grad(outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor],
         grad_outputs: Tensor | Sequence[Tensor | None] | None = None, *, retain_graph: bool | None = None,
         create_graph: bool = False, allow_unused: bool = False) -> tuple[Tensor | None, ...]:
    """Gradients of the sum of `outputs` with respect to `inputs`, without touching any `.grad`.

    Raises GradError where an input was not used, unless allow_unused (then its gradient is None).
    """
    outs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    ins = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    seeds: list[Tensor | None] = ([None] * len(outs) if grad_outputs is None else
                                  [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs))
    if len(seeds) != len(outs):
        raise GradError(f"grad(): {len(outs)} outputs but {len(seeds)} grad_outputs; give one for each")
    captured: dict[Edge, Tensor | None] = {root_edge(x, "grad()"): None for x in ins}
    walk([(root_edge(o, "grad()"), initial(o, s, "grad()")) for o, s in zip(outs, seeds, strict=True)],
         retain_graph=create_graph if retain_graph is None else retain_graph, create_graph=create_graph,
         captured=captured)
    found = tuple(captured[x.edge] for x in ins)
    if not allow_unused and any(g is None for g in found):
        missing = [i for i, g in enumerate(found) if g is None]
        raise GradError(f"grad(): inputs {missing} were not used to compute the outputs; pass "
                        f"allow_unused=True to get None for them")
    return tuple(None if g is None else g.to_placements(x.spec.placements)
                 for g, x in zip(found, ins, strict=True))


def root_edge(tensor: Tensor, who: str) -> Edge:
    edge: Edge | None = tensor.edge
    if edge is None:
        raise GradError(f"{who}: a tensor of shape {tensor.shape} does not require grad and was not computed "
                        f"from one that does; set requires_grad=True on an input, outside no_grad()")
    return edge


def initial(tensor: Tensor, gradient: Tensor | None, who: str) -> Tensor | Callable[[], Tensor]:
    """The gradient that starts the walk, or what records it: ones for a tensor of one element."""
    if gradient is None:
        if tensor.spec.shape and tensor.size != 1:
            raise GradError(f"{who}: a gradient starts from one number, but the tensor has shape "
                            f"{tensor.shape}; reduce it (.sum(), .mean()) or pass gradient= of that shape")
        return lambda: Tensor._apply(FULL, (1.0,), FULL.pack(  # type: ignore[no-any-return]
            {"shape": tensor.shape, "dtype": tensor.dtype.name}))
    from_user = gradient if isinstance(gradient, Tensor) else as_gradient(gradient, tensor)
    if from_user.shape != tensor.shape:
        raise ShapeError(
            f"{who}: gradient has shape {from_user.shape}, the tensor {tensor.shape}; they must agree"
        )
    return from_user


def as_gradient(value: Any, like: Tensor) -> Tensor:
    from meshtape.autograd.tensor import as_tensor
    return as_tensor(value, dtype=like.dtype)


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, keeping only `args` for backward: the rest is recomputed there.

    Random draws inside come out the same again. Returns what the function returns (a tensor or a tuple).
    """
    session = current.session()
    if not session.grad_enabled:
        return function(*args)
    node = CheckpointNode(function, args, session.draws, session.autocast)
    with set_grad_enabled(False):
        out = function(*args)
    outs = out if isinstance(out, tuple | list) else (out,)
    node.count = len(outs)
    made = tuple(make(o.block, o.spec, (node, i) if is_differentiable(o.dtype) else None)
                 for i, o in enumerate(outs))
    return made if isinstance(out, tuple | list) else made[0]


class set_grad_enabled(ContextDecorator):
    """Inside, ops are put on the tape (True) or not (False). Also decorates functions.

    A class, and not a generator: Ctrl-C inside of a generator's machinery would leave the tape switched off.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def _recreate_cm(self) -> set_grad_enabled:
        """One for each call of a decorated function, which may call itself."""
        return set_grad_enabled(self._enabled)

    def __enter__(self) -> None:
        self._session = current.session()
        self._before = self._session.grad_enabled
        self._session.grad_enabled = self._enabled

    def __exit__(self, *exc: object) -> None:
        self._session.grad_enabled = self._before


