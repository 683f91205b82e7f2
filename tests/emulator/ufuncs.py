"""CuPy's universal functions over the emulated arrays: its loops, its promotion, NumPy's arithmetic.

Which loop runs is asked of the installed CuPy itself. Loops of bfloat16 are computed in float32.
"""

from __future__ import annotations

from typing import Any

import cupy as real
import numpy as np
from cupy._core import _routines_math
from cupy._sorting import search
from ml_dtypes import bfloat16

from emulator import streams
from emulator.array import ndarray, plain, run, run_into

RENAMED = {"fix": np.trunc, "bitwise_left_shift": np.left_shift, "bitwise_right_shift": np.right_shift}


class ufunc:
    """cupy.ufunc."""

    def __init__(self, name: str, loops: Any = None, numpy: Any = None) -> None:
        self._real = getattr(real, name) if loops is None else loops
        self.name = self._real.name
        self.__name__ = name
        self.nin, self.nout, self.nargs = self._real.nin, self._real.nout, self._real.nargs
        self.types = self._real.types
        self._numpy = numpy or RENAMED.get(name) or getattr(np, name, None)

    def __repr__(self) -> str:
        return f"<ufunc '{self.name}'>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out, dtype = kwargs.pop("out", None), kwargs.pop("dtype", None)
        casting = kwargs.pop("casting", "same_kind")
        if kwargs:
            raise TypeError(f"Wrong arguments {kwargs}")
        if not self.nin <= len(args) <= self.nargs:
            raise TypeError(f"Wrong number of arguments for {self.name}")
        ins, outs = args[:self.nin], list(args[self.nin:])
        if out is not None:
            if outs:
                raise ValueError("Cannot specify 'out' as both a positional and keyword argument")
            if isinstance(out, tuple):
                if len(out) != self.nout:
                    raise ValueError("The 'out' tuple must have exactly one entry per ufunc output")
                outs = list(out)
            elif self.nout != 1:
                raise ValueError(f"Cannot use 'out' in {self.name}")
            else:
                outs = [out]
        for x in (*ins, *(o for o in outs if o is not None)):
            if not takes(x) or isinstance(x, np.ndarray):
                raise TypeError(f"Unsupported type {type(x)}")
        for x in outs:
            if x is not None and not isinstance(x, ndarray):
                raise TypeError(f"return arrays must be of ArrayType, got {type(x)}")
        op = self._loop(ins, dtype)
        return self._run(op, ins, outs or [None] * self.nout, casting)

    def _loop(self, ins: Any, dtype: Any) -> Any:
        ops = self._real._ops
        if dtype is not None:
            op = (self._real._out_ops or ops)._guess_routine_from_dtype(np.dtype(dtype))
        else:
            weaks = tuple(type(x) if type(x) in (int, float, complex) else False for x in ins)
            types = tuple(x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype for x in ins)
            if all(weaks):
                weaks = (False,) * len(ins)
            op = ops._guess_routine_from_in_types(types, weaks)
        if op is None:
            given = dtype or [getattr(x, "dtype", type(x)) for x in ins]
            raise TypeError(f"Wrong type ({given}) of arguments for {self.name}")
        if op.error_func is not None:
            op.error_func()
        return op

    def _run(self, op: Any, ins: Any, outs: list[Any], casting: str) -> Any:
        in_types = [np.dtype(t) for t in op.in_types]
        out_types = [np.dtype(t) for t in op.out_types]
        shape = np.broadcast_shapes(*(x.shape for x in (*ins, *outs) if isinstance(x, (ndarray, np.generic))))
        for x, kind in zip(outs, out_types, strict=True):
            if x is None:
                continue
            if x.shape != shape:
                raise ValueError(f"Out shape is mismatched: {x.shape} given, {shape} made by {self.name}")
            if not real.can_cast(kind, x.dtype, casting):  # type: ignore[arg-type]
                raise TypeError(f"output (typecode '{kind.char}') could not be coerced to provided output "
                                f"parameter (typecode '{x.dtype.char}') according to the casting rule "
                                f'"{casting}"')
        wide = [np.dtype(np.float32) if t == bfloat16 else t for t in in_types]
        function = self._numpy
        if function is None:
            raise NotImplementedError(f"the emulation has no cupy.{self.__name__}")

        def compute(*given: Any) -> Any:
            cast = [np.asarray(x).astype(t).astype(w) for x, t, w in zip(given, in_types, wide, strict=True)]
            results = function(*cast)
            results = results if self.nout > 1 else (results,)
            return tuple(np.array(np.broadcast_to(np.asarray(r), shape), dtype=t, order="K")
                         for r, t in zip(results, out_types, strict=True))

        if all(x is None for x in outs):
            made = run(compute, *ins)
        else:
            made = tuple(ndarray(shape, t) if x is None else x for x, t in zip(outs, out_types, strict=True))

            def write(targets: Any, *given: Any) -> None:
                for to, r in zip(targets, compute(*given), strict=True):
                    np.copyto(to, r, casting="unsafe")

            run_into(write, made, made, *ins)
        return made[0] if self.nout == 1 else made

    def at(self, a: Any, indices: Any, b: Any = None) -> None:
        if not isinstance(a, ndarray):
            raise TypeError("a must be a cupy.ndarray")
        if self.name not in ("cupy_add", "cupy_subtract", "cupy_maximum", "cupy_minimum", "cupy_bitwise_and",
                             "cupy_bitwise_or", "cupy_bitwise_xor"):
            raise NotImplementedError(f"`{self.name}.at` is not supported yet")
        from emulator.indexing import scatter
        scatter(self._numpy, self.name, a, indices, b)

    def reduce(self, array: Any, axis: Any = 0, dtype: Any = None, out: Any = None,
               keepdims: bool = False) -> Any:
        reductions = {"cupy_add": "sum", "cupy_multiply": "prod"}
        if self.name not in reductions:
            raise NotImplementedError(f"`{self.name}.reduce` is not supported yet")
        return getattr(array, reductions[self.name])(axis, dtype, out, keepdims)

    def accumulate(self, array: Any, axis: int = 0, dtype: Any = None, out: Any = None) -> Any:
        scans = {"cupy_add": "cumsum", "cupy_multiply": "cumprod"}
        if self.name not in scans:
            raise NotImplementedError(f"`{self.name}.accumulate` is not supported yet")
        return getattr(array, scans[self.name])(axis, dtype, out)

    def reduceat(self, array: Any, indices: Any, axis: int = 0, dtype: Any = None, out: Any = None) -> Any:
        raise NotImplementedError(f"`{self.name}.reduceat`: not emulated")

    def outer(self, A: Any, B: Any, **kwargs: Any) -> Any:
        return self(A.reshape(A.shape + (1,) * B.ndim), B, **kwargs)


