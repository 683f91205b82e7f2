"""Rules of rows that work along one dimension, `axis`, and keep the others apart: that one is never split.

A tensor of 0 dimensions counts as one element along axis 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshtape.runtime.op import ALPHABET, Axes, normalize_axis
from meshtape.runtime.shards import Shape


def line_axes(n_in: int = 1, n_out: int = 1) -> Callable[..., Axes]:
    """A letter for every dimension but that of `axis`, the same for all inputs and outputs."""
    def axes(*shapes: Shape, axis: int, **attrs: Any) -> Axes:
        x = shapes[0]
        d = normalize_axis(axis, len(x))
        names = "".join("." if e == d else ALPHABET[e] for e in range(len(x)))
        return Axes((names,) * n_in, (names,) * n_out)
    return axes


def line_shape(name: str, n_out: int = 1) -> Callable[..., list[Shape]]:
    """`n_out` outputs of the shape of the first input."""
    def shape(*shapes: Shape, axis: int, **attrs: Any) -> list[Shape]:
        normalize_axis(axis, len(shapes[0]), name)
        return [shapes[0]] * n_out
    return shape
