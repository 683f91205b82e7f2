"""The device array of the emulation: NumPy memory that only functions of the emulated CuPy can get at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emulator import streams
from emulator.memory import MemoryPointer, MemoryPool, copy_to_host
from emulator.order import READ, WRITE, span

DTYPES = "?bBhHiIlLqQefdFD"


class _Allocator:
    """The allocator in force, by thread."""

    def __init__(self) -> None:
        self.default = MemoryPool()
        self.stack: list[Callable[[int], MemoryPointer]] = []

    @property
    def current(self) -> Callable[[int], MemoryPointer]:
        return self.stack[-1] if self.stack else self.default.malloc

    def __call__(self, size: int) -> MemoryPointer:
        return self.current(size)


class _Local(streams.threading.local):
    def __init__(self) -> None:
        self.allocator = _Allocator()


LOCAL = _Local()


def dtype_of(dtype: Any) -> np.dtype[Any]:
    """A dtype that CuPy's arrays can have; raises TypeError or ValueError as CuPy does."""
    found = np.dtype(float if dtype is None else dtype)
    if found.char not in DTYPES and found.name != "bfloat16":
        raise ValueError(f"Unsupported dtype {found}")
    return found


class Flags:
    """cupy's flags: contiguity and ownership."""

    def __init__(self, c: bool, f: bool, owndata: bool) -> None:
        self.c_contiguous, self.f_contiguous, self.owndata = c, f, owndata
        self.fnc, self.forc = f and not c, f or c

    def __getitem__(self, name: str) -> bool:
        short = {"C": "c_contiguous", "F": "f_contiguous", "O": "owndata"}
        found: bool = getattr(self, short.get(name, name.lower()))
        return found


