"""The cuDNN frontend (nvidia-cudnn-frontend 1.28) as far as runtime.cuda.dnn uses it, over emulated memory.

It refuses what the frontend or cuDNN refuse: tensors without extents, strides or types, fewer than four
dimensions, attributes that are not there, results that nobody asked for, a graph that was not built, an
unknown stream, a missing workspace. Sums are in float32 (float64 would hide what rounding does to a test).
`MADE` are all graphs, for tests; `REFUSED` holds names of operations that tests let cuDNN refuse.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.lib.stride_tricks import as_strided

from emulator.order import READ, WRITE
from emulator.streams import by_handle, forbidden, work

MADE: list[Any] = []
REFUSED: set[str] = set()

data_type = Enum("data_type", "NOT_SET FLOAT DOUBLE HALF BFLOAT16 INT32 BOOLEAN")
heur_mode = Enum("heur_mode", "A B FALLBACK OPENSOURCE")
numerical_note = Enum("numerical_note", "TENSOR_CORE DOWN_CONVERT_INPUTS REDUCED_PRECISION_REDUCTION FFT "
                                        "NONDETERMINISTIC WINOGRAD STRICT_NAN_PROP")
diagonal_alignment = Enum("diagonal_alignment", "TOP_LEFT BOTTOM_RIGHT")
DTYPES = {data_type.FLOAT: np.dtype(np.float32), data_type.DOUBLE: np.dtype(np.float64),
          data_type.HALF: np.dtype(np.float16), data_type.BFLOAT16: np.dtype(bfloat16)}


class cudnnGraphNotSupportedError(Exception):
    """A graph that cuDNN has no engine for."""


class Handle:
    def __init__(self) -> None:
        self.stream: int | None = 0
        self.alive = True


def create_handle() -> Handle:
    forbidden("cudnnCreate")
    return Handle()


def destroy_handle(handle: Handle) -> None:
    handle.alive = False


def set_stream(handle: Handle, stream: int) -> None:
    by_handle(stream)
    handle.stream = stream


def get_stream(handle: Handle) -> int | None:
    return handle.stream


class Tensor:
    def __init__(self, graph: pygraph, dim: Any, stride: Any, kind: Any, uid: int, virtual: bool) -> None:
        self.graph, self.dim, self.stride, self.data_type = graph, dim, stride, kind
        self.uid, self.is_virtual, self.written = uid, virtual, virtual

    def _set(self, name: str, value: Any) -> Tensor:
        if self.graph.planned:
            raise RuntimeError(f"cannot set {name} after lowering/planning")
        setattr(self, name, value)
        return self

    def set_output(self, value: bool) -> Tensor:
        return self._set("is_virtual", not value)

    def set_data_type(self, value: Any) -> Tensor:
        return self._set("data_type", data_type(value))

    def set_dim(self, value: list[int]) -> Tensor:
        return self._set("dim", integers(value))

    def set_stride(self, value: list[int]) -> Tensor:
        return self._set("stride", integers(value))

    def set_uid(self, value: int) -> Tensor:
        return self._set("uid", value)


def integers(given: Any) -> list[int]:
    if type(given) is not list or any(type(n) is not int for n in given):
        raise TypeError(f"incompatible function arguments: needs list[int], got {given!r}")
    return given


class pygraph:
    def __init__(self, *, io_data_type: Any, intermediate_data_type: Any, compute_data_type: Any,
                 handle: Handle) -> None:
        for kind in (io_data_type, intermediate_data_type, compute_data_type):
            if kind not in DTYPES:
                raise ValueError(f"graph of data type {kind}")
        assert type(handle) is Handle and handle.alive
        self.io, self.compute, self.handle = io_data_type, compute_data_type, handle
        self.tensors: list[Tensor] = []
        self.operations: list[tuple[str, Callable[[dict[int, Any]], None]]] = []
        self.notes: list[Any] = []
        self.validated = self.planned = self.supported = self.built = False
        self.size = (0, 100, 5000)[len(MADE) % 3]
        MADE.append(self)

    # --- description ------------------------------------------------------------------------------------

    def tensor(self, dim: Any, stride: Any, data_type: Any, *, uid: int, name: str = "") -> Tensor:
        return self._tensor(integers(dim), integers(stride), data_type, uid, False)

    def _tensor(self, dim: Any, stride: Any, kind: Any, uid: int, virtual: bool) -> Tensor:
        self.tensors.append(Tensor(self, dim, stride, kind, uid, virtual))
        return self.tensors[-1]

    def _made(self, name: str, count: int, compute: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        outs = [self._tensor(None, None, None, -len(self.tensors) - 1, True) for _ in range(count)]

        def does(values: dict[int, Any]) -> None:
            results = compute(*(wide(values[t.uid]) for t in inputs), [t.dim for t in outs])
            for t, result in zip(outs, results, strict=True):
                if t.is_virtual:
                    values[t.uid] = np.asarray(result, DTYPES[t.data_type])
                else:
                    values[t.uid][...] = result
        self.operations.append((name, does))
        return outs

    def conv_fprop(self, *, image: Tensor, weight: Tensor, pre_padding: list[int], post_padding: list[int],
                   stride: list[int], dilation: list[int]) -> Tensor:
        spatial = geometry(image, pre_padding, post_padding, stride, dilation)
        [y] = self._made("conv_fprop", 1, lambda x, w, dims: [fprop(x, w, spatial)], image, weight)
        y.dim = [image.dim[0], weight.dim[0], *windows(image.dim[2:], weight.dim[2:], spatial)]
        return y

    def conv_dgrad(self, *, loss: Tensor, filter: Tensor, pre_padding: list[int], post_padding: list[int],
                   stride: list[int], dilation: list[int]) -> Tensor:
        spatial = geometry(loss, pre_padding, post_padding, stride, dilation)
        [x] = self._made("conv_dgrad", 1, lambda g, w, dims: [dgrad(g, w, dims[0], spatial)], loss, filter)
        return x

    def conv_wgrad(self, *, image: Tensor, loss: Tensor, pre_padding: list[int], post_padding: list[int],
                   stride: list[int], dilation: list[int]) -> Tensor:
        spatial = geometry(image, pre_padding, post_padding, stride, dilation)
        [w] = self._made("conv_wgrad", 1, lambda x, g, dims: [wgrad(x, g, dims[0], spatial)], image, loss)
        return w

    def add(self, *, a: Tensor, b: Tensor) -> Tensor:
        [y] = self._made("add", 1, lambda u, v, dims: [u + v], a, b)
        y.dim = [max(n, m) for n, m in zip(a.dim, b.dim, strict=True)]
        return y

    def sdpa(self, *, q: Tensor, k: Tensor, v: Tensor, attn_scale: float, generate_stats: bool,
             diagonal_alignment: Any = diagonal_alignment.TOP_LEFT,
             diagonal_band_right_bound: int | None = None) -> list[Tensor]:
        check_heads(q, k, v)
        assert generate_stats is True and diagonal_alignment.name == "TOP_LEFT" and type(attn_scale) is float
        return self._made("sdpa", 2, lambda q, k, v, dims: attention(
            q, k, v, attn_scale, diagonal_band_right_bound), q, k, v)

    def sdpa_backward(self, *, q: Tensor, k: Tensor, v: Tensor, o: Tensor, dO: Tensor, stats: Tensor,
                      attn_scale: float, use_deterministic_algorithm: bool,
                      diagonal_alignment: Any = diagonal_alignment.TOP_LEFT,
                      diagonal_band_right_bound: int | None = None) -> list[Tensor]:
        check_heads(q, k, v, o, dO)
        if q.dim[2] == k.dim[2] == 1:
            raise cudnnGraphNotSupportedError("s_q = s_kv = 1 is not supported.")
        *_, h, s, one = stats.dim
        if stats.data_type is not data_type.FLOAT or stats.stride != [h * s, s, 1, 1] or one != 1:
            raise cudnnGraphNotSupportedError("Stats must be a packed BHSD tensor of float")
        assert diagonal_alignment.name == "TOP_LEFT" and type(attn_scale) is float
        return self._made("sdpa_backward", 3, lambda *given: attention_back(
            *given[:-1], attn_scale, diagonal_band_right_bound), q, k, v, o, dO, stats)

    # --- building ---------------------------------------------------------------------------------------

    def validate(self) -> None:
        uids = [t.uid for t in self.tensors]
        assert len(set(uids)) == len(uids), f"tensors share numbers: {uids}"
        for t in self.tensors:
            if t.data_type is None and t.is_virtual:
                raise ValueError(f"tensor {t.uid}: data type not set")
            if t.is_virtual and len(t.dim or []) >= 4:
                continue
            if not t.dim or not t.stride or len(t.dim) != len(t.stride):
                raise ValueError(f"tensor {t.uid}: dims {t.dim} or strides {t.stride} not set")
            if len(t.dim) < 4 or min(t.dim) < 1:
                raise cudnnGraphNotSupportedError(f"tensor {t.uid} has extents {t.dim}")
        if all(t.is_virtual for t in self.tensors if t.uid < 0 or t is self.tensors[-1]):
            raise ValueError("no result was asked for by set_output(True)")
        self.validated = True

    def create_execution_plans(self, modes: Any) -> None:
        forbidden("planning a graph of cuDNN")
        assert self.validated and not self.planned and all(type(m) is heur_mode for m in modes)
        self.planned = True
        refused = REFUSED & {name for name, _ in self.operations}
        if refused:
            raise cudnnGraphNotSupportedError(f"no engine for {refused}")

    def deselect_numeric_notes(self, notes: Any) -> None:
        assert self.planned and all(type(n) is numerical_note for n in notes)
        self.notes += notes

    def check_support(self) -> None:
        assert self.planned
        self.supported = True

    def build_plans(self) -> None:
        assert self.supported
        self.built = True

    def get_workspace_size(self) -> int:
        if not self.built:
            raise RuntimeError("Call build() first")
        return self.size

    # --- execution --------------------------------------------------------------------------------------

    def execute(self, tensor_dict: dict[int, int], workspace: int | None, handle: Handle) -> None:
        assert self.built and type(handle) is Handle and handle.alive
        if self.size and type(workspace) is not int:
            raise TypeError(f"workspace {workspace!r}")
        here = [t for t in self.tensors if not t.is_virtual]
        if {t.uid for t in here} != set(tensor_dict) or any(type(p) is not int for p in tensor_dict.values()):
            raise ValueError(f"the variant pack has {tensor_dict}, the graph {[t.uid for t in here]}")
        size = self.size

        def does() -> None:
            values = {t.uid: array_at(tensor_dict[t.uid], t) for t in here}
            for _, operation in self.operations:
                operation(values)
            if size and workspace:
                (ctypes.c_char * size).from_address(workspace)[:] = b"\0" * size
        touches = [(tensor_dict[t.uid], nbytes(t), WRITE if t.written else READ) for t in here]
        touches.append((workspace or 0, size if workspace else 0, WRITE))
        work(does, by_handle(handle.stream), touches)  # type: ignore[arg-type]


def nbytes(t: Tensor) -> int:
    """From a tensor's first to its last element."""
    return (1 + sum((n - 1) * s for n, s in zip(t.dim, t.stride, strict=True))) * DTYPES[t.data_type].itemsize


