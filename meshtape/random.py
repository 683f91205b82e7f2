"""Random tensors, made on the workers.

Numbers come from counters (Philox; meshtape.runtime.philox says how): element i of draw d under seed s is the
same on any number of workers and in any layout. Every call is one draw; seed() starts the count again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meshtape.autograd import Tensor, as_tensor
from meshtape.creation import create, shape_tuple
from meshtape.manipulation import reshape, take
from meshtape.runtime.dtypes import DEFAULT_FLOAT, AnyDType, canonical, kind
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.scheduler import current
from meshtape.scheduler.layout import AnyLayout
from meshtape.session import manual_seed

Shape = int | tuple[int, ...] | list[int]


def seed(value: int) -> None:
    """Start the stream of random numbers again: same seed, same program, same numbers on any mesh."""
    manual_seed(value)


def _draw(name: str, scalars: tuple[Any, ...], shape: Shape, dtype: Any, layout: AnyLayout | None,
          requires_grad: bool = False) -> Tensor:
    session = current.session()
    s = shape_tuple(shape)
    return create(name, (session.seed, session.draw(), *scalars), len(s), layout, requires_grad, shape=s,
                  dtype=dtype.name)


def _floating(dtype: AnyDType, who: str) -> Any:
    wanted = DEFAULT_FLOAT if dtype is None else canonical(dtype)
    if kind(wanted) != 2:
        raise DTypeError(f"{who}: dtype {wanted.name} is not floating; use integers() or bernoulli(), or "
                         f"cast afterwards")
    return wanted


def uniform(low: float = 0.0, high: float = 1.0, shape: Shape = (), *, dtype: AnyDType = None,
            layout: AnyLayout | None = None, requires_grad: bool = False) -> Tensor:
    """Numbers from the uniform distribution on [low, high); float32 unless `dtype` is given. Raises
    DTypeError.
    """
    return _draw("random_uniform", (float(low), float(high)), shape, _floating(dtype, "uniform"), layout,
                 requires_grad)


def normal(mean: float = 0.0, std: float = 1.0, shape: Shape = (), *, dtype: AnyDType = None,
           layout: AnyLayout | None = None, requires_grad: bool = False) -> Tensor:
    """Numbers from the normal distribution; float32 unless `dtype` is given. Raises DTypeError."""
    return _draw("random_normal", (float(mean), float(std)), shape, _floating(dtype, "normal"), layout,
                 requires_grad)


def _shape(given: tuple[Any, ...]) -> Shape:
    """Extents given one by one, or as one sequence."""
    return tuple(given[0]) if len(given) == 1 and not isinstance(given[0], int) else given


def rand(*shape: Any, dtype: AnyDType = None, layout: AnyLayout | None = None,
         requires_grad: bool = False) -> Tensor:
    """uniform(0, 1): rand(2, 3) or rand((2, 3))."""
    return uniform(0.0, 1.0, _shape(shape), dtype=dtype, layout=layout, requires_grad=requires_grad)


def randn(*shape: Any, dtype: AnyDType = None, layout: AnyLayout | None = None,
          requires_grad: bool = False) -> Tensor:
    """normal(0, 1): randn(2, 3) or randn((2, 3))."""
    return normal(0.0, 1.0, _shape(shape), dtype=dtype, layout=layout, requires_grad=requires_grad)


def integers(low: int, high: int | None = None, shape: Shape = (), *, dtype: AnyDType = "int64",
             layout: AnyLayout | None = None) -> Tensor:
    """Integers from [low, high), all equally likely; integers(n) counts from 0. Raises ShapeError,
    DTypeError.
    """
    if high is None:
        low, high = 0, low
    if high <= low:
        raise ShapeError(f"integers: there is no integer in [{low}, {high}); high must be above low")
    wanted = canonical(dtype)
    if kind(wanted) != 1:
        raise DTypeError(f"integers: dtype {wanted.name} is no integer dtype")
    return _draw("random_integers", (int(low), int(high)), shape, wanted, layout)


def randint(low: int, high: int | None = None, shape: Shape = (), *, dtype: AnyDType = "int64",
            layout: AnyLayout | None = None) -> Tensor:
    """integers(), by torch's name."""
    return integers(low, high, shape, dtype=dtype, layout=layout)


def bernoulli(p: float, shape: Shape = (), *, dtype: AnyDType = "bool",
              layout: AnyLayout | None = None) -> Tensor:
    """True (or 1, in another dtype) with probability `p`."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"bernoulli: p is {p}; a probability lies between 0 and 1")
    return _draw("random_bernoulli", (float(p),), shape, canonical(dtype), layout)


def permutation(n: int, *, layout: AnyLayout | None = None) -> Tensor:
    """The integers 0 to n - 1 (int64) in random order."""
    if n < 0:
        raise ShapeError(f"permutation: {n} elements; use 0 or more")
    session = current.session()
    return create("random_permutation", (session.seed, session.draw()), 1, layout, False, n=int(n))


def choice(a: int | Tensor | Sequence[Any], shape: Shape = (), *, replace: bool = True) -> Tensor:
    """Elements of the 1-D `a` (or of range(a)) picked at random, with or without putting them back."""
    numbered = isinstance(a, int | np.integer)
    n = int(a) if numbered else len(a)
    s = shape_tuple(shape)
    count = 1
    for extent in s:
        count *= extent
    if replace:
        index = integers(0, n, s)
    elif count <= n:
        index = reshape(permutation(n)[:count], s)
    else:
        raise ShapeError(f"choice: {count} of {n} elements without putting back; ask for at most {n}")
    return index if numbered else take(as_tensor(a), index, axis=0)


__all__ = ["bernoulli", "choice", "integers", "manual_seed", "normal", "permutation", "rand", "randint",
           "randn", "seed", "uniform"]
