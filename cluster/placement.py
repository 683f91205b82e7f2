"""Which worker gets which rank, and how collectives then travel: pure, from what the workers found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, Protocol, TypeVar

from meshtape.runtime.collectives.choice import Choice, Member, choose
from meshtape.runtime.gpu import Gpu
from meshtape.runtime.shards import axis_ranks

T = TypeVar("T")


class Spot(Protocol):
    """Where a worker is."""

    @property
    def node_id(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def ip(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def gpu(self) -> Gpu | None: ...


def ranking(spots: Sequence[Spot], here: str, inner: int = 1) -> list[int]:
    """Indices of the spots in order of rank, so that ranks along the last mesh axis, of extent `inner`, are
    as near to each other as can be.

    Runs of `inner` ranks are taken from GPUs that NVLink joins, then from what is left at one memory node,
    then from what is left on one machine, and at last across machines. The driver's node `here` comes first.
    """
    runs: list[list[int]] = []
    left: list[int] = []
    machines = _groups(range(len(spots)), lambda i: (spots[i].node_id != here, spots[i].ip, spots[i].node_id))
    for machine in machines:
        machine.sort(key=lambda i: _place(spots[i]))
        of_machine: list[int] = []
        for node in _groups(islands(spots, machine), lambda island: _place(spots[island[0]])[0]):
            of_node: list[int] = []
            for island in node:
                of_node += _take(island, inner, runs)
            of_machine += _take(of_node, inner, runs)
        left += _take(of_machine, inner, runs)
    machine_of = {i: at for at, machine in enumerate(machines) for i in machine}
    runs.sort(key=lambda run: (machine_of[run[0]], _place(spots[run[0]])))
    return [i for run in runs for i in run] + left


def islands(spots: Sequence[Spot], members: Sequence[int]) -> list[list[int]]:
    """The members, of one machine, by groups that NVLink joins directly or through each other, in order."""
    out: list[list[int]] = []
    for i in members:
        joined = [island for island in out if any(_linked(spots[i], spots[j]) for j in island)]
        merged = sorted([i, *(j for island in joined for j in island)], key=members.index)
        out = [island for island in out if island not in joined] + [merged]
    return sorted(out, key=lambda island: members.index(island[0]))


def _linked(a: Spot, b: Spot) -> bool:
    """Workers that share a GPU are as near as can be."""
    return a.gpu is not None and b.gpu is not None and (
        a.gpu.pci == b.gpu.pci or b.gpu.pci in a.gpu.linked or a.gpu.pci in b.gpu.linked)


def _place(spot: Spot) -> tuple[int, str, int]:
    return (spot.gpu.numa, spot.gpu.pci, spot.pid) if spot.gpu is not None else (-1, "", spot.pid)


def _groups(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Items of equal key together, in order of the keys."""
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return [found[k] for k in sorted(found)]


def _take(members: Sequence[int], inner: int, runs: list[list[int]]) -> list[int]:
    """Cut runs of `inner` members off into `runs`; what is left over."""
    whole = len(members) // inner * inner
    runs.extend(list(members[k:k + inner]) for k in range(0, whole, inner))
    return list(members[whole:])


def transports(spots: Sequence[Spot], shape: Sequence[int], wish: str = "") -> list[Choice]:
    """How collectives travel along every mesh axis; spots are in order of rank. MeshError as in choose()."""
    members = [Member(f"{s.host} ({s.ip})", s.gpu.pci if s.gpu else "", s.gpu.nccl if s.gpu else 0)
               for s in spots]
    out = []
    for axis in range(len(shape)):
        groups = {tuple(axis_ranks(rank, shape, axis)) for rank in range(prod(shape))}
        out.append(choose([[members[r] for r in group] for group in sorted(groups)], wish))
    return out