def array_at(address: int, t: Tensor) -> Any:
    """The memory of a tensor."""
    dtype = DTYPES[t.data_type]
    if address % 16:
        raise RuntimeError(f"CUDNN_STATUS_BAD_PARAM: address {address:#x} is no multiple of 16")
    raw = (ctypes.c_char * nbytes(t)).from_address(address)
    return as_strided(np.frombuffer(raw, dtype), t.dim, [s * dtype.itemsize for s in t.stride])


def wide(x: Any) -> Any:
    return x.astype(np.float32)


# --- convolution ----------------------------------------------------------------------------------------

def geometry(x: Tensor, before: Any, after: Any, stride: Any, dilation: Any) -> Any:
    spatial = [integers(given) for given in (before, after, stride, dilation)]
    if any(len(given) != len(x.dim) - 2 for given in spatial):
        raise ValueError(f"{len(x.dim) - 2} spatial dimensions, geometry {spatial}")
    return list(zip(*spatial, strict=True))


def windows(size: Any, kernel: Any, spatial: Any) -> list[int]:
    return [(n + lo + hi - (k - 1) * d - 1) // s + 1
            for n, k, (lo, hi, s, d) in zip(size, kernel, spatial, strict=True)]


def taps(x: Any, kernel: Any, count: Any, spatial: Any) -> Any:
    """For each tap the elements of a padded x that it meets, (tap, view)."""
    for tap in np.ndindex(*kernel):
        yield tap, x[(..., *(slice(t * d, t * d + (n - 1) * s + 1, s)
                             for t, n, (_, _, s, d) in zip(tap, count, spatial, strict=True)))]


