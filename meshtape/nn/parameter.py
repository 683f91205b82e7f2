"""Parameter: a tensor that a module trains."""

from __future__ import annotations

from typing import Any

from meshtape.autograd import Tensor, as_tensor
from meshtape.autograd.tensor import make
from meshtape.scheduler.layout import Spec
from meshtape.scheduler.session import Block


class Parameter(Tensor):
    """A leaf tensor that a Module lists among its parameters when it is set as an attribute.

    `data` is a tensor, an array or nested lists; the parameter starts a tape of its own. Optimizers and
    load_state_dict rebind the handle, so a parameter stays the same object for life.
    """

    __slots__ = ()

    def __new__(cls, data: Any, requires_grad: bool = True) -> Parameter:
        source = as_tensor(data)
        made = make(source.block, source.spec, None, cls)
        assert isinstance(made, Parameter)
        if requires_grad:
            made.requires_grad_()
        return made

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        """Everything is set in __new__; a Tensor's own __init__ refuses to be called."""

    def __repr__(self) -> str:
        return "Parameter containing:\n" + super().__repr__()


def rebind(tensor: Tensor, block: Block, spec: Spec) -> None:
    """Let the handle `tensor` hold another block; its place on the tape stays."""
    tensor.block = block
    tensor.spec = spec


__all__ = ["Parameter"]
