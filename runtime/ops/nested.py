"""Derivatives of a composition, for a vjp whose formula nobody should have to write out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def differentiate(function: Callable[..., Any], inputs: Sequence[Any],
                  cotangents: Sequence[Any]) -> list[Any]:
    """Gradients, by every input, of the sum of `function(*inputs)` times `cotangents`.

    `function` is written in terms of rows and returns a tuple of tensors, one for each cotangent (None: that
    output does not count). None where nothing flows, and for Python scalars. The tape of the tensors' own
    class does it, so that calls nest and their results can be differentiated again.
    """
    for x in (*inputs, *cotangents):
        found = getattr(x, "_differentiate", None)
        if found is not None:
            return found(function, inputs, cotangents)  # type: ignore[no-any-return]
    raise TypeError(f"no tensor among the inputs {tuple(type(x).__name__ for x in inputs)}")
