"""Meshes for tests of the front door."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import meshtape as mt


@pytest.fixture(autouse=True)
def fresh_session() -> Iterator[None]:
    """Every test starts without a mesh and leaves none behind."""
    mt.shutdown()
    yield
    mt.shutdown()


@pytest.fixture(params=[1, 2, 3])
def workers(request: pytest.FixtureRequest) -> int:
    """The test runs with one worker in the process, and with two and three threads."""
    start(request.param)
    return int(request.param)


def start(workers: int) -> None:
    mt.shutdown()
    if workers > 1:
        mt.init(workers=workers, backend="local")
