"""Which transport carries the collectives along a mesh axis: decided from facts about its ranks, all at once.

The driver decides for everybody, with facts that the workers found where they are; nothing is tried out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from meshtape.runtime.errors import MeshError

# From this version on, NCCL can join ranks that share a GPU, if told to by its environment.
SHARING_NCCL = 23003
SHARING_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"

Transport = Literal["host", "nccl", "staged"]
# What MESHTAPE_TRANSPORT may ask for; "tcp" is about hosts (see endpoint.machine).
WISHES = ("", "tcp", "staged", "nccl")


class Member(NamedTuple):
    """A rank: its machine, its GPU there ("" for a worker that computes with NumPy), and the version of NCCL
    as one number (22803 for 2.28.3; 0 where it cannot be used).
    """

    host: str
    gpu: str = ""
    nccl: int = 0


class Choice(NamedTuple):
    """A transport and, in a few words, why."""

    transport: Transport
    reason: str


def choose(groups: Sequence[Sequence[Member]], wish: str = "") -> Choice:
    """The transport along a mesh axis, whose groups of ranks are `groups`: one for all of them.

    wish: "staged" passes over NCCL; "nccl" takes it even for ranks that share a GPU, if its version can do
    that. Raises MeshError where some ranks have a GPU and others have none, and where a wish cannot be met.
    """
    if wish not in WISHES:
        raise MeshError(f"MESHTAPE_TRANSPORT={wish!r}: use one of {', '.join(w for w in WISHES if w)}")
    members = [member for group in groups for member in group]
    without = [m for m in members if not m.gpu]
    if without and len(without) < len(members):
        raise MeshError(f"{len(without)} of {len(members)} workers have no GPU, the others have one; use "
                        'devices="cpu" for all, or fewer workers')
    if without:
        return Choice("host", "workers without GPUs")
    if max(len(group) for group in groups) == 1:
        return Choice("nccl", "one worker")
    obstacle = _obstacle(groups, members, wish)
    if wish == "nccl" and obstacle:
        raise MeshError(f"MESHTAPE_TRANSPORT=nccl, but {obstacle}; leave the variable out to copy arrays "
                        "through the hosts")
    if wish == "staged":
        return Choice("staged", "MESHTAPE_TRANSPORT=staged")
    if obstacle:
        return Choice("staged", obstacle)
    devices = _sharing(groups) or "a GPU for every worker"
    return Choice("nccl", f"NCCL {version_text(members[0].nccl)}, {devices}")


def _obstacle(groups: Sequence[Sequence[Member]], members: Sequence[Member], wish: str) -> str:
    """Why NCCL cannot join these ranks, or ""."""
    lacking = {m.host for m in members if not m.nccl}
    if lacking:
        return f"no NCCL on {', '.join(sorted(lacking))}"
    versions = sorted({m.nccl for m in members})
    if len({v // 100 for v in versions}) > 1:
        return f"versions of NCCL differ: {', '.join(map(version_text, versions))}"
    shared = _sharing(groups)
    if shared and wish != "nccl":
        return shared
    if shared and versions[0] < SHARING_NCCL:
        return (f"{shared}, which takes NCCL {version_text(SHARING_NCCL)}, and here is "
                f"{version_text(versions[0])}")
    return ""


def _sharing(groups: Sequence[Sequence[Member]]) -> str:
    """Which workers of a group share a GPU, or ""."""
    for group in groups:
        (host, gpu), count = Counter((m.host, m.gpu) for m in group).most_common(1)[0]
        if count > 1:
            return f"{count} workers share GPU {gpu} of {host}"
    return ""


def version_text(number: int) -> str:
    """2.28.3 from NCCL's 22803."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