def names() -> list[str]:
    """All universal functions of the installed CuPy."""
    return [n for n in dir(real) if type(getattr(real, n)).__name__ == "ufunc"]


UFUNCS = {name: ufunc(name) for name in names()}

# Loops that functions are made of.
WHERE = ufunc("where", search._where_ufunc, np.where)
CLIP = ufunc("clip", _routines_math.clip, np.clip)

_BINARY = {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide",
           "floordiv": "floor_divide", "mod": "remainder", "pow": "power", "and": "bitwise_and",
           "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "left_shift", "rshift": "right_shift",
           "divmod": "divmod"}
_COMPARE = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal",
            "ne": "not_equal"}


def takes(x: Any) -> bool:
    return isinstance(x, (ndarray, np.ndarray, np.generic, int, float, complex, bool))


def install() -> None:
    """The operators of ndarray."""
    def binary(function: ufunc) -> Any:
        return lambda self, other: function(self, other) if takes(other) else NotImplemented

    def reflected(function: ufunc) -> Any:
        return lambda self, other: function(other, self) if takes(other) else NotImplemented

    def inplace(function: ufunc) -> Any:
        return lambda self, other: function(self, other, self)

    for name, called in _BINARY.items():
        setattr(ndarray, f"__{name}__", binary(UFUNCS[called]))
        setattr(ndarray, f"__r{name}__", reflected(UFUNCS[called]))
        if name != "divmod":
            setattr(ndarray, f"__i{name}__", inplace(UFUNCS[called]))
    for name, called in _COMPARE.items():
        setattr(ndarray, f"__{name}__", binary(UFUNCS[called]))
    ndarray.__neg__ = lambda self: UFUNCS["negative"](self)  # type: ignore[attr-defined]
    ndarray.__pos__ = lambda self: UFUNCS["positive"](self)  # type: ignore[attr-defined]
    ndarray.__abs__ = lambda self: UFUNCS["absolute"](self)  # type: ignore[attr-defined]
    ndarray.__invert__ = lambda self: UFUNCS["invert"](self)  # type: ignore[attr-defined]


install()
__all__ = ["UFUNCS", "names", "plain", "streams", "ufunc"]
