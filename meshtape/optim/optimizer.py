"""Optimizer: parameter groups, state, and a step that records one update instruction for each group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.autograd.replay import Trace, remember
from meshtape.autograd.tensor import owner_session
from meshtape.creation import zeros_like
from meshtape.gradmode import enable_grad
from meshtape.runtime.dtypes import is_floating
from meshtape.runtime.errors import DTypeError, StateError
from meshtape.runtime.op import Op, lookup
from meshtape.runtime.shards import REPLICATE, Placements, is_partial
from meshtape.scheduler.interrupt import Whole
from meshtape.scheduler.layout import Spec
from meshtape.scheduler.session import Recording
from meshtape.scheduler.sites import user_site

FULL = lookup("full")
# Bytes of parameters from which dividing their update is worth a collective more.
SPLIT_FROM = 1 << 18
Group = dict[str, Any]
State = dict[str, Any]
UNSEEN: State = {"step": 0}


class Optimizer:
    """Base of all optimizers.

    `param_groups` is a list of dicts with "params" and hyperparameters, which may be changed between steps;
    `state` maps each parameter to a dict of its step count and state tensors. These are laid out like the
    parameter; where many replicated parameters have gradients in addends (data parallelism), each worker
    holds and updates one part of every state and parameter instead, and the parts of the new parameters are
    gathered: the same bytes travel as in an all-reduce, and the update's time and memory are divided among
    the workers (Xu et al. 2020, arXiv:2004.13336; ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054).
    """

    def __init__(self, params: Iterable[Any], defaults: Mapping[str, Any]) -> None:
        self.defaults = dict(defaults)
        self.param_groups: list[Group] = []
        self._known: dict[Any, tuple[Recording, list[Spec]]] = {}   # updates that can be repeated
        self.state: dict[Tensor, State] = {}
        self._homes: dict[Tensor, tuple[Any, Placements]] = {}  # spec, and where a tensor of it is updated
        given = [params] if isinstance(params, Tensor) else list(params)
        if not given:
            raise ValueError(f"{type(self).__name__}: no parameters; pass model.parameters()")
        for group in given if isinstance(given[0], Mapping) else [{"params": given}]:
            self.add_param_group(group)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with hyperparameters of their own. Raises ValueError on one that is in a group
        already.
        """
        name = type(self).__name__
        unknown = set(group) - set(self.defaults) - {"params", "initial_lr", "name"}
        if unknown:
            raise ValueError(f"{name}: a group sets {sorted(unknown)}; its hyperparameters are "
                             f"{sorted(self.defaults)}")
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        known = {id(p) for g in self.param_groups for p in g["params"]}
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(f"{name}: parameters are tensors, got a {type(p).__name__}")
            if not p.is_leaf:
                raise ValueError(f"{name}: a computed tensor of shape {p.shape} cannot be optimized; pass "
                                 f"leaves")
            if not is_floating(p.dtype):
                raise DTypeError(f"{name}: a parameter has dtype {p.dtype}; use a floating dtype")
            if id(p) in known:
                raise ValueError(f"{name}: a parameter of shape {p.shape} is in two groups or twice in one")
            known.add(id(p))
        made = {"params": params, **self.defaults, **{k: v for k, v in group.items() if k != "params"}}
        self.check_group(made)
        self.param_groups.append(made)

    def check_group(self, group: Group) -> None:
        """Raise ValueError for hyperparameters that make no sense."""
        for key in ("lr", "momentum", "weight_decay", "eps", "alpha", "lr_decay",
                    "initial_accumulator_value"):
            value = group.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int | float | np.number) or value < 0:
                raise ValueError(f"{type(self).__name__}: {key} is {value!r}; use a number of 0 or more")
        for beta in group.get("betas", ()):
            if not 0 <= beta < 1:
                raise ValueError(f"{type(self).__name__}: betas are {group['betas']}; each lies in [0, 1)")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the parameters' gradients, or set them to zeros."""
        for group in self.param_groups:
            for p in group["params"]:
                if getattr(p, "_grad", None) is not None:
                    p._grad = None if set_to_none else zeros_like(p)

    # --- stepping -----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and send the batch; does not wait.

        `closure`, if given, computes the loss anew (with gradients) first, and its result is returned.
        """
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        work = [(group, params) for group in self.param_groups for params in self._alike(group)]
        if not work:
            return loss
        session = owner_session(work[0][1][0])
        enabled, site = session.grad_enabled, session.site
        with Whole():       # Ctrl-C does not leave some parameters updated and others not
            try:
                session.grad_enabled = False
                session.site = site or user_site()
                for group, params in work:
                    self.update(group, params)
            finally:
                session.grad_enabled, session.site = enabled, site
        session.flush()
        return loss

    def _alike(self, group: Group) -> list[list[Tensor]]:
        """The group's parameters with gradients, those of one step count and kind of state together (usually
        all).
        """
        found: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            if getattr(p, "_grad", None) is not None:
                state = self.state.get(p, UNSEEN)
                found.setdefault((state["step"], *state), []).append(p)
        return list(found.values())

    def update(self, group: Group, params: list[Tensor]) -> None:
        """Update `params`, which have gradients and one step count, under the group's hyperparameters."""
        raise NotImplementedError

    def state_of(self, p: Tensor, names: Iterable[str]) -> State:
        """The state of a parameter; tensors that it lacks start as zeros."""
        state = self.state.get(p)
        if state is None:
            state = self.state[p] = {"step": 0}
        for name in names:
            if name not in state:
                home = self._homes[p][1] if p in self._homes else p.spec.placements
                state[name] = apply(FULL, (0.0,), FULL.pack({"shape": p.shape, "dtype": p.dtype.name}), home)
        return state

    def _place(self, params: Sequence[Tensor]) -> None:
        """Note where each parameter is updated, for those whose layout is new."""
        homes = self._homes
        new = [p for p in params if p not in homes or homes[p][0] is not p.spec]
        if new:
            addends = [p for p in new if p.raw_grad is not None and p.raw_grad.spec.partial]
            split = sum(p.spec.nbytes for p in addends) >= SPLIT_FROM
            homes.update((p, (p.spec, p.spec.placements)) for p in new)
            if split:
                homes.update((p, (p.spec, split_home(p.spec, p.raw_grad.spec))) for p in addends)

    def _gradient(self, p: Tensor) -> Any:
        """The gradient where the parameter is updated."""
        home, found = self._homes[p][1], p.raw_grad
        return p.grad if home == p.spec.placements or found is None else found.to_placements(home)

    def run(self, op: str, scalars: tuple[Any, ...], params: list[Tensor], names: tuple[str, ...],
            **attrs: Any) -> None:
        """Record one multi-tensor update and rebind the parameters and the states `names` to its results.

        What it records for tensors of the same specs is noted once and repeated, with other blocks and
        scalars.
        """
        row = lookup(op)
        packed = row.pack({"n": len(params), **attrs})
        states = self._states_of(params, names)
        held = params + [s[name] for name in names for s in states]
        grads = [p._grad for p in params]
        operands = [*scalars, *[t.block for t in held], *[g.block for g in grads]]
        key = (row, packed, *[t.spec for t in held], *[g.spec for g in grads])
        session, found = owner_session(params[0]), self._known.get(key)
        if found is None:
            with Trace(session) as trace:
                made = self._update(row, packed, scalars, params, held[len(params):])
            blocks, specs = [t.block for t in made], [t.spec for t in made]
            noted = trace.recording(operands, blocks, in_order=True)
            if noted is not None and noted[1] == list(range(len(blocks))):
                remember(self._known, key, (noted[0], specs))
        else:
            recording, specs = found
            blocks = session.repeat(recording, operands, session.site or user_site())
        for t, block, spec in zip(held, blocks, specs, strict=True):
            t.block = block
            t.spec = spec
        for state in states:
            state["step"] += 1

    def _states_of(self, params: list[Tensor], names: tuple[str, ...]) -> list[State]:
        """The states of parameters that are alike in what they have."""
        first = self.state.get(params[0])
        if first is not None and all(name in first for name in names):
            return [self.state[p] for p in params]
        self._place(params)
        return [self.state_of(p, names) for p in params]

    def _update(self, row: Op, packed: tuple[Any, ...], scalars: tuple[Any, ...], params: list[Tensor],
                states: list[Tensor]) -> list[Tensor]:
        """The updated parameters, each in its own layout, and their states."""
        self._place(params)
        grads = [self._gradient(p) for p in params]
        outs = apply(row, (*scalars, *params, *grads, *states), packed)
        new = [o.to_placements(p.spec.placements) for o, p in zip(outs, params, strict=False)]
        return [*new, *outs[len(params):]]

    def rebind(self, p: Tensor, value: Tensor) -> None:
        """Let the parameter hold `value`, in its own layout; the handle and its place on the tape stay."""
        value = value.to_placements(p.spec.placements)
        p.block, p.spec = value.block, value.spec

    # --- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """{"state": {number: {...}}, "param_groups": [...]}: parameters by number, in order of the groups."""
        number = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        numbered = lambda group: {**group, "params": [number[id(p)] for p in group["params"]]}
        return {"state": {number[id(p)]: _snapshot(s) for p, s in self.state.items() if id(p) in number},
                "param_groups": [numbered(group) for group in self.param_groups]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over hyperparameters and state (tensors or arrays) of an optimizer with equal groups.

        Raises StateError, and then nothing was loaded.
        """
        groups, states = self._checked(state_dict)
        for group, found in zip(self.param_groups, groups, strict=True):
            group.update(found)
        self.state = {p: {"step": 0, **{k: _state_value(k, v, p) for k, v in state.items()}}
                      for p, state in states.items()}

    def _checked(self, state_dict: Any) -> tuple[list[Group], dict[Tensor, Mapping[str, Any]]]:
        """The hyperparameters of each group, and the given state of each parameter."""
        who = f"{type(self).__name__}.load_state_dict"
        try:
            given = [dict(g) for g in state_dict["param_groups"]]
            counts = [len(g.pop("params")) for g in given]
            states = {int(i): dict(s) for i, s in state_dict["state"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise StateError(f"{who}: not an optimizer's state ({error!r}); it is a dict with 'state' and "
                             f"'param_groups'") from error
        have = [len(g["params"]) for g in self.param_groups]
        if counts != have:
            raise StateError(f"{who}: this optimizer's groups have {have} parameters, the state's {counts}")
        groups = [self._checked_group(who, found) for found in given]
        params = [p for g in self.param_groups for p in g["params"]]
        for i, state in states.items():
            if not 0 <= i < len(params):
                raise StateError(f"{who}: a state for parameter {i}, but there are {len(params)}")
            for name, value in state.items():
                shape = tuple(getattr(value, "shape", params[i].shape))
                if name != "step" and shape != params[i].shape:
                    raise StateError(f"{who}: {name} of parameter {i} has shape {shape}, the parameter "
                                     f"{params[i].shape}")
        return groups, {params[i]: state for i, state in states.items()}

    def _checked_group(self, who: str, found: Group) -> Group:
        """Hyperparameters from a state; lists (of a file) become tuples."""
        group = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        missing = [k for k in self.defaults if k not in group]
        if missing:
            raise StateError(f"{who}: a group without {', '.join(missing)}; this is the state of another "
                             f"optimizer")
        try:
            self.check_group(group)
        except ValueError as error:
            raise StateError(f"{who}: {error}") from error
        return group

    def __repr__(self) -> str:
        values = lambda group: "\n".join(f"    {k}: {v}" for k, v in sorted(group.items()) if k != "params")
        lines = [f"Parameter Group {i}\n{values(group)}" for i, group in enumerate(self.param_groups)]
        return f"{type(self).__name__} (\n" + "\n\n".join(lines) + "\n)"


def split_home(spec: Spec, grad: Spec) -> Placements:
    """The placements of a parameter with every mesh axis that it is replicated on, and its gradient Partial,
    splitting a dimension of its own: the first that gives each worker something.
    """
    home = list(spec.placements)
    for axis, n in enumerate(spec.owner.axes.shape):
        if n > 1 and home[axis] == REPLICATE and is_partial(grad.placements[axis]):
            free = [d for d, extent in enumerate(spec.shape) if extent >= n and d not in home]
            home[axis] = free[0] if free else REPLICATE
    return tuple(home)


def _snapshot(state: State) -> State:
    """The state with handles of its own on its tensors: training on does not change what they hold."""
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}


def _state_value(name: str, value: Any, p: Tensor) -> Any:
    """The step as an int, a state tensor in its parameter's dtype and layout, any other number as it is."""
    if name == "step":
        return int(value)
    if not hasattr(value, "shape"):
        return value
    tensor = as_tensor(value).detach()
    if tensor.dtype != p.dtype:
        tensor = tensor.astype(p.dtype)
    return tensor.to_placements(p.spec.placements)


__all__ = ["Optimizer"]
