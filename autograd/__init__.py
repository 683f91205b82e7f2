"""WHEN gradients flow: Tensor, the tape, and the walk backwards."""

import meshtape.runtime.ops  # noqa: F401  fills the op table
from meshtape.autograd import foreign as _foreign  # noqa: F401  installs Tensor.__dlpack__
from meshtape.autograd import nested as _nested  # noqa: F401  installs Tensor._differentiate
from meshtape.autograd.record import apply
from meshtape.autograd.tape import backward, checkpoint, grad, set_grad_enabled
from meshtape.autograd.tensor import Tensor, as_tensor, install_operators

install_operators()

__all__ = ["Tensor", "apply", "as_tensor", "backward", "checkpoint", "grad", "set_grad_enabled"]
