"""Module: a tree of layers with named parameters and buffers, as torch.nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from meshtape.autograd import Tensor, as_tensor
from meshtape.nn.parameter import Parameter, rebind
from meshtape.runtime.dtypes import AnyDType, canonical, is_differentiable, is_floating
from meshtape.runtime.errors import DTypeError, StateError

M = TypeVar("M", bound="Module")


class LoadResult(NamedTuple):
    """Names that load_state_dict(strict=False) did not find, and names it was given but does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """Base of all layers: set Parameters, Modules and buffers as attributes, and define forward()."""

    training: bool
    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, Tensor | None]
    _modules: dict[str, Any]                # a Module, or None
    _transient: set[str]

    def __init__(self) -> None:
        put = super().__setattr__
        put("training", True)
        put("_parameters", {})
        put("_buffers", {})
        put("_modules", {})
        put("_transient", set())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(); define it to say what the "
                                  f"module computes")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    # --- attributes ---------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        slots = self.__dict__
        if "_parameters" not in slots:
            if isinstance(value, Parameter | Module):
                raise AttributeError(f"{type(self).__name__}: call super().__init__() before setting "
                                     f"{name!r}")
            super().__setattr__(name, value)
        elif isinstance(value, Parameter):
            self._put(self._parameters, name, value)
        elif isinstance(value, Module):
            self._put(self._modules, name, value)
        elif name in self._buffers and (value is None or isinstance(value, Tensor)):
            self._put(self._buffers, name, value)
        elif value is None and name in self._parameters:
            self._put(self._parameters, name, None)
        elif value is None and name in self._modules:
            self._put(self._modules, name, None)
        elif name in self._parameters or name in self._modules:
            kind = "parameter" if name in self._parameters else "module"
            raise TypeError(f"{type(self).__name__}.{name} is a {kind} and cannot be set to a "
                            f"{type(value).__name__}; wrap it in nn.Parameter, or delete the attribute first")
        else:
            super().__setattr__(name, value)

    if TYPE_CHECKING:       # what is set in subclasses
        def __getattr__(self, name: str) -> Any: ...

    def __delattr__(self, name: str) -> None:
        if not self._forget(name):
            super().__delattr__(name)

    def __copy__(self: M) -> M:
        """The same parameters, buffers and children in groups of its own."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        for group in ("_parameters", "_buffers", "_modules", "_transient"):
            made.__dict__[group] = self.__dict__[group].copy()
        return made

    def _put(self, group: dict[str, Any], name: str, value: Any) -> None:
        """Set an attribute in its group, at its old place if it has one; it leaves the other groups.

        It is an ordinary attribute as well, because those are found fastest.
        """
        if name not in group:
            self._forget(name)
        group[name] = self.__dict__[name] = value

    def _forget(self, name: str) -> bool:
        found = False
        for group in (self._parameters, self._buffers, self._modules, self.__dict__):
            found = group.pop(name, self) is not self or found      # self stands for "not there"
        self._transient.discard(name)
        return found

    def register_parameter(self, name: str, parameter: Parameter | None) -> None:
        """Add a parameter by name; None keeps the name for a parameter that this module does without."""
        _check_name(self, name)
        self._put(self._parameters, name, parameter)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a tensor that is part of the state but not trained; persistent=False keeps it out of
        state_dict().
        """
        _check_name(self, name)
        self._put(self._buffers, name, tensor)
        (self._transient.discard if persistent else self._transient.add)(name)

    def add_module(self, name: str, module: Module | None) -> None:
        """Add a child by name."""
        _check_name(self, name)
        self._put(self._modules, name, module)

    # --- walking the tree ---------------------------------------------------------------------------

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of every direct child, each module once."""
        seen: set[int] = set()
        for name, module in self._modules.items():
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def children(self) -> Iterator[Module]:
        """Every direct child."""
        return (m for _, m in self.named_children())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(dotted name, module) of this module ("") and all below it, each module once."""
        seen: set[int] = set()
        for name, module in _walk(self, prefix):
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        return (m for _, m in self.named_modules())

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter), each parameter once (under its first name, if it is shared)."""
        return self._named("_parameters", prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Every parameter, once."""
        return (p for _, p in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(dotted name, buffer), each buffer once."""
        return self._named("_buffers", prefix, recurse)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Every buffer, once."""
        return (b for _, b in self.named_buffers(recurse=recurse))

    def _named(self, group: str, prefix: str, recurse: bool) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        for where, module in (self.named_modules(prefix) if recurse else ((prefix, self),)):
            for name, value in getattr(module, group).items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    yield _join(where, name), value

    def get_submodule(self, target: str) -> Module:
        """The module of a dotted name; "" is this one. Raises AttributeError."""
        found: Any = self
        for part in target.split(".") if target else ():
            found = getattr(found, part)
        return found

    # --- state --------------------------------------------------------------------------------------

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """All parameters and persistent buffers by dotted name, in order, off the tape.

        A snapshot: training on does not change the tensors in it.
        """
        return {name: tensor.detach() for name, _, tensor in self._state(prefix)}

    def _state(self, prefix: str = "") -> Iterator[tuple[str, Module, Tensor]]:
        for where, module in _walk(self, prefix.removesuffix(".")):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and name not in module._transient:
                    yield _join(where, name), module, tensor

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadResult:
        """Take the values of `state` (tensors or arrays by dotted name), cast to each parameter's dtype and
        layout.

        Raises StateError that lists every missing and unexpected name (unless strict=False) and every shape
        that does not fit; then nothing was loaded.
        """
        if not isinstance(state, Mapping):
            raise StateError(f"load_state_dict: got a {type(state).__name__}; give a dict of names and "
                             f"arrays")
        targets = {name: tensor for name, _, tensor in self._state()}
        missing = [n for n in targets if n not in state]
        unexpected = [n for n in state if n not in targets]
        problems = []
        if strict and missing:
            problems.append(f"missing: {', '.join(missing)}")
        if strict and unexpected:
            problems.append(f"unexpected: {', '.join(map(str, unexpected))}")
        loaded: list[tuple[Tensor, Tensor]] = []
        for name, tensor in targets.items():
            if name in state:
                value, problem = _fitting(name, state[name], tensor)
                if problem is None and value is not None:
                    loaded.append((tensor, value))
                else:
                    problems.append(str(problem))
        if problems:
            raise StateError(f"load_state_dict: the state does not fit {type(self).__name__}; "
                             + "; ".join(problems) + " (nothing was loaded)")
        for tensor, value in loaded:
            rebind(tensor, value.block, value.spec)
        return LoadResult(missing, unexpected)

    # --- modes --------------------------------------------------------------------------------------

    def train(self: M, mode: bool = True) -> M:
        """Set this module and all below it to training (dropout on) or, with False, to evaluation."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self: M) -> M:
        """Set this module and all below it to evaluation."""
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the parameters' gradients, or set them to zeros."""
        for p in self.parameters():
            if p.raw_grad is not None:
                p.grad = None if set_to_none else p.raw_grad * 0

    def requires_grad_(self: M, requires_grad: bool = True) -> M:
        """Ask for gradients of all parameters, or stop asking."""
        for p in self.parameters():
            p.requires_grad_(requires_grad)
        return self

    def apply(self: M, function: Callable[[Module], object]) -> M:
        """Call `function` on every module below this one, children first, then on this one."""
        for child in self.children():
            child.apply(function)
        function(self)
        return self

    def to(self: M, dtype: AnyDType) -> M:
        """Convert the floating parameters and buffers (and gradients) to a floating dtype."""
        wanted = canonical(dtype)
        if not is_differentiable(wanted):
            raise DTypeError(f"Module.to: dtype {wanted.name} cannot be trained; use a floating dtype")
        for tensor in (*self.parameters(), *self.buffers()):
            if is_floating(tensor.dtype) and tensor.dtype != wanted:
                made = tensor.detach().astype(wanted)
                grad = tensor.grad
                rebind(tensor, made.block, made.spec)
                if grad is not None:
                    tensor.grad = grad.detach().astype(wanted)
        return self

    def float(self: M) -> M:
        """to("float32")."""
        return self.to("float32")

    def double(self: M) -> M:
        """to("float64")."""
        return self.to("float64")

    def half(self: M) -> M:
        """to("float16")."""
        return self.to("float16")

    def bfloat16(self: M) -> M:
        """to("bfloat16")."""
        return self.to("bfloat16")

    # --- repr ---------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What repr() prints between the parentheses of this module's line."""
        return ""

    def __repr__(self) -> str:
        extra = self.extra_repr()
        lines = [_indented(f"({name}): {module!r}") for name, module in self._modules.items()]
        if not lines:
            return f"{type(self).__name__}({extra})"
        inner = "".join(f"  {line}\n" for line in ([extra] if extra else []) + lines)
        return f"{type(self).__name__}(\n{inner})"


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _walk(module: Module, prefix: str) -> Iterator[tuple[str, Module]]:
    """(dotted name, module), parents first; a shared module comes once for each of its names."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, _join(prefix, name))


def _check_name(module: Module, name: str) -> None:
    if not name or "." in name:
        raise KeyError(f"{name!r} is no attribute name; use one without dots")
    if hasattr(type(module), name):
        raise KeyError(f"{type(module).__name__} already has an attribute {name!r}; use another name")


def _fitting(name: str, given: Any, target: Tensor) -> tuple[Tensor | None, str | None]:
    """`given` as a tensor of the target's dtype and layout, or what is wrong with it."""
    value = given if isinstance(given, Tensor) else np.asarray(given)
    if value.shape != target.shape:
        return None, f"{name} has shape {tuple(value.shape)}, the model needs {target.shape}"
    if not isinstance(value, Tensor) and value.dtype.kind in "OUS":
        return None, f"{name} has dtype {value.dtype}, which is not numeric"
    tensor = as_tensor(value).detach()
    if tensor.dtype != target.dtype:
        tensor = tensor.astype(target.dtype)
    return tensor.to_placements(target.spec.placements), None


__all__ = ["Module"]