def padded(x: Any, spatial: Any) -> Any:
    return np.pad(x, [(0, 0), (0, 0), *((lo, hi) for lo, hi, _, _ in spatial)])


def by_group(x: Any, groups: int, axis: int) -> list[Any]:
    return np.split(x, groups, axis)


def fprop(x: Any, w: Any, spatial: Any) -> Any:
    groups, count = x.shape[1] // w.shape[1], windows(x.shape[2:], w.shape[2:], spatial)
    parts = []
    for u, f in zip(by_group(x, groups, 1), by_group(w, groups, 0), strict=True):
        parts.append(sum(np.einsum("nc...,oc->no...", part, f[(..., *tap)])
                         for tap, part in taps(padded(u, spatial), w.shape[2:], count, spatial)))
    return np.concatenate(parts, 1)


def dgrad(g: Any, w: Any, shape: Any, spatial: Any) -> Any:
    groups = shape[1] // w.shape[1]
    parts = []
    for u, f in zip(by_group(g, groups, 1), by_group(w, groups, 0), strict=True):
        whole = padded(np.zeros((shape[0], w.shape[1], *shape[2:]), np.float32), spatial)
        for tap, part in taps(whole, w.shape[2:], g.shape[2:], spatial):
            part += np.einsum("no...,oc->nc...", u, f[(..., *tap)])
        inner = (slice(lo, lo + n) for n, (lo, *_) in zip(shape[2:], spatial, strict=True))
        parts.append(whole[(..., *inner)])
    return np.concatenate(parts, 1)


