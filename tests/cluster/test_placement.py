"""Ranks follow what joins the workers' GPUs, and transports where they are: on made-up machines."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from meshtape.cluster.placement import islands, ranking, transports
from meshtape.runtime.errors import MeshError
from meshtape.runtime.gpu import Gpu


class Spot(NamedTuple):
    node_id: str
    host: str
    ip: str
    pid: int
    gpu: Gpu | None


def pci(number: int) -> str:
    return f"0000:{number:02X}:00.0"


def spot(host: str, number: int | None, numa: int = 0, linked: tuple[int, ...] = (), nccl: int = 22803,
         pid: int = 1) -> Spot:
    gpu = None if number is None else Gpu(0, "H200", pci(number), 1 << 37, "9.0", numa,
                                          tuple(map(pci, linked)), nccl)
    return Spot(f"node {host}", host, f"10.0.0.{ord(host) - 96}", pid, gpu)


def numbers(spots: list[Spot], order: list[int]) -> list[str]:
    """Host and GPU in order of rank, e.g. "a3"."""
    return [spots[i].host + (str(int(gpu.pci[5:7], 16)) if (gpu := spots[i].gpu) else "") for i in order]


def shuffled(spots: list[Spot]) -> list[Spot]:
    """In an order that has nothing to do with where they are."""
    return [spots[i * 5 % len(spots)] for i in range(len(spots))] if len(spots) % 5 else spots[::-1]


def switched(host: str) -> list[Spot]:
    """Eight GPUs that all reach each other through NVSwitch, four at each memory node."""
    return [spot(host, k, k // 4, tuple(j for j in range(8) if j != k)) for k in range(8)]


def paired(host: str) -> list[Spot]:
    """Eight GPUs joined in pairs k and k + 4, which sit at one memory node each."""
    return [spot(host, k, k % 2, ((k + 4) % 8,)) for k in range(8)]


def test_eight_gpus_behind_a_switch_stand_in_order_of_their_bus() -> None:
    spots = shuffled(switched("a"))
    for inner in (1, 2, 4, 8):
        assert numbers(spots, ranking(spots, "node a", inner)) == [f"a{k}" for k in range(8)]


def test_the_last_axis_lies_within_pairs_that_nvlink_joins() -> None:
    spots = shuffled(paired("a"))
    found = numbers(spots, ranking(spots, "node a", 2))
    assert sorted(found[k:k + 2] for k in range(0, 8, 2)) == [["a0", "a4"], ["a1", "a5"], ["a2", "a6"],
                                                               ["a3", "a7"]]


def test_without_nvlink_the_last_axis_lies_within_memory_nodes() -> None:
    spots = shuffled([spot("a", k, k % 2) for k in range(8)])
    assert numbers(spots, ranking(spots, "", 4)) == ["a0", "a2", "a4", "a6", "a1", "a3", "a5", "a7"]


def test_two_machines_never_mix_along_the_last_axis_and_the_drivers_comes_first() -> None:
    spots = shuffled([*switched("a"), *switched("b")])
    found = numbers(spots, ranking(spots, "node b", 8))
    assert found == [f"b{k}" for k in range(8)] + [f"a{k}" for k in range(8)]


def test_what_is_left_over_joins_others_of_its_machine_before_it_crosses() -> None:
    """Three, three and two GPUs, in runs of two: one run crosses machines, the fewest possible."""
    spots = shuffled([spot("a", k, linked=(0, 1, 2)) for k in range(3)]
                     + [spot("b", k, linked=(0, 1, 2)) for k in range(3)]
                     + [spot("c", k, linked=(0, 1)) for k in range(2)])
    found = numbers(spots, ranking(spots, "node a", 2))
    assert found == ["a0", "a1", "b0", "b1", "c0", "c1", "a2", "b2"]


def test_islands_that_are_no_multiple_leave_pairs_within_the_machine() -> None:
    three = [spot("a", k, 0, (0, 1, 2)) for k in range(3)] + [spot("a", k, 1, (3, 4, 5)) for k in (3, 4, 5)]
    found = numbers(three, ranking(three, "", 2))
    assert [found[k:k + 2] for k in (0, 2, 4)] == [["a0", "a1"], ["a2", "a5"], ["a3", "a4"]]


def test_machines_with_one_gpu_each_and_workers_without_any() -> None:
    spots = [spot(host, 0) for host in "dbca"]
    assert numbers(spots, ranking(spots, "node c", 2)) == ["c0", "a0", "b0", "d0"]
    spots = [spot("b", None, pid=2), spot("a", None, pid=9), spot("b", None, pid=1), spot("a", None, pid=3)]
    assert ranking(spots, "node b", 4) == [2, 0, 3, 1]


def test_every_worker_gets_one_rank() -> None:
    spots = [*switched("a"), *paired("b"), spot("c", 0), spot("d", None)]
    for inner in (1, 2, 3, 4, 6, 9, 18):
        assert sorted(ranking(spots, "", inner)) == list(range(18))


def test_islands_grow_together_and_sharers_of_a_gpu_are_one() -> None:
    chain = [spot("a", 0), spot("a", 2, linked=(1,)), spot("a", 1, linked=(0,)), spot("a", 5),
             spot("a", 5, pid=2)]
    assert islands(chain, [0, 1, 2, 3, 4]) == [[0, 1, 2], [3, 4]]


def test_transports_are_chosen_by_axis() -> None:
    """Two GPUs shared by two workers each, on two machines."""
    spots = [spot(host, k, pid=p) for host in "ab" for k in (0, 1) for p in (1, 2)]
    outer, middle, inner = transports(spots, (2, 2, 2))
    assert (outer.transport, middle.transport, inner.transport) == ("nccl", "nccl", "staged")
    assert inner.reason == f"2 workers share GPU {pci(0)} of a (10.0.0.1)"
    assert [c.transport for c in transports(spots, (8,), "staged")] == ["staged"]


def test_workers_of_which_only_some_have_a_gpu_are_an_error() -> None:
    with pytest.raises(MeshError, match="1 of 2 workers have no GPU"):
        transports([spot("a", 0), spot("a", None)], (2,))
