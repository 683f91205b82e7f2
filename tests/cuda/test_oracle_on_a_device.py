"""PyTorch's recorded samples, as in tests/front/test_oracle.py, with a worker on a device."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import oracle_adapter
import pytest

import meshtape as mt
from meshtape.cluster.local import InlineMesh
from meshtape.scheduler import current
from meshtape.scheduler.session import Session

if not os.environ.get("MESHTAPE_ORACLE"):
    pytest.skip("MESHTAPE_ORACLE names no file of samples", allow_module_level=True)

_spec: Any = importlib.util.spec_from_file_location(
    "front_oracle", Path(__file__).parents[1] / "front" / "test_oracle.py")
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)


@pytest.mark.parametrize("name", sorted(oracle_adapter.MAP))
def test_replay(name: str, opens: Any) -> None:
    mt.shutdown()
    current.use(Session(InlineMesh(open_device=opens)))
    try:
        for case in oracle.cases():
            if case["op"] == name:
                oracle.replay(case)
    finally:
        mt.shutdown()
