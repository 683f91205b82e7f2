"""Recurrent layers, by torch.nn's names, parameter names, shapes and default initialisation.

A layer's whole sequence is one instruction (meshtape.runtime.ops.recurrent).
"""

from __future__ import annotations

import math
from typing import Any

from meshtape.autograd import Tensor, apply
from meshtape.creation import empty, zeros
from meshtape.manipulation import concat, flip
from meshtape.nn import functional, init
from meshtape.nn.module import Module
from meshtape.nn.parameter import Parameter
from meshtape.runtime.dtypes import AnyDType
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import lookup

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
State = Tensor | tuple[Tensor, Tensor]


class Weights(Module):
    """Parameters of one or more directions of recurrent layers, uniform in +-1/sqrt(hidden_size) at first."""

    kind = ""

    def __init__(self, input_size: int, hidden_size: int, bias: bool, nonlinearity: str = "tanh") -> None:
        super().__init__()
        if hidden_size <= 0:
            raise ShapeError(f"{type(self).__name__}: hidden_size is {hidden_size}; it must be positive")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"{type(self).__name__}: nonlinearity is {nonlinearity!r}; use 'tanh' or 'relu'")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.nonlinearity = nonlinearity

    @property
    def states(self) -> int:
        """How many states go from step to step."""
        return 2 if self.kind == "lstm" else 1

    def add_weights(self, suffix: str, width: int, dtype: AnyDType) -> None:
        rows = GATES[self.kind] * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, width),
                                              "weight_hh": (rows, self.hidden_size)}
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, Parameter(empty(shape, dtype=dtype)))

    def reset_parameters(self) -> None:
        """Draw new weights and biases."""
        bound = 1 / math.sqrt(self.hidden_size)
        for p in self.parameters():
            init.uniform_(p, -bound, bound)

    def run(self, x: Tensor, states: tuple[Tensor, ...], suffix: str) -> tuple[Tensor, ...]:
        """All steps of one direction: x (T, B, I) and states (B, H) give the states of every step (T, B, H).
        """
        op = lookup(self.kind)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[:4 if self.bias else 2]
        weights = [self._parameters[name + suffix] for name in names]
        packed = op.pack({"nonlinearity": self.nonlinearity} if self.kind == "rnn" else {})
        none = () if self.bias else (0.0, 0.0)
        out = apply(op, (x, *states, *weights, *none), packed)
        return out[:self.states] if isinstance(out, tuple) else (out,)

    def check_state(self, state: Any, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The given states as a tuple; each must have `shape`."""
        found = tuple(state) if self.states > 1 else (state,)
        if len(found) != self.states or any(s.shape != shape for s in found):
            given = [s.shape for s in found]
            raise ShapeError(f"{type(self).__name__}: {self.states} states of shape {shape} are needed, got "
                             f"{given}")
        return found

    def check_input(self, x: Tensor, ndims: tuple[int, ...], what: str) -> None:
        if x.ndim not in ndims or x.shape[-1] != self.input_size:
            raise ShapeError(f"{type(self).__name__}: the input is {what} with input_size {self.input_size} "
                             f"last, got {x.shape}")


class RNNBase(Weights):
    """What RNN, GRU and LSTM share. forward(input, state=None) gives (output, last state).

    input (T, B, input_size), with batch_first (B, T, input_size), or (T, input_size); output has the last
    layer's hidden states of every step, (T, B, D * hidden_size) with D = 2 if bidirectional. States,
    (num_layers * D, B, hidden_size), are zeros unless given; an LSTM's are a pair (hidden states, cells).
    dropout: between layers, in training. Raises ShapeError. torch's proj_size and packed sequences are not
    there.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                 dtype: AnyDType = None, *, nonlinearity: str = "tanh") -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity)
        if num_layers <= 0:
            raise ShapeError(f"{type(self).__name__}: num_layers is {num_layers}; it must be positive")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{type(self).__name__}: dropout is {dropout}; a probability lies between 0 and "
                             f"1")
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        for layer in range(num_layers):
            for suffix in self.suffixes(layer):
                width = input_size if layer == 0 else hidden_size * (2 if bidirectional else 1)
                self.add_weights(suffix, width, dtype)
        self.reset_parameters()

    def suffixes(self, layer: int) -> list[str]:
        """Ends of the parameters' names of a layer, one for each direction."""
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, State]:
        self.check_input(input, (2, 3), "(steps, batch, features), (batch, steps, features) with "
                                        "batch_first, or (steps, features)")
        single = input.ndim == 2
        x = input.reshape(input.shape[0], 1, input.shape[1]) if single else input
        if self.batch_first and not single:
            x = x.swapaxes(0, 1)
        first = self._first_states(hx, x, single)
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer and self.training:
                x = functional.dropout(x, self.dropout)
            x = self._layer(layer, x, first, last)
        ends = [s[0] if len(s) == 1 else concat(s, axis=0) for s in zip(*last, strict=True)]
        if single:
            x, ends = x.reshape(x.shape[0], x.shape[2]), [s.reshape(s.shape[0], s.shape[2]) for s in ends]
        elif self.batch_first:
            x = x.swapaxes(0, 1)
        return x, ends[0] if len(ends) == 1 else (ends[0], ends[1])

    def _first_states(self, hx: Any, x: Tensor, single: bool) -> tuple[Tensor, ...] | None:
        if hx is None:
            return None
        count = self.num_layers * (2 if self.bidirectional else 1)
        wanted = (count, self.hidden_size) if single else (count, x.shape[1], self.hidden_size)
        given = self.check_state(hx, wanted)
        return tuple(s.reshape(count, 1, self.hidden_size) if single else s for s in given)

    def _layer(self, layer: int, x: Tensor, first: tuple[Tensor, ...] | None,
               last: list[tuple[Tensor, ...]]) -> Tensor:
        """Both directions of a layer; their last states, (1, B, H), are appended to `last`."""
        outputs = []
        for suffix in self.suffixes(layer):
            if first is None:
                states = (zeros((x.shape[1], self.hidden_size), dtype=x.dtype),) * self.states
            else:
                states = tuple(s[len(last)] for s in first)
            reverse = suffix.endswith("reverse")
            found = self.run(flip(x, axis=0) if reverse else x, states, suffix)
            last.append(tuple(s[-1:] for s in found))
            outputs.append(flip(found[0], axis=0) if reverse else found[0])
        return outputs[0] if len(outputs) == 1 else concat(outputs, axis=2)

    def extra_repr(self) -> str:
        return (f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.bias}, "
                f"batch_first={self.batch_first}, dropout={self.dropout}, bidirectional={self.bidirectional}")


