"""Tensor: a handle on blocks that workers hold, with a place on the tape.

What a tensor holds never changes under anyone else's feet: operations make new blocks, and an in-place
operation rebinds this handle to its result. So there are no aliasing views: `y = x[0]` is a copy in the sense
of the language (no bytes need move for it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from meshtape.runtime.dtypes import DEFAULT_FLOAT, NAMES, AnyDType, canonical, kind
from meshtape.runtime.errors import DTypeError, GradError, SessionClosed, ShapeError
from meshtape.runtime.op import lookup
from meshtape.runtime.shards import Placements, Shape
from meshtape.scheduler import current
from meshtape.scheduler.layout import AnyLayout, Layout, Spec
from meshtape.scheduler.session import Block, Session


class Tensor:
    """A tensor that the whole mesh holds and the program sees as one."""

    __slots__ = ("__weakref__", "_grad", "block", "edge", "spec")
    __array_priority__ = 1000
    __array_ufunc__ = None

    block: Block
    spec: Spec
    edge: Any
    _grad: Tensor | None        # not set before there is one
    _apply: Callable[..., Any]          # these two are set by the modules above this one
    _backward: Callable[..., None]

    if TYPE_CHECKING:       # operators are installed below, array methods by meshtape.methods
        def __getattr__(self, name: str) -> Any: ...
        def __getitem__(self, key: Any) -> Tensor: ...
        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __floordiv__(self, other: Any) -> Tensor: ...
        def __mod__(self, other: Any) -> Tensor: ...
        def __pow__(self, other: Any) -> Tensor: ...
        def __rpow__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __and__(self, other: Any) -> Tensor: ...
        def __or__(self, other: Any) -> Tensor: ...
        def __xor__(self, other: Any) -> Tensor: ...
        def __lt__(self, other: Any) -> Tensor: ...
        def __le__(self, other: Any) -> Tensor: ...
        def __gt__(self, other: Any) -> Tensor: ...
        def __ge__(self, other: Any) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pos__(self) -> Tensor: ...
        def __abs__(self) -> Tensor: ...
        def __invert__(self) -> Tensor: ...

    def __init__(self) -> None:
        raise TypeError("make tensors with meshtape.tensor(...), zeros(...), or operations on tensors")

    # --- what it is ---------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.spec.dtype  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        return self.spec.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.spec.size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, counted once however it is laid out."""
        return self.spec.nbytes

    @property
    def layout(self) -> Layout:
        """How the tensor lies on the mesh: one placement per mesh axis."""
        return Layout(self.spec.owner.axes.names, self.spec.placements)

    @property
    def requires_grad(self) -> bool:
        return self.edge is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def is_leaf(self) -> bool:
        return self.edge is None or (not self.edge[0].edges and type(self.edge[0]).__name__ == "Leaf")

    @property
    def grad(self) -> Tensor | None:
        """What backward() accumulated, laid out like the tensor; None before.

        Addends that the workers hold of it are reduced when it is first looked at, not before.
        """
        found = self.raw_grad
        if found is not None and found.spec.partial and not self.spec.partial:
            found = self._grad = found.to_placements(self.spec.placements)
        return found

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"grad: a {type(value).__name__} given; a gradient is a tensor of shape "
                            f"{self.shape}, or None")
        if value is not None and value.shape != self.shape:
            raise ShapeError(
                f"grad: shape {value.shape} given for a tensor of shape {self.shape}; make them equal"
            )
        self._grad = value

    @grad.deleter
    def grad(self) -> None:
        self._grad = None

    @property
    def raw_grad(self) -> Tensor | None:
        """The gradient as backward() left it: Partial where each worker holds an addend of its own."""
        return getattr(self, "_grad", None)

    @property
    def grad_fn(self) -> Any:
        """The tape node that made this tensor, None for leaves."""
        return None if self.is_leaf else self.edge[0]

    def __len__(self) -> int:
        if not self.spec.shape:
            raise TypeError("len() of a tensor of 0 dimensions")
        return self.spec.shape[0]

    __hash__ = object.__hash__

    # --- values: these wait -------------------------------------------------------------------------

    def numpy(self) -> np.ndarray[Any, Any]:
        """The whole tensor as a NumPy array of its own. Waits for the workers."""
        return owner_session(self).fetch([(self.block, self.spec)])[0]

    def item(self) -> Any:
        """The value of a tensor of one element as a Python number. Waits for the workers."""
        if self.size != 1:
            raise ShapeError(f"item(): the tensor has {self.size} elements (shape {self.shape}); reduce it "
                             f"to one, or use .numpy()")
        return self.numpy().item()

    def tolist(self) -> Any:
        return self.numpy().tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        found = self.numpy()
        return found if dtype is None else found.astype(dtype, copy=False)

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ShapeError(f"bool(): a tensor of shape {self.shape} is not one value that is true or "
                             f"false; use .any() or .all()")
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        if self.dtype.kind not in "iub":
            raise TypeError(f"a tensor of dtype {self.dtype} is no index; use integers")
        return int(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.size == 1 and spec else repr(self)

    def __repr__(self) -> str:
        return describe(self)

    # --- layout and device --------------------------------------------------------------------------

    def redistribute(self, layout: AnyLayout) -> Tensor:
        """The same values under another layout. Raises LayoutError."""
        return self.to_placements(self.spec.owner.placements(layout, self.ndim))

    def to_placements(self, placements: Placements) -> Tensor:
        if placements == self.spec.placements:
            return self
        block, spec = owner_session(self).redistribute(self.block, self.spec, placements)
        return make(block, spec, self.edge)      # values are the same, so the gradient is: no node needed

    # --- the tape -----------------------------------------------------------------------------------

    def requires_grad_(self, value: bool = True) -> Tensor:
        """Ask for gradients of this leaf (or stop asking). Raises GradError for what has no gradient."""
        if value and self.edge is None:
            if not self.spec.differentiable:
                raise GradError(f"requires_grad: dtype {self.dtype} has no gradient; use a floating dtype")
            self.edge = (current_leaf(self), 0)
        elif not value and self.edge is not None:
            if not self.is_leaf:
                raise GradError("requires_grad=False on a computed tensor; use detach()")
            self.edge = None
        return self

    def detach(self) -> Tensor:
        """The same values, off the tape."""
        return make(self.block, self.spec, None)

    def retain_grad(self) -> None:
        """Keep the gradient of this computed tensor in `.grad` at backward()."""
        if self.edge is None:
            raise GradError("retain_grad(): the tensor does not require grad")
        if not self.is_leaf:
            def keep(g: Tensor) -> None:
                self._grad = g
            self.register_hook(keep)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
        """Call `hook` with this tensor's gradient at backward(); what it returns, if anything, replaces it.

        Returns a function that removes the hook. Raises GradError if the tensor requires no grad.
        """
        if self.edge is None:
            raise GradError("register_hook(): the tensor does not require grad")
        return self.edge[0].hook(self.edge[1], hook)  # type: ignore[no-any-return]

    def backward(self, gradient: Tensor | None = None, retain_graph: bool | None = None,
                 create_graph: bool = False) -> None:
        """Accumulate gradients into the leaves this tensor was computed from; see autograd.tape.backward."""
        self._backward(self, gradient, retain_graph=retain_graph, create_graph=create_graph)

    # --- in place: rebind this handle ---------------------------------------------------------------

    def assign(self, result: Tensor, what: str) -> Tensor:
        """Rebind this handle to `result`. Raises GradError on a leaf that requires grad, outside no_grad().
        """
        tracking = owner_session(self).grad_enabled
        leaf = self.edge is not None and self.is_leaf
        if tracking and leaf:
            raise GradError(f"{what}: a leaf that requires grad cannot be changed in place while the tape "
                            f"records; do it inside no_grad(), or compute a new tensor")
        if result.shape != self.shape:
            raise ShapeError(f"{what}: the result has shape {result.shape}, the tensor {self.shape}; "
                             f"in-place operations keep the shape")
        if kind(result.dtype) > kind(self.dtype):
            raise DTypeError(f"{what}: the result has dtype {result.dtype}, which a tensor of {self.dtype} "
                             f"cannot hold; make the tensor of that dtype first, with astype")
        if result.dtype != self.dtype:
            result = result.astype(self.dtype)
        result = result.to_placements(self.spec.placements)
        self.block, self.spec = result.block, result.spec
        if tracking:
            self.edge = result.edge
        return self

    def __copy__(self) -> Tensor:
        return make(self.block, self.spec, self.edge)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = make(self.block, self.spec, None, type(self))
        if self.edge is not None:
            copy.requires_grad_()
        memo[id(self)] = copy
        return copy

    def __reduce__(self) -> Any:
        raise TypeError("a tensor lives on its mesh and cannot be pickled; use meshtape.save(), or .numpy()")


def make(block: Block, spec: Spec, edge: Any, kind: type[Tensor] = Tensor) -> Tensor:
    """A handle on an existing block."""
    t: Tensor = _new(kind)
    t.block = block
    t.spec = spec
    t.edge = edge
    return t


_new = object.__new__


def owner_session(t: Tensor) -> Session:
    """The session that holds `t`; raises SessionClosed if it is not the current one."""
    session = current.active
    if session is None or session.specs is not t.spec.owner:
        raise SessionClosed(f"a tensor of shape {t.shape} belongs to a mesh that was shut down or replaced; "
                            f"make it again on the current mesh")
    session.check()
    return session


def current_leaf(t: Tensor) -> Any:
    from meshtape.autograd.tape import Leaf
    return Leaf(t)


def as_tensor(
    data: Any, dtype: AnyDType = None, layout: AnyLayout | None = None, *, owned: bool = False
) -> Tensor:
    """A tensor with the values of `data`: a tensor, an array, a number, or nested lists of numbers.

    Python floats (and lists of them) become float32; arrays keep their dtype. Replicate unless `layout` says
    otherwise. The data is copied unless `owned` (then the array must not change afterwards). Raises
    DTypeError, ShapeError, LayoutError.
    """
    if isinstance(data, Tensor):
        out = data if dtype is None or canonical(dtype) == data.dtype else data.astype(dtype)
        return out if layout is None else out.redistribute(layout)
    if not isinstance(data, OWN) and hasattr(data, "__dlpack__"):
        from meshtape.autograd.foreign import take_in
        data = take_in(data)
        if isinstance(data, Tensor):
            return as_tensor(data, dtype, layout)
    session = current.active or current.session()
    array = to_array(data, dtype, copy=False)
    placements = session.axes.replicated if layout is None else session.specs.placements(layout, array.ndim)
    block, spec = session.place(array, placements, owned=owned or isinstance(data, FRESH))
    return make(block, spec, None)


PLAIN = frozenset(NAMES.values())      # dtypes that need no conversion
OWN = (np.ndarray, np.generic, list, tuple, bool, int, float, complex)      # what NumPy converts
FRESH = (list, tuple, bool, int, float, complex)    # data that no array can share memory with


def to_array(data: Any, dtype: AnyDType, *, copy: bool) -> np.ndarray[Any, Any]:
    """A C-contiguous NumPy array of a supported dtype."""
    if type(data) is np.ndarray and dtype is None and data.dtype in PLAIN and data.flags.c_contiguous:
        return data.copy() if copy else data
    from_array = hasattr(data, "dtype") or hasattr(data, "__array__")
    wanted = None if dtype is None else canonical(dtype)
    if isinstance(data, list | tuple) and any(isinstance(x, Tensor) for x in data):
        data = [x.numpy() if isinstance(x, Tensor) else x for x in data]
        from_array = True
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise ShapeError(
            f"tensor(): the nested lists are ragged ({error}); make every row the same length"
        ) from error
    if array.dtype.kind in "OUSM":
        raise DTypeError(f"{type(data).__name__} data (NumPy's dtype {array.dtype}) is not numeric; give a "
                         f"number, an array or nested lists of numbers")
    if wanted is None:
        wanted = canonical(array.dtype) if from_array or array.dtype.kind not in "fc" else (
            DEFAULT_FLOAT if array.dtype.kind == "f" else canonical("complex64"))
    return np.array(array, dtype=wanted, order="C", copy=True if copy else None)


def describe(t: Tensor) -> str:
    """repr: the values (waits), dtype, and the layout if it is not plain."""
    if t.size > 10000:
        values = f"shape={t.shape}"
    else:
        values = np.array2string(t.numpy(), separator=", ", threshold=200, precision=4, prefix="tensor(")
    extra = [f"dtype={t.dtype.name}"]
    if any(p != -1 for p in t.spec.placements):
        extra.append(f"layout={t.layout}")
    if t.edge is not None:
        extra.append("requires_grad=True" if t.is_leaf else f"grad_fn=<{t.edge[0].name}>")
    return f"tensor({values}, {', '.join(extra)})"


# --- operators ------------------------------------------------------------------------------------------

def _binary(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    op = lookup(name)
    attrs = op.pack({})

    def forward(self: Tensor, other: Any) -> Any:
        return Tensor._apply(op, (self, other), attrs)

    def reflected(self: Tensor, other: Any) -> Any:
        return Tensor._apply(op, (other, self), attrs)

    return forward, reflected


def _unary(name: str) -> Callable[[Tensor], Tensor]:
    op = lookup(name)
    return lambda self: Tensor._apply(op, (self,))  # type: ignore[no-any-return]


def install_operators(
    in_place: Sequence[str] = (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "matmul",
    ),
) -> None:
    """Give Tensor Python's operators, each an op of the table."""
    names = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "divide", "floordiv": "floor_divide",
             "mod": "remainder", "pow": "pow", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or",
             "xor": "bitwise_xor"}
    for python, name in names.items():
        forward, reflected = _binary(name)
        setattr(Tensor, f"__{python}__", forward)
        setattr(Tensor, f"__r{python}__", reflected)
        if python in in_place:
            setattr(Tensor, f"__i{python}__", _in_place(forward, f"in-place {name}"))
    for python, name in {
        "lt": "less",
        "le": "less_equal",
        "gt": "greater",
        "ge": "greater_equal",
        "eq": "equal",
        "ne": "not_equal",
    }.items():
        setattr(Tensor, f"__{python}__", _binary(name)[0])
    for python, name in {
        "neg": "negative",
        "pos": "positive",
        "abs": "abs",
        "invert": "bitwise_invert",
    }.items():
        setattr(Tensor, f"__{python}__", _unary(name))


def _in_place(forward: Callable[..., Any], what: str) -> Callable[..., Any]:
    return lambda self, other: self.assign(forward(self, other), what)
