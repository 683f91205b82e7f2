"""nvmath.bindings.cublasLt of the emulation: the functions that runtime.cuda.lt calls, with their arguments
in the order of the real ones, on host memory.

`UNSUPPORTED` is a set of epilogues for which the heuristic has no algorithm.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from emulator.cublas import DTYPES, extent, matrix, scalar
from emulator.memory import bytes_at
from emulator.order import READ, WRITE
from emulator.streams import Stream, current_stream, forbidden, work
from meshtape.runtime.cuda import lt as names

matmul_algo_dtype = np.dtype([("data_", "<u8", (8,))])
matmul_heuristic_result_dtype = np.dtype([
    ("algo", matmul_algo_dtype), ("workspace_size", "<u8"), ("state", "<i4"), ("waves_count", "<f4"),
    ("reserved", "<i4", (4,))])
ALGO = 0x616C676F
UNSUPPORTED: set[int] = set()
CALLS: list[int] = []           # epilogues of the products that were done
_numbers = itertools.count(1)
_objects: dict[int, dict[Any, Any]] = {}
WIDTHS = {names.TRANSA: "i4", names.TRANSB: "i4", names.EPILOGUE: "u4", names.BIAS_POINTER: "u8",
          names.AUX_POINTER: "u8", names.AUX_LD: "i8"}
PREFERENCE_WIDTHS = {names.MAX_WORKSPACE_BYTES: "u8", names.REDUCTION_SCHEME_MASK: "u4",
                     **dict.fromkeys(names.MIN_ALIGNMENT, "u4")}
BACKWARD = (names.DRELU, names.DRELU_BGRAD, names.DGELU, names.DGELU_BGRAD)


class cuBLASLtError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"cublasLt: status {status}")


def _new(**what: Any) -> int:
    name = next(_numbers)
    _objects[name] = dict(what)
    return name


def create() -> int:
    forbidden("cublasLtCreate")
    return _new(kind="handle")


def destroy(light_handle: int) -> None:
    del _objects[light_handle]


def matmul_desc_create(compute_type: int, scale_type: int) -> int:
    return _new(kind="desc", compute=compute_type, scale=scale_type, attributes={})


def matmul_desc_destroy(matmul_desc: int) -> None:
    del _objects[matmul_desc]


def matmul_desc_set_attribute(matmul_desc: int, attr: int, buf: int, size_in_bytes: int) -> None:
    _set(_objects[matmul_desc], WIDTHS, attr, buf, size_in_bytes)


def matmul_preference_create() -> int:
    return _new(kind="preference", attributes={})


def matmul_preference_destroy(pref: int) -> None:
    del _objects[pref]


def matmul_preference_set_attribute(pref: int, attr: int, buf: int, size_in_bytes: int) -> None:
    _set(_objects[pref], PREFERENCE_WIDTHS, attr, buf, size_in_bytes)


def _set(what: dict[Any, Any], widths: dict[int, str], attr: int, buf: int, size: int) -> None:
    dtype = np.dtype(widths[attr])
    if size != dtype.itemsize:
        raise cuBLASLtError(7)
    what["attributes"][attr] = int(np.frombuffer(ctypes.string_at(buf, size), dtype)[0])


def matrix_layout_create(type: int, rows: int, cols: int, ld: int) -> int:
    assert ld >= rows > 0 and cols > 0
    return _new(kind="layout", type=type, rows=rows, cols=cols, ld=ld)


def matrix_layout_destroy(mat_layout: int) -> None:
    del _objects[mat_layout]


def matmul_algo_get_heuristic(
        light_handle: int, operation_desc: int, adesc: int, bdesc: int, cdesc: int, ddesc: int,
        preference: int, requested_algo_count: int, heuristic_results_array: int,
        return_algo_count: int) -> None:
    _checked(light_handle, operation_desc, adesc, bdesc, cdesc, ddesc)
    wanted = _objects[preference]["attributes"]
    desc = _objects[operation_desc]["attributes"]
    itemsize = DTYPES[_objects[ddesc]["type"]].itemsize
    assert all(wanted[name] >= itemsize for name in names.MIN_ALIGNMENT)
    if desc[names.EPILOGUE] in UNSUPPORTED or not _aux_fits(desc, _objects[ddesc]):
        raise cuBLASLtError(15)
    result = np.zeros(1, matmul_heuristic_result_dtype)
    result["algo"]["data_"][0, 0] = ALGO
    bytes_at(heuristic_results_array, result.nbytes)[:] = result.view(np.uint8)
    bytes_at(return_algo_count, 4).view(np.int32)[0] = min(1, requested_algo_count)


def _aux_fits(desc: dict[int, int], d: dict[str, Any]) -> bool:
    """Whether the leading dimension of the auxiliary matrix is one that cublasLt takes."""
    epilogue, ld = desc[names.EPILOGUE], desc.get(names.AUX_LD, 0)
    if epilogue in (names.RELU_AUX_BIAS, names.DRELU, names.DRELU_BGRAD):
        return ld % 128 == 0 and ld >= d["rows"]
    if epilogue in (names.GELU_AUX_BIAS, names.DGELU, names.DGELU_BGRAD):
        return ld % 8 == 0 and ld >= d["rows"]
    return True


def _checked(handle: int, desc: int, *layouts: int) -> None:
    """Raise if these are not what they should be, or shapes and dtypes do not fit."""
    assert [_objects[x]["kind"] for x in (handle, desc, *layouts)] == ["handle", "desc"] + ["layout"] * 4
    a, b, c, d = (_objects[x] for x in layouts)
    attributes = _objects[desc]["attributes"]
    m, k = (a["cols"], a["rows"]) if attributes[names.TRANSA] else (a["rows"], a["cols"])
    k2, n = (b["cols"], b["rows"]) if attributes[names.TRANSB] else (b["rows"], b["cols"])
    if (m, n, k) != (d["rows"], d["cols"], k2) or c != d or _objects[desc]["scale"] != 0:
        raise cuBLASLtError(7)
    if _objects[desc]["compute"] not in (68, 77) or len({x["type"] for x in (a, b, d)}) != 1:
        raise cuBLASLtError(15)


def matmul(light_handle: int, compute_desc: int, alpha: int, a: int, adesc: int, b: int, bdesc: int,
           beta: int, c: int, cdesc: int, d: int, ddesc: int, algo: int, workspace: int,
           workspace_size_in_bytes: int, stream: int) -> None:
    _checked(light_handle, compute_desc, adesc, bdesc, cdesc, ddesc)
    assert bytes_at(algo, 8).view(np.uint64)[0] == ALGO, "not an algorithm of the heuristic"
    assert scalar(alpha, np.dtype("f4")) == 1 and scalar(beta, np.dtype("f4")) == 0
    assert stream == current_stream().ptr and isinstance(current_stream(), Stream)
    attributes = dict(_objects[compute_desc]["attributes"])
    left, right, out = (dict(_objects[x]) for x in (adesc, bdesc, ddesc))

    def multiply() -> None:
        CALLS.append(attributes[names.EPILOGUE])
        bytes_at(workspace, workspace_size_in_bytes)[:] = 0xFF
        x, y, z = (matrix(at, of["type"], of["rows"], of["cols"], of["ld"])
                   for at, of in ((a, left), (b, right), (d, out)))
        x, y = x.astype(np.float32), y.astype(np.float32)
        x, y = x.T if attributes[names.TRANSA] else x, y.T if attributes[names.TRANSB] else y
        z[...] = _finished(x @ y, y, attributes, out)

    sizes = [extent(of["type"], of["rows"], of["cols"], of["ld"]) for of in (left, right, out)]
    work(multiply, touches=[(a, sizes[0], READ), (b, sizes[1], READ), (d, sizes[2], WRITE),
                            (workspace, workspace_size_in_bytes, WRITE), *_beside(attributes, out)])


def _beside(attributes: dict[int, int], out: dict[str, Any]) -> Iterator[tuple[int, int, str]]:
    """What an epilogue reads and writes besides the matrices."""
    epilogue, step = attributes[names.EPILOGUE], DTYPES[out["type"]].itemsize
    length = out["cols"] if epilogue == names.BGRADB else out["rows"]
    if epilogue & 4:
        yield attributes[names.BIAS_POINTER], length * step, READ
    elif epilogue in (names.BGRADB, names.DRELU_BGRAD, names.DGELU_BGRAD):
        yield attributes[names.BIAS_POINTER], length * step, WRITE
    bits = 1 if epilogue in (names.RELU_AUX_BIAS, names.DRELU, names.DRELU_BGRAD) else 8 * step
    if epilogue & 128:
        how = READ if epilogue in BACKWARD else WRITE
        yield attributes[names.AUX_POINTER], attributes[names.AUX_LD] * out["cols"] * bits // 8, how


def _finished(z: Any, y: Any, attributes: dict[int, int], out: dict[str, Any]) -> Any:
    """The epilogue on a product in float32, and what it writes beside it."""
    epilogue, kind = attributes[names.EPILOGUE], out["type"]
    step = DTYPES[kind].itemsize
    bias, aux = attributes.get(names.BIAS_POINTER, 0), attributes.get(names.AUX_POINTER, 0)
    ld = attributes.get(names.AUX_LD, 0)
    if epilogue & 4:
        z = z + bytes_at(bias, len(z) * step).view(DTYPES[kind]).astype(np.float32)[:, None]
    if epilogue == names.BGRADB:
        bytes_at(bias, z.shape[1] * step).view(DTYPES[kind])[:] = y.sum(0)
    if epilogue in (names.RELU_BIAS, names.RELU_AUX_BIAS):
        if epilogue == names.RELU_AUX_BIAS:
            _bits(aux, ld, z.shape)[...] = np.packbits(z > 0, axis=0, bitorder="little")
        z = np.maximum(z, 0)
    elif epilogue in (names.GELU_BIAS, names.GELU_AUX_BIAS):
        if epilogue == names.GELU_AUX_BIAS:
            matrix(aux, kind, *z.shape, ld)[...] = z
        z = 0.5 * z * (1 + np.tanh(_inner(z)))
    elif epilogue in (names.DRELU, names.DRELU_BGRAD):
        z = np.where(np.unpackbits(_bits(aux, ld, z.shape), axis=0, count=len(z), bitorder="little"), z, 0)
    elif epilogue in (names.DGELU, names.DGELU_BGRAD):
        x = matrix(aux, kind, *z.shape, ld).astype(np.float32)
        t = np.tanh(_inner(x))
        z = z * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x * x))
    if epilogue in (names.DRELU_BGRAD, names.DGELU_BGRAD):
        bytes_at(bias, len(z) * step).view(DTYPES[kind])[:] = z.sum(1)
    return z


def _inner(x: Any) -> Any:
    return np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)


def _bits(address: int, ld: int, shape: tuple[int, ...]) -> Any:
    """A bit mask of a column-major matrix, columns of `ld` bits, as the bytes that have bits."""
    raw = bytes_at(address, ld // 8 * shape[1]).reshape(shape[1], ld // 8)
    return raw[:, :-(-shape[0] // 8)].T
