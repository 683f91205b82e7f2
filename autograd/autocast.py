"""Autocast: ops get their floating inputs in the dtypes that the column `autocast` of their rows asks for.

A region is entered by giving the session another dict of plans, in which an op that wants other dtypes is
never found: only then is its row asked, and its inputs are cast by recorded ops, through which gradients
find back to the dtypes that they came from. Outside of regions recording is what it is without autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ContextDecorator
from typing import Any, NamedTuple

from meshtape.autograd.tensor import Tensor
from meshtape.runtime.dtypes import AnyDType, canonical, float32, is_floating
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import Op, lookup
from meshtape.scheduler import current
from meshtape.scheduler.layout import Spec
from meshtape.scheduler.planner import Plan
from meshtape.scheduler.session import Session

ASTYPE = lookup("astype")


class Change(NamedTuple):
    """What to record instead of an op: with inputs of these dtypes (None: as it is), and these attributes."""

    dtypes: tuple[Any, ...]
    attrs: tuple[Any, ...]


class Region:
    """Autocast to `low` on one session: `plans` of the ops that want nothing cast, by the session's keys."""

    def __init__(self, low: Any) -> None:
        self.low = low
        self.plans: dict[Any, Plan] = {}
        self._changes: dict[Any, Change | None] = {}

    def change(self, op: Op, attrs: tuple[Any, ...], specs: Sequence[Spec]) -> Change | None:
        """What to record instead of an op on inputs of these specs; None: it wants nothing cast."""
        key = (op, attrs, specs)
        if key not in self._changes:
            self._changes[key] = self._new(op, attrs, specs)
        return self._changes[key]

    def _new(self, op: Op, attrs: tuple[Any, ...], specs: Sequence[Spec]) -> Change | None:
        given = ["" if s.weak or not is_floating(s.dtype) else s.dtype.name for s in specs]
        same: tuple[Any, ...] = (None,) * len(specs)
        wanted = same
        if op.autocast == "low" and "float64" not in given:
            wanted = tuple(None if name in ("", self.low.name) else self.low for name in given)
        elif op.autocast == "float32":
            wanted = tuple(float32 if name in ("float16", "bfloat16") else None for name in given)
        if wanted == same:
            return None
        if op.autocast == "float32" and "dtype" in op.attrs:    # can widen sums without a copy of the input
            named = op.unpack(attrs)
            return Change(same, op.pack({**named, "dtype": "float32"})) if named["dtype"] is None else None
        return Change(wanted, attrs)


def enter(session: Session, region: Region | None) -> None:
    """Record in `region` from now on (None: in no region)."""
    session.autocast = region
    session.plans = session.planner.plans if region is None else region.plans


class resumed:
    """Inside, ops are recorded in `region` as if it were the outermost: casts are shared inside only.

    A class, and not a generator: see meshtape.autograd.tape.set_grad_enabled.
    """

    def __init__(self, session: Session, region: Region | None) -> None:
        self._session, self._region = session, region

    def __enter__(self) -> None:
        session = self._session
        self._before, self._casts = session.autocast, session.casts
        session.casts = {}
        enter(session, self._region)

    def __exit__(self, *exc: object) -> None:
        self._session.casts = self._casts
        enter(self._session, self._before)


def inside() -> bool:
    """Whether ops are recorded in a region."""
    session = current.active
    return session is not None and session.autocast is not None


def wide(x: Tensor) -> Tensor:
    """`x`; in float32 if it is of 16 bits and ops are recorded in a region. For what several rows compute."""
    if inside() and is_floating(x.dtype) and x.dtype.itemsize == 2:
        return Tensor._apply(ASTYPE, (x,), ("float32",))  # type: ignore[no-any-return]
    return x


class autocast(ContextDecorator):
    """Inside (or in a function that it decorates), ops compute in the dtype that suits them.

    Products (matmul, linear, convolution, einsum, attention, recurrent layers) get their floating inputs
    cast to `dtype`, bfloat16 or float16. What needs range or precision (exp, log, pow, sums, cumulative sums,
    softmax, norms, losses) gets its 16-bit inputs cast to float32. Everything else computes in the widest
    dtype of its inputs, as it does outside. float64 stays float64. enabled=False switches autocast off.

    Parameters stay as they are: their gradients have their dtype. The 16-bit copy of a parameter is made once
    in the outermost region, and dropped at its end. backward() belongs outside; inside, it does the same.
    Semantics of torch.autocast for CUDA. Raises DTypeError.
    """

    def __init__(self, dtype: AnyDType = "bfloat16", enabled: bool = True) -> None:
        self._low = canonical(dtype) if enabled else None
        if self._low is not None and not (is_floating(self._low) and self._low.itemsize == 2):
            raise DTypeError(f"autocast: dtype {self._low.name} given; use bfloat16 or float16")

    def _recreate_cm(self) -> autocast:
        """One for each call of a decorated function, which may call itself."""
        return autocast(self._low, True) if self._low is not None else autocast(enabled=False)

    def __enter__(self) -> None:
        session = self._session = current.session()
        session.check()
        self._before = session.autocast
        region = None
        if self._low is not None:
            region = session.regions.get(self._low)
            if region is None:
                region = session.regions[self._low] = Region(self._low)
        session.nested += 1
        enter(session, region)

    def __exit__(self, *exc: object) -> None:
        session = self._session
        session.nested -= 1
        if not session.nested:
            session.casts.clear()
        enter(session, self._before)