class ndarray:
    """cupy.ndarray."""

    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Any, dtype: Any = float, memptr: MemoryPointer | None = None,
                 strides: Any = None, order: str = "C") -> None:
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(int(n) for n in shape)
        if any(n < 0 for n in shape):
            raise ValueError("Negative dimensions are not allowed")
        kind = dtype_of(dtype)
        size = int(np.prod(shape, dtype=object)) if strides is None else extent(shape, strides, kind.itemsize)
        nbytes = size * kind.itemsize if strides is None else size
        self._data = memptr if memptr is not None else LOCAL.allocator(nbytes)
        self.base: ndarray | None = None
        start = self._data.ptr - self._data.mem.ptr
        room: Any = self._data.mem.bytes if nbytes else bytearray()
        self._a: np.ndarray[Any, Any] = np.ndarray(shape, kind, room, start if nbytes else 0, strides, order)

    @staticmethod
    def _view(a: np.ndarray[Any, Any], of: ndarray) -> ndarray:
        """An array over memory of another."""
        new = object.__new__(ndarray)
        new._a = a
        new.base = of.base if of.base is not None else of
        mem = of._data.mem
        new._data = MemoryPointer(mem, address(a) - mem.ptr) if a.size else of._data
        return new

    # --- what it is -------------------------------------------------------------------------------------

    @property
    def data(self) -> MemoryPointer:
        return self._data

    @property
    def flags(self) -> Flags:
        return Flags(self._a.flags.c_contiguous, self._a.flags.f_contiguous, self.base is None)

    shape = property(lambda self: self._a.shape, lambda self, shape: _set_shape(self, shape))
    dtype = property(lambda self: self._a.dtype)
    strides = property(lambda self: self._a.strides)
    size = property(lambda self: self._a.size)
    ndim = property(lambda self: self._a.ndim)
    itemsize = property(lambda self: self._a.itemsize)
    nbytes = property(lambda self: self._a.size * self._a.itemsize)
    device = property(lambda self: _device())

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        found = {"shape": self.shape, "typestr": self.dtype.str, "descr": self.dtype.descr, "version": 3,
                 "strides": None if self.flags.c_contiguous else self.strides,
                 "data": (self._data.ptr if self.size else 0, False)}
        stream = streams.current_stream()
        return found | {"stream": stream.ptr or 1}

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to "
                        "construct a NumPy array explicitly.")

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of unsized object")
        return int(self.shape[0])

    def __iter__(self) -> Any:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return repr(self.get())

    # --- to the host ------------------------------------------------------------------------------------

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> Any:
        if blocking and streams.capturing():
            streams.synchronises("ndarray.get")
        if out is not None:
            if not isinstance(out, np.ndarray):
                raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
            if out.dtype != self.dtype or out.shape != self.shape:
                raise ValueError(f"{self.shape} {self.dtype} does not go into {out.shape} {out.dtype}")
        to = out if out is not None else np.empty(self.shape, self.dtype, order)  # type: ignore[call-overload]
        a = self._a
        streams.work(lambda: copy_to_host(to, a), stream, [span(a, READ)])
        if blocking:
            (stream if stream is not None else streams.current_stream()).synchronize()
        return to

    def set(self, arr: Any, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        streams.forbidden("ndarray.set from pageable memory")
        a = self._a
        streams.work(lambda: np.copyto(a, arr), stream, [span(a, WRITE)])

    def item(self, *args: Any) -> Any:
        return self.get().item(*args)

    def tolist(self) -> Any:
        return self.get().tolist()

    def tobytes(self, order: str = "C") -> bytes:
        return self.get().tobytes(order)  # type: ignore[no-any-return]

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __index__(self) -> int:
        return self.get().__index__()  # type: ignore[no-any-return]

    # --- views and copies -------------------------------------------------------------------------------

    @property
    def T(self) -> ndarray:
        return ndarray._view(self._a.T, self)

    @property
    def mT(self) -> ndarray:
        return ndarray._view(self._a.mT, self)

    @property
    def real(self) -> ndarray:
        return ndarray._view(self._a.real, self)

    @real.setter
    def real(self, value: Any) -> None:
        self.real[...] = value

    @property
    def imag(self) -> ndarray:
        if self.dtype.kind != "c":
            return _functions().zeros_like(self)  # type: ignore[no-any-return]
        return ndarray._view(self._a.imag, self)

    @imag.setter
    def imag(self, value: Any) -> None:
        self.imag[...] = value

    def view(self, dtype: Any = None) -> ndarray:
        return ndarray._view(self._a.view() if dtype is None else self._a.view(dtype_of(dtype)), self)

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        return run(lambda a: a.reshape(*shape, order=order), self)  # type: ignore[no-any-return]

    def transpose(self, *axes: Any) -> ndarray:
        return ndarray._view(self._a.transpose(*axes), self)

    def swapaxes(self, axis1: int, axis2: int) -> ndarray:
        return ndarray._view(self._a.swapaxes(axis1, axis2), self)

    def squeeze(self, axis: Any = None) -> ndarray:
        return ndarray._view(self._a.squeeze(axis), self)

    def ravel(self, order: str = "C") -> ndarray:
        return run(lambda a: a.ravel(order), self)  # type: ignore[no-any-return]

    def flatten(self, order: str = "C") -> ndarray:
        return run(lambda a: a.flatten(order), self)  # type: ignore[no-any-return]

    def diagonal(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> ndarray:
        return ndarray._view(self._a.diagonal(offset, axis1, axis2), self)

    def copy(self, order: str = "C") -> ndarray:
        return run(lambda a: a.copy(order), self)  # type: ignore[no-any-return]

    def astype(self, dtype: Any, order: str = "K", casting: str | None = None, subok: Any = None,
               copy: bool = True) -> ndarray:
        if casting not in (None, "unsafe") and not np.can_cast(self.dtype, dtype, casting):  # type: ignore
            raise TypeError(f"Cannot cast array data from {self.dtype} to {np.dtype(dtype)} by {casting}")
        kind = dtype_of(dtype)
        if not copy and kind == self.dtype:
            return self
        return run(lambda a: a.astype(kind, order=order), self)  # type: ignore[no-any-return]

    # --- values -----------------------------------------------------------------------------------------

    def fill(self, value: Any) -> None:
        a, value = self._a, plain(value)
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError("non-scalar cupy.ndarray cannot be used for fill")
        streams.work(lambda: a.fill(value), touches=[span(a, WRITE)])

    def __getitem__(self, key: Any) -> ndarray:
        from emulator.indexing import getitem
        return getitem(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        from emulator.indexing import setitem
        setitem(self, key, value)

    def __copy__(self) -> ndarray:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        found = getattr(_functions(), ufunc.__name__, None)
        return NotImplemented if found is None or method != "__call__" else found(*inputs, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        found = getattr(_functions(), function.__name__, None)
        if found is None or any(not issubclass(t, ndarray) for t in types):
            return NotImplemented
        return found(*args, **kwargs)

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None,
                   copy: Any = None) -> Any:
        return Capsule(self)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


class Capsule:
    """What __dlpack__ gives to from_dlpack."""

    def __init__(self, array: ndarray) -> None:
        self.array = array


def extent(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first to behind the last element."""
    if 0 in shape:
        return 0
    return sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) + itemsize


def address(a: np.ndarray[Any, Any]) -> int:
    return int(a.__array_interface__["data"][0])


def _set_shape(x: ndarray, shape: Any) -> None:
    x._a.shape = shape


def _device() -> Any:
    from emulator import libraries
    return libraries().cupy.cuda.Device()


def _functions() -> Any:
    from emulator import libraries
    return libraries().cupy


# --- running NumPy on device arrays ---------------------------------------------------------------------

def plain(x: Any) -> Any:
    """What NumPy computes with in place of an argument: raises TypeError for arrays of the host."""
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}: an array of the host in a function of the device")
    if isinstance(x, (list, tuple)):
        return type(x)(plain(e) for e in x)
    return x


def arrays_in(x: Any) -> list[ndarray]:
    if isinstance(x, ndarray):
        return [x]
    if isinstance(x, (list, tuple)):
        return [a for e in x for a in arrays_in(e)]
    return []


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(NumPy arrays) as device work; a result is a view where NumPy's is one, else a new array."""
    operands = arrays_in((*args, *kwargs.values()))
    inside, named = plain(args), {k: plain(v) for k, v in kwargs.items()}
    with np.errstate(all="ignore"):
        result = function(*inside, **named)
    many = isinstance(result, (list, tuple))
    made = [_place(r, operands) for r in (result if many else (result,))]
    fresh = [k for k, (_, view) in enumerate(made) if not view]
    if fresh:
        targets = {k: made[k][0]._a for k in fresh}
        first = [result]

        def does() -> None:
            with np.errstate(all="ignore"):
                results = first.pop() if first else function(*inside, **named)
            for k, target in targets.items():
                np.copyto(target, results[k] if many else results)

        if streams.capturing():
            first.clear()
        streams.work(does, touches=[*(span(x._a, READ) for x in operands),
                                    *(span(a, WRITE) for a in targets.values())])
    arrays = [x for x, _ in made]
    return type(result)(arrays) if many and type(result) in (list, tuple) else (
        tuple(arrays) if many else arrays[0])


def _place(result: Any, operands: Sequence[ndarray]) -> tuple[ndarray, bool]:
    """A device array for a NumPy result, and whether it is a view of an operand."""
    if not isinstance(result, (np.ndarray, np.generic)):
        result = np.asarray(result)
    if isinstance(result, np.ndarray) and result.size:
        for x in operands:
            if x.size and np.may_share_memory(result, x._a):
                return ndarray._view(result, x), True
    dense = result if isinstance(result, np.ndarray) else np.asarray(result)
    order = "F" if dense.flags.f_contiguous and not dense.flags.c_contiguous else "C"
    return ndarray(dense.shape, dense.dtype, order=order), False


def run_into(function: Callable[..., Any], targets: Sequence[Any], *args: Any, **kwargs: Any) -> None:
    """function(NumPy arrays), which writes into `targets` (device arrays), as device work."""
    inside, named = plain(args), {k: plain(v) for k, v in kwargs.items()}

    def does() -> None:
        with np.errstate(all="ignore"):
            function(*inside, **named)

    given = arrays_in((*args, *kwargs.values()))
    reads = [span(x._a, READ) for x in given if all(x is not t for t in targets)]
    streams.work(does, touches=[*reads, *(span(t._a, WRITE) for t in targets)])


def from_host(a: Any, dtype: Any = None, order: str | None = None) -> ndarray:
    """A device array with the values of an array (or number) of the host."""
    host = np.asarray(a, dtype=None if dtype is None else dtype_of(dtype))
    dtype_of(host.dtype)
    if not host.ndim:       # by a kernel with the number as its argument
        new = ndarray((), host.dtype)
        new.fill(host[()])
        return new
    streams.forbidden("a copy from memory of the host (cupy.array)")
    fortran = order == "F" or (order in (None, "K", "A") and host.flags.fnc)
    new = ndarray(host.shape, host.dtype, order="F" if fortran else "C")
    streams.work(lambda: np.copyto(new._a, host), touches=[span(new._a, WRITE)])
    return new
