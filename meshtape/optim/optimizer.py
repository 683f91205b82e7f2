"""Optimizer: parameter groups, state, and a step that records one update instruction for each group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.autograd.autocast import resumed
from meshtape.autograd.replay import Trace, remember
from meshtape.autograd.tensor import owner_session
from meshtape.creation import zeros_like
from meshtape.elementwise import where
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
MASTER = "master_weight"


class Optimizer:
    """Base of all optimizers.

    `param_groups` is a list of dicts with "params" and hyperparameters, which may be changed between steps;
    `state` maps each parameter to a dict of its step count and state tensors. These are laid out like the
    parameter; where many replicated parameters have gradients in addends (data parallelism), each worker
    holds and updates one part of every state and parameter instead, and the parts of the new parameters are
    gathered: the same bytes travel as in an all-reduce, and the update's time and memory are divided among
    the workers (Xu et al. 2020, arXiv:2004.13336; ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054).

    master_weights: of every float16 or bfloat16 parameter keep a float32 copy in `state`, as "master_weight".
    That is what is updated (with float32 gradients and states), and then rounded to the parameter
    (Micikevicius et al. 2018, arXiv:1710.03740). When the parameter is given other values, so is the copy.

    A subclass defines update(), in terms of weight(), gradient(), put() and rebind(), or of run().
    """

    by_parts = False        # whether update() divides the work by run()

    def __init__(self, params: Iterable[Any], defaults: Mapping[str, Any], *,
                 master_weights: bool = True) -> None:
        self.defaults = dict(defaults)
        self.master_weights = bool(master_weights)
        self.skip: Tensor | None = None     # above 0 if the step is not to be taken; set by a GradScaler
        self._from_master: dict[Tensor, int] = {}       # the blocks that parameters got from their masters
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
        with Whole(), resumed(session, None):       # Ctrl-C does not leave some updated and others not
            try:
                session.grad_enabled = False
                session.site = site or user_site()
                for group, params in work:
                    self.update(group, params)
            finally:
                session.grad_enabled, session.site = enabled, site
        session.casts.clear()
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
                step = state["step"]
                count = step if type(step) is int else -1 - step.block      # one tensor, one number
                found.setdefault((count, *state), []).append(p)
        return list(found.values())

    def update(self, group: Group, params: list[Tensor]) -> None:
        """Update `params`, which have gradients and one step count, under the group's hyperparameters."""
        raise NotImplementedError

    def number(self, params: Sequence[Tensor]) -> Any:
        """The number of this step for parameters that are updated together: 1, 2, ... Where only the workers
        know how many steps were taken, it is a tensor; 0 says that this one is not."""
        step = 1 + self.state.get(params[0], UNSEEN)["step"]
        return step if self.skip is None else where(self.skip > 0, 0, step)

    def count(self, states: Sequence[State]) -> None:
        """Count the step in the states of parameters that were updated together."""
        before = states[0]["step"]
        step = before + 1 if self.skip is None else where(self.skip > 0, before, before + 1)
        for state in states:
            state["step"] = step

    def put(self, state: State, name: str, value: Tensor) -> Tensor:
        """Set a state tensor, unless the step is not to be taken; returns what it is then."""
        found = state[name] = value if self.skip is None else where(self.skip > 0, state[name], value)
        return found

    def state_of(self, p: Tensor, names: Iterable[str]) -> State:
        """The state of a parameter; tensors that it lacks start as zeros."""
        state = self.state.get(p)
        if state is None:
            state = self.state[p] = {"step": 0}
        home = self._homes[p][1] if p in self._homes else p.spec.placements
        has_master = self._has_master(p)
        if not has_master and MASTER in state:          # the parameter was made wider
            del state[MASTER], self._from_master[p]
        if has_master and (MASTER not in state or self._from_master.get(p) != p.block):
            state[MASTER] = p.detach().astype("float32").to_placements(home)
            self._from_master[p] = +p.block
        dtype = "float32" if has_master else p.dtype.name
        for name in names:
            if name not in state:
                state[name] = apply(FULL, (0.0,), FULL.pack({"shape": p.shape, "dtype": dtype}), home)
        return state

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype.itemsize == 2

    def weight(self, p: Tensor) -> Tensor:
        """What is updated: the parameter's values, or its master."""
        found = self.state[p].get(MASTER)
        return p.detach() if found is None else found

    def gradient(self, p: Tensor) -> Tensor:
        """The gradient, laid out and of the dtype as weight()."""
        grad, weight = p.grad, self.weight(p)
        assert grad is not None
        if not self._has_master(p):
            return grad
        return grad.astype("float32").to_placements(weight.spec.placements)

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
        """The gradient where the parameter is updated. Addends of 16 bits are added in float32."""
        home, found = self._homes[p][1], p.raw_grad
        if found is not None and self._has_master(p):
            return found.astype("float32").to_placements(home)
        return p.grad if home == p.spec.placements or found is None else found.to_placements(home)

    def reduced(self) -> list[Tensor]:
        """Every gradient in the layout in which the update reads it."""
        found = []
        for group in self.param_groups:
            for params in self._alike(group):
                if self.by_parts:
                    self._place(params)
                found += [self._gradient(p) if self.by_parts else p.grad for p in params]
        return found

    def run(self, op: str, scalars: tuple[Any, ...], params: list[Tensor], names: tuple[str, ...],
            **attrs: Any) -> None:
        """Record one multi-tensor update and rebind the parameters and the states `names` to its results.

        What it records for tensors of the same specs is noted once and repeated, with other blocks and
        scalars.
        """
        row = lookup(op)
        packed = row.pack({"n": len(params), **attrs})
        states = self._states_of(params, names)
        grads = [p._grad for p in params]
        held, low = self._held(params, states, names)
        key = (row, packed, low, *map(type, scalars), *[t.spec for t in held], *[g.spec for g in grads])
        session, found = owner_session(params[0]), self._known.get(key)
        if found is None:
            states = [self.state_of(p, names) for p in params]
            held, low = self._held(params, states, names)
            key = (row, packed, low, *map(type, scalars), *[t.spec for t in held], *[g.spec for g in grads])
        operands = [*[x.block if type(x) is Tensor else x for x in scalars],
                    *[t.block for t in held], *[g.block for g in grads]]
        if found is None:
            with Trace(session) as trace:
                made = self._update(row, packed, scalars, params, held, low)
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
        self._from_master.update((params[k], +params[k].block) for k in low)
        self.count(states)

    def _states_of(self, params: list[Tensor], names: tuple[str, ...]) -> list[State]:
        """The states of parameters that are alike in what they have."""
        first = self.state.get(params[0])
        from_master = self._from_master
        if first is not None and all(name in first for name in names) and (
                not from_master or all(from_master.get(p, p.block) == p.block for p in params)):
            return [self.state[p] for p in params]
        self._place(params)
        return [self.state_of(p, names) for p in params]

    def _held(self, params: list[Tensor], states: list[State],
              names: tuple[str, ...]) -> tuple[list[Tensor], tuple[int, ...]]:
        """The weights, the states, and the parameters that have masters; with the positions of these."""
        weights, low = params, ()
        if self._from_master:
            weights = [s.get(MASTER, p) for p, s in zip(params, states, strict=True)]
            low = tuple([k for k, s in enumerate(states) if MASTER in s])
        return weights + [s[name] for name in names for s in states] + [params[k] for k in low], low

    def _update(self, row: Op, packed: tuple[Any, ...], scalars: tuple[Any, ...], params: list[Tensor],
                held: list[Tensor], low: tuple[int, ...]) -> list[Tensor]:
        """What `held` will hold: the weights (parameters in their own layout, masters where they are
        updated), the states, and the parameters rounded from their masters.
        """
        self._place(params)
        n, grads = len(params), [self._gradient(p) for p in params]
        outs = apply(row, (*scalars, *held[:n], *grads, *held[n:len(held) - len(low)]), packed)
        new = [o if k in low else o.to_placements(p.spec.placements)
               for k, (o, p) in enumerate(zip(outs, params, strict=False))]
        return [*new, *outs[n:], *(_rounded(outs[k], params[k]) for k in low)]

    def rebind(self, p: Tensor, value: Tensor) -> None:
        """Let the parameter (and its master) hold `value`, in its own layout, unless the step is not to be
        taken; the handle and its place on the tape stay.
        """
        if self.skip is not None:
            value = where(self.skip > 0, self.weight(p), value)
        if self._has_master(p):
            self.state[p][MASTER] = value
        made = _rounded(value, p)
        p.block, p.spec = made.block, made.spec
        if self._has_master(p):
            self._from_master[p] = +p.block

    # --- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """{"state": {number: {...}}, "param_groups": [...]}: parameters by number, in order of the groups.

        Waits if a GradScaler was used: only the workers know how many steps were taken.
        """
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
        self.state = {p: {"step": 0, **{k: _state_value(k, v, p, self._has_master(p))
                                        for k, v in state.items()}}
                      for p, state in states.items()}
        self._from_master = {p: +p.block for p, state in self.state.items() if MASTER in state}

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
    return {k: int(v) if k == "step" else v.detach() if isinstance(v, Tensor) else v
            for k, v in state.items()}


def _rounded(value: Tensor, p: Tensor) -> Tensor:
    """`value` in the dtype and the layout of a parameter; cast first, so that 16 bits travel."""
    return value.astype(p.dtype).to_placements(p.spec.placements)


def _state_value(name: str, value: Any, p: Tensor, has_master: bool) -> Any:
    """The step as an int, a state tensor in its parameter's layout, and its dtype or its master's, any other
    number as it is.
    """
    if name == "step":
        return int(value)
    if not hasattr(value, "shape"):
        return value
    tensor = as_tensor(value).detach()
    return tensor.astype("float32" if has_master else p.dtype).to_placements(p.spec.placements)


__all__ = ["Optimizer"]
