"""What the kernels of recurrent layers are made of. No rows here.

Forward: the inputs of step t lie side by side as (h_{t-1}, 1, x_t), so that all products of a step, biases
included, are one with (weight_hh, bias, weight_ih). It is written gate by gate, (G, B, H), so that what
follows works on contiguous memory, and to the same place at every step, which stays in the cache; the first
function after it writes to what is kept.

Backward: what does not depend on gradients of later steps is computed for a few steps at a time, as many as
the cache holds. A run of steps, which may be longer, collects the gradients of its pre-activations as rows;
its products with inputs and weights are taken when the run is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from meshtape.runtime.ops.contraction import widen
from meshtape.runtime.panels import Panels

CACHED = 16384          # elements of a state in as many steps as are prepared together: ten such arrays
ROWS = 640              # steps times batch of a run, long enough for products at full speed
APART = 16              # elements between rows whose length may be a power of two: other sets of the cache


def wide(x: Any) -> Any:
    """widen, for what may be a Python scalar."""
    return widen(x) if hasattr(x, "dtype") else x


def halve_and_shift(s: Any) -> None:
    """tanh(a / 2) to sigmoid(a), in place: sigmoid(a) = (1 + tanh(a / 2)) / 2, and tanh is the faster."""
    s *= 0.5
    s += 0.5


def joint_input(xp: Any, x: Any, h0: Any) -> Any:
    """(T + 1, B, H + 1 + I): the states (at first h0, later ones are to be filled in), ones, and x."""
    steps, batch, features = x.shape
    width = h0.shape[1]
    joint = xp.empty((steps + 1, batch, width + 1 + features), x.dtype)
    joint[:-1, :, width + 1:] = x
    joint[:, :, width] = 1
    joint[0, :, :width] = h0
    return joint


def joint_weights(xp: Any, w_ih: Any, w_hh: Any, bias: Any, order: Sequence[int], halved: int) -> Any:
    """(G, H + 1 + I, H) from torch's weights: gates in `order`, the first `halved` of them times 1/2."""
    width = w_hh.shape[1]
    found = xp.empty((len(order), width, width + 1 + w_ih.shape[1]), w_hh.dtype)
    for gate, rows in zip(found, _rows_of(order, width), strict=True):
        gate[:, :width] = w_hh[rows]
        gate[:, width] = bias[rows] if hasattr(bias, "dtype") else bias
        gate[:, width + 1:] = w_ih[rows]
    found[:halved] *= 0.5
    return found.swapaxes(1, 2)


def _rows_of(order: Sequence[int], width: int) -> list[slice]:
    """Where the gates of `order` lie among the rows of a weight."""
    return [slice(gate * width, (gate + 1) * width) for gate in order]


class Sweep:
    """Backward over all steps, the last first; `d` (steps, B, blocks * H) are the gradients of the
    pre-activations of a run of them, `by_block` the same as (steps, blocks, B, H).

    `hidden` are the gates, by their place in the weights, whose gradients lie in d from the left: those of
    the products with weight_hh; `fed` those from the right: of the products with weight_ih. Together they
    cover all `blocks`. back(k) writes d[k] @ weight_hh to `dh`.
    """

    def __init__(self, xp: Any, x: Any, h0: Any, y: Any, w_ih: Any, w_hh: Any, hidden: Sequence[int],
                 fed: Sequence[int], blocks: int, dh: Any, input_grad: bool) -> None:
        self.xp, self.x, self.h0, self.y = xp, x, h0, y
        self.hidden, self.fed, self.width = list(hidden), list(fed), w_hh.shape[1]
        steps, batch, width = y.shape
        run = -(-steps // max(1, round(steps * batch / ROWS))) if xp is np else steps
        self.d = xp.empty((run, batch, blocks * width + APART), y.dtype)[:, :, :blocks * width]
        self.by_block = self.d.reshape(run, batch, blocks, width).swapaxes(1, 2)
        self.d_hidden = self.d[:, :, :len(self.hidden) * width]
        self.d_fed = self.d[:, :, (blocks - len(self.fed)) * width:]
        self.back = Panels(xp, self._gates(w_hh, self.hidden), batch).into(self.d_hidden, dh[None])
        self.dw_ih = xp.zeros((len(self.fed) * width, x.shape[2]), y.dtype)
        self.dw_hh = xp.zeros((len(self.hidden) * width, width), y.dtype)
        self.db = xp.zeros(blocks * width, y.dtype)
        self.dx = xp.empty((steps if input_grad else 0, *x.shape[1:]), y.dtype)
        self.w_ih = Panels(xp, self._gates(w_ih, self.fed), run * batch) if input_grad else None

    def _gates(self, w: Any, order: list[int]) -> Any:
        """A weight as (1, G * H, K), its gates in `order`."""
        return self.xp.concatenate([w[rows] for rows in _rows_of(order, self.width)])[None]

    def runs(self) -> Iterator[slice]:
        """Runs of steps. What belongs to a run is summed up when the next is asked for."""
        size = len(self.d)
        for stop in range(len(self.y), 0, -size):
            steps = slice(max(0, stop - size), stop)
            yield steps
            self._sum(steps)

    def parts(self, steps: slice) -> Iterator[slice]:
        """The steps of a run, the last first, as many at a time as the cache holds with what belongs to them.
        """
        _, batch, width = self.y.shape
        size = max(1, CACHED // max(1, batch * width)) if self.xp is np else len(self.y)
        return (slice(max(steps.start, stop - size), stop) for stop in range(steps.stop, steps.start, -size))

    def _sum(self, steps: slice) -> None:
        xp, count = self.xp, steps.stop - steps.start
        batch = len(self.h0)
        rows = count * batch
        d, hidden, fed = (a[:count].reshape(rows, a.shape[2]) for a in (self.d, self.d_hidden, self.d_fed))
        self.db += xp.matmul(xp.ones(rows, d.dtype), d)
        self.dw_ih += xp.matmul(fed.T, self.x[steps].reshape(rows, self.x.shape[2]))
        first = 0 if steps.start else batch
        before = self.y[max(0, steps.start - 1):steps.stop - 1]
        self.dw_hh += xp.matmul(hidden[first:].T, before.reshape(rows - first, self.width))
        if first:
            self.dw_hh += xp.matmul(hidden[:first].T, self.h0)
        if self.w_ih is not None:
            self.w_ih.into(fed[None], self.dx[steps].reshape(1, rows, self.x.shape[2]))(0)

    def results(self) -> list[Any]:
        """Gradients of x (of no steps unless asked for), weights, biases; gates in the weights' order."""
        db_hh = self.db[:len(self.dw_hh)]
        db_ih = self.db[len(self.db) - len(self.dw_ih):]
        return [self.dx,
                self._ordered(self.dw_ih, self.fed), self._ordered(self.dw_hh, self.hidden),
                self._ordered(db_ih, self.fed), self._ordered(db_hh, self.hidden)]

    def _ordered(self, a: Any, order: list[int]) -> Any:
        found = self.xp.empty_like(a)
        for rows, part in zip(_rows_of(order, self.width), a.reshape(len(order), self.width, *a.shape[1:]),
                              strict=True):
            found[rows] = part
        return found