def wgrad(x: Any, g: Any, shape: Any, spatial: Any) -> Any:
    groups, out = x.shape[1] // shape[1], np.zeros(shape, np.float32)
    parts = by_group(out, groups, 0)
    for u, v, f in zip(by_group(g, groups, 1), by_group(x, groups, 1), parts, strict=True):
        for tap, part in taps(padded(v, spatial), shape[2:], g.shape[2:], spatial):
            f[(..., *tap)] = np.einsum("nop,ncp->oc", *(a.reshape(*a.shape[:2], -1) for a in (u, part)))
    return out


# --- attention ------------------------------------------------------------------------------------------

def check_heads(*tensors: Tensor) -> None:
    for t in tensors:
        if t.data_type not in (data_type.HALF, data_type.BFLOAT16):
            raise cudnnGraphNotSupportedError(f"attention of {t.data_type}")
        if len(t.dim) != 4 or t.stride[3] != 1 or t.dim[3] % 8 or t.dim[3] > 256:
            raise cudnnGraphNotSupportedError(f"attention of {t.dim} with strides {t.stride}")


def weights_of(q: Any, k: Any, scale: float, bound: int | None) -> Any:
    s = q @ k.swapaxes(2, 3) * np.float32(scale)
    if bound is not None:
        s[..., np.triu(np.ones(s.shape[2:], bool), 1 + bound)] = -np.inf
    return s


def attention(q: Any, k: Any, v: Any, scale: float, bound: int | None) -> tuple[Any, Any]:
    s = weights_of(q, k, scale, bound)
    top = s.max(-1, keepdims=True)
    e = np.exp(s - top)
    total = e.sum(-1, keepdims=True)
    return e @ v / total, np.log(total) + top


def attention_back(q: Any, k: Any, v: Any, o: Any, g: Any, lse: Any, scale: float, bound: int | None) -> Any:
    p = np.exp(weights_of(q, k, scale, bound) - lse)
    e = p * (g @ v.swapaxes(2, 3) - (g * o).sum(-1, keepdims=True))
    return e @ k * scale, e.swapaxes(2, 3) @ q * scale, p.swapaxes(2, 3) @ g
