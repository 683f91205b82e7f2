"""Which transport carries an axis, from facts about its ranks."""

from __future__ import annotations

import pytest

from meshtape.runtime.collectives.choice import Member, choose, version_text
from meshtape.runtime.errors import MeshError

NEW, OLD = 23203, 22803


def members(*where: str, nccl: int = OLD) -> list[Member]:
    """"a0" is GPU 0 of host a, "a" a worker there without one."""
    return [Member(w[0], w[1:] and f"0000:0{w[1:]}:00.0", nccl) for w in where]


def test_a_gpu_for_every_worker_takes_nccl_on_one_host_and_on_several() -> None:
    for group in (members("a0", "a1"), members("a0", "b0"), members("a0", "a1", "b0", "b1")):
        choice = choose([group])
        assert choice.transport == "nccl" and choice.reason == "NCCL 2.28.3, a GPU for every worker"


def test_workers_without_gpus_use_the_host() -> None:
    assert choose([members("a", "a", "b")]).transport == "host"


def test_shared_gpus_are_staged_and_the_reason_names_them() -> None:
    choice = choose([members("a0", "a0", "a1", "a1")])
    assert choice == ("staged", "2 workers share GPU 0000:00:00.0 of a")
    assert choose([members("a0", "a1"), members("a0", "a1")]).transport == "nccl"


def test_one_group_that_cannot_decides_for_the_whole_axis() -> None:
    assert choose([members("a0", "a1"), members("b0", "b0")]).transport == "staged"


def test_nccl_joins_ranks_of_one_gpu_only_if_asked_and_new_enough() -> None:
    shared = members("a0", "a0", nccl=NEW)
    assert choose([shared]).transport == "staged"
    assert choose([shared], "nccl").transport == "nccl"
    with pytest.raises(MeshError, match=r"share GPU .* which takes NCCL 2\.30\.3, and here is 2\.28\.3"):
        choose([members("a0", "a0", nccl=OLD)], "nccl")


def test_missing_or_different_nccl_is_staged_and_says_where() -> None:
    group = [Member("a", "0000:01:00.0", OLD), Member("b", "0000:01:00.0", 0)]
    assert choose([group]) == ("staged", "no NCCL on b")
    group = [Member("a", "0000:01:00.0", OLD), Member("b", "0000:01:00.0", NEW)]
    assert choose([group]) == ("staged", "versions of NCCL differ: 2.28.3, 2.32.3")
    with pytest.raises(MeshError, match="MESHTAPE_TRANSPORT=nccl, but versions of NCCL differ"):
        choose([group], "nccl")


def test_some_workers_with_a_gpu_and_some_without_are_an_error() -> None:
    with pytest.raises(MeshError, match=r'1 of 3 workers have no GPU.*devices="cpu"'):
        choose([members("a0", "a1", "b")])


def test_wishes() -> None:
    assert choose([members("a0", "a1")], "staged").transport == "staged"
    assert choose([members("a0", "a1")], "tcp").transport == "nccl"
    with pytest.raises(MeshError, match="MESHTAPE_TRANSPORT='pigeon': use one of tcp, staged, nccl"):
        choose([members("a0")], "pigeon")


def test_groups_of_one_need_nothing() -> None:
    assert choose([members("a0", nccl=0), members("a1", nccl=0)]) == ("nccl", "one worker")


def test_versions_read_as_people_write_them() -> None:
    assert (version_text(22803), version_text(23203)) == ("2.28.3", "2.32.3")
