"""Recorded samples of PyTorch's own operator tests, replayed: values, dtypes and gradients.

The samples are a pickle file outside the repository: {"cases": [...]}, each case with op, dtype, args,
kwargs, outs, diff (paths of the differentiated inputs), cots (cotangents of the outputs), grads, smooth.

    MESHTAPE_ORACLE=torch_ops.pkl pytest tests/front/test_oracle.py
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import oracle_adapter
import pytest

import meshtape as mt

FILE = os.environ.get("MESHTAPE_ORACLE", "")
TOLERANCE = {"float64": (1e-7, 1e-9), "float32": (2e-4, 2e-5)}

if not FILE:
    pytest.skip("MESHTAPE_ORACLE names no file of samples", allow_module_level=True)

Path = tuple[Any, ...]


@lru_cache(maxsize=1)
def cases() -> list[dict[str, Any]]:
    with open(FILE, "rb") as file:
        return pickle.load(file)["cases"]


def replaced(value: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The arguments with every array replaced by function(path, array)."""
    if isinstance(value, np.ndarray):
        return function(path, value)
    if type(value) in (list, tuple):
        return type(value)(replaced(v, function, (*path, k)) for k, v in enumerate(value))
    if isinstance(value, dict) and set(value) != {"dtype"}:
        return {k: replaced(v, function, (*path, k)) for k, v in value.items()}
    return value


def flattened(value: Any) -> list[Any]:
    return [z for v in value for z in flattened(v)] if isinstance(value, list | tuple) else [value]


def assert_close(got: Any, wanted: Any, dtype: str, what: str) -> None:
    assert got.shape == wanted.shape, f"{what}: shape {got.shape}, wanted {wanted.shape}"
    rtol, atol = TOLERANCE[dtype] if wanted.dtype.kind in "fc" else (0.0, 0.0)
    scale = max(1.0, float(np.max(np.abs(wanted[np.isfinite(wanted)]), initial=0))) if atol else 1.0
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol * scale, equal_nan=True, err_msg=what)


def replay(case: dict[str, Any]) -> None:
    wanted_grads = case["diff"] if case["smooth"] else []
    inputs: dict[Path, Any] = {}

    def make(path: Path, array: Any) -> Any:
        made = oracle_adapter.tensor(array, path in wanted_grads)
        if path in wanted_grads:
            inputs[path] = made
        return made

    arguments = replaced({"args": case["args"], "kwargs": case["kwargs"]}, make)
    outs = flattened(oracle_adapter.MAP[case["op"]](*arguments["args"], **arguments["kwargs"]))
    what = f"{case['op']} [{case['dtype']} #{case['i']}]"
    for k, (out, wanted) in enumerate(zip(outs, case["outs"], strict=True)):
        got = np.asarray(out)
        assert_close(got, wanted, case["dtype"], f"{what} output {k}")
        assert got.dtype == wanted.dtype, f"{what} output {k}: dtype {got.dtype}, wanted {wanted.dtype}"
    if inputs:
        grads = oracle_adapter.vjp(outs, case["cots"], [inputs[p] for p in wanted_grads])
        for path, grad, wanted in zip(wanted_grads, grads, case["grads"], strict=True):
            assert_close(np.zeros_like(wanted) if grad is None else grad, wanted, case["dtype"],
                         f"{what} by {path}")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", sorted(oracle_adapter.MAP))
def test_replay(name: str, workers: int) -> None:
    found = [c for c in cases() if c["op"] == name]
    assert found, f"the file has no cases of {name}"
    if workers > 1:
        mt.init(workers=workers, backend="local")
    for case in found:
        replay(case)
