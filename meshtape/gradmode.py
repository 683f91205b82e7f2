"""Turning the tape on and off."""

from __future__ import annotations

from meshtape.autograd import set_grad_enabled
from meshtape.scheduler import current


def no_grad() -> set_grad_enabled:
    """Inside (or in a function decorated with no_grad()), nothing is put on the tape."""
    return set_grad_enabled(False)


def enable_grad() -> set_grad_enabled:
    """Inside, the tape records again."""
    return set_grad_enabled(True)


def is_grad_enabled() -> bool:
    """Whether the tape records."""
    return current.session().grad_enabled


__all__ = ["enable_grad", "is_grad_enabled", "no_grad", "set_grad_enabled"]