class RNN(RNNBase):
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu of that; see RNNBase."""

    kind = "rnn"

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
                 bias: bool = True, batch_first: bool = False, dropout: float = 0.0,
                 bidirectional: bool = False, dtype: AnyDType = None) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         dtype, nonlinearity=nonlinearity)


class GRU(RNNBase):
    """Gated recurrent units (meshtape.runtime.ops.gru has the equations); see RNNBase."""

    kind = "gru"


class LSTM(RNNBase):
    """Long short-term memory (meshtape.runtime.ops.lstm has the equations); see RNNBase."""

    kind = "lstm"


class RNNCellBase(Weights):
    """One step of a recurrent layer: forward(input, state=None) gives the next state.

    input (B, input_size) or (input_size,), states (B, hidden_size) or (hidden_size,), zeros unless given; an
    LSTMCell's are a pair (hidden state, cell). Raises ShapeError.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, dtype: AnyDType = None, *,
                 nonlinearity: str = "tanh") -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity)
        self.add_weights("", input_size, dtype)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Any = None) -> State:
        self.check_input(input, (1, 2), "(batch, features) or (features,)")
        batch = input.shape[:-1]
        rows = (batch[0] if batch else 1, self.hidden_size)
        if hx is None:
            states = (zeros(rows, dtype=input.dtype),) * self.states
        else:
            given = self.check_state(hx, (*batch, self.hidden_size))
            states = tuple(s.reshape(rows) for s in given)
        found = self.run(input.reshape(1, rows[0], self.input_size), states, "")
        ends = [s.reshape(*batch, self.hidden_size) for s in found]
        return ends[0] if len(ends) == 1 else (ends[0], ends[1])

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias}"


class RNNCell(RNNCellBase):
    """One step of an RNN; see RNNCellBase."""

    kind = "rnn"

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
                 dtype: AnyDType = None) -> None:
        super().__init__(input_size, hidden_size, bias, dtype, nonlinearity=nonlinearity)


class GRUCell(RNNCellBase):
    """One step of a GRU; see RNNCellBase."""

    kind = "gru"


class LSTMCell(RNNCellBase):
    """One step of an LSTM; see RNNCellBase."""

    kind = "lstm"


__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
