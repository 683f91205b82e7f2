"""Checkpoints in files: save() and load(), in the safetensors format.

A checkpoint is a nested structure of tensors, arrays, numbers, strings, dicts and lists. Its arrays are the
file's tensors, under the dotted path by which they were reached; the structure itself is JSON in the file's
metadata. So a flat dict of tensors can be read by any program that reads safetensors, and a file of such a
program by load().
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from meshtape.autograd import Tensor
from meshtape.autograd.tensor import owner_session
from meshtape.runtime.dtypes import bfloat16, canonical
from meshtape.runtime.errors import DTypeError, StateError

ENTRY = "meshtape"              # the metadata entry with the structure
FORMAT = 1

Array = np.ndarray[Any, Any]
AnyPath = str | os.PathLike[str]


def save(obj: Any, path: AnyPath, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict, a module, an optimizer, or a nested dict of such, tensors, arrays, numbers and
    lists.

    Sharded tensors are gathered (all in one wait). The file appears whole or not at all. `metadata`: strings
    to keep beside it. Raises StateError for what a checkpoint cannot hold.
    """
    arrays: dict[str, Any] = {}
    tree = _encode(obj, "", arrays)
    if "dict" not in tree:
        raise StateError(f"save: a checkpoint is a dict (or has a state_dict()), got a {type(obj).__name__}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str) or key == ENTRY:
            raise StateError(f"save: metadata {key!r}: {value!r}; use strings, under another name than "
                             f"{ENTRY!r}")
    header = {**(metadata or {}), ENTRY: json.dumps({"format": FORMAT, "tree": tree})}
    _write(_gathered(arrays), header, Path(path))


def load(path: AnyPath) -> dict[str, Any]:
    """The structure that was saved, with NumPy arrays for tensors; of any other safetensors file, its tensors
    by name.

    Raises StateError if the file is damaged or no checkpoint, FileNotFoundError if there is none.
    """
    arrays, header = _read(path)
    if ENTRY not in header:
        return arrays
    try:
        found = json.loads(header[ENTRY])
        if found["format"] != FORMAT:
            raise StateError(f"load: {os.fspath(path)!r} has format {found['format']}, this version reads "
                             f"{FORMAT}; use a newer meshtape")
        return _decode(found["tree"], arrays)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"load: {os.fspath(path)!r} has a damaged structure ({error!r}); save it "
                         f"again") from error


def load_metadata(path: AnyPath) -> dict[str, str]:
    """The strings that were given to save() as metadata. Raises as load() does."""
    return {k: v for k, v in _read(path, values=False)[1].items() if k != ENTRY}


# --- structure ------------------------------------------------------------------------------------------

def _encode(value: Any, path: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """The structure of `value` as JSON, with its arrays put into `arrays`."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _encode_array(value, path, arrays)
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if hasattr(value, "state_dict"):
        return _encode(value.state_dict(), path, arrays)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int):
                raise StateError(f"save: the key {key!r} in {path or 'the checkpoint'}; use strings or ints")
        return {"dict": [[k, _encode(v, _join(path, k), arrays)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(v, _join(path, i), arrays) for i, v in enumerate(value)]}
    raise StateError(f"save: {path or 'the checkpoint'} is a {type(value).__name__}; a checkpoint holds "
                     f"tensors, arrays, numbers, strings, None, dicts and lists")


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


def _encode_array(value: Any, path: str, arrays: dict[str, Any]) -> dict[str, Any]:
    try:
        dtype = canonical(value.dtype)
    except DTypeError as error:
        raise StateError(f"save: {path} has dtype {value.dtype}, which a checkpoint cannot hold") from error
    name, count = path, 2
    while name in arrays:
        name, count = f"{path}#{count}", count + 1
    arrays[name] = value
    return {"complex" if dtype.kind == "c" else "array": name}


def _decode(node: dict[str, Any], arrays: Mapping[str, Array]) -> Any:
    (kind, value), = node.items()
    match kind:
        case "value":
            return value
        case "array":
            return arrays[value]
        case "complex":
            pairs = arrays[value]
            return pairs.view("complex64" if pairs.dtype == np.float32 else "complex128")[..., 0]
        case "dict":
            return {k: _decode(v, arrays) for k, v in value}
        case "list":
            return [_decode(v, arrays) for v in value]
        case "tuple":
            return tuple(_decode(v, arrays) for v in value)
    raise ValueError(f"unknown kind {kind!r}")


# --- files ----------------------------------------------------------------------------------------------

def _gathered(arrays: Mapping[str, Any]) -> dict[str, Array]:
    """Every value as a C-contiguous NumPy array; complex ones as pairs of reals, which safetensors knows."""
    tensors = {name: t for name, t in arrays.items() if isinstance(t, Tensor)}
    values: dict[str, Array] = {}
    # Raises for a tensor of a mesh that was shut down.
    sessions = [owner_session(t) for t in tensors.values()]
    if tensors:
        fetched = sessions[0].fetch([(t.block, t.spec) for t in tensors.values()])
        values = dict(zip(tensors, fetched, strict=True))
    out = {}
    for name, given in arrays.items():
        a = np.array(values.get(name, given), order="C", copy=None)
        a = a.astype(canonical(a.dtype), copy=False)
        if a.dtype.kind == "c":
            a = np.array(a[..., None], order="C").view("float32" if a.dtype == np.complex64 else "float64")
        out[name] = a
    return out


def _write(arrays: dict[str, Array], header: dict[str, str], path: Path) -> None:
    """Write beside `path`, then rename, so that a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary, metadata=header)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"save: {os.fspath(path)!r} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: AnyPath, values: bool = True) -> tuple[dict[str, Array], dict[str, str]]:
    """The file's arrays by name and its metadata."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"load: there is no file {os.fspath(path)!r}")
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            names = list(file.keys()) if values else []
            if any(file.get_slice(n).get_dtype() == "BF16" for n in names):
                bfloat16()                              # makes the dtype known to NumPy by its name
            return {n: file.get_tensor(n) for n in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise StateError(f"load: {os.fspath(path)!r} is no checkpoint, or a damaged one ({error}); give a "
                         f"file that meshtape.save() or another safetensors writer made") from error


__all__ = ["load", "load_metadata", "save"]
