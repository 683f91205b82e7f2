"""Which results may be written over which operands, and which kept values must be copied. Pure.

Arrays are followed in *groups* that may share memory: a kernel that takes `out` makes an array of its own,
any other may return a view of its inputs. What the block table holds is always an array of its own: a kept
view is copied when the batch ends, and so is a kept feed, which belongs to whoever fed it. So a block that
the user has let go, and every temporary whose group is not read again, can be overwritten where an op allows
it: pointwise ops (their `elementwise` column is set) over an input of the same shape and dtype, and ops that
say so themselves by the column `over`. Views themselves are never written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NEVER = 1 << 60

Reuse = tuple[tuple[int, int], ...]     # (output position, input position)


class Groups:
    """Union-find over slots."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def find(self, slot: int) -> int:
        while self.parent.setdefault(slot, slot) != slot:
            slot = self.parent[slot]
        return slot

    def join(self, a: int, b: int) -> None:
        self.parent[self.find(a)] = self.find(b)


class Sharing(NamedTuple):
    """Kept slots that may be views (copied if they are), and kept slots that are somebody else's arrays."""

    views: frozenset[int]
    feeds: frozenset[int]


def reuses(
    steps: Sequence[tuple[Any, tuple[int, ...], tuple[int, ...]]],
    last: Mapping[int, int],
    taken: frozenset[int],
    kept: Sequence[int],
    types: Mapping[int, Any],
    lent: frozenset[int] = frozenset(),
) -> tuple[list[Reuse], Sharing]:
    """For every step (call, ins, outs) its reuses, and which kept slots share memory.

    `last` is the step after which a slot is not read; `taken` are external slots that nobody else holds;
    `types` gives local (shape, dtype) by slot. `lent` slots have a place of their own: nothing is written
    over them, nor they over anything.
    """
    groups = Groups()
    own, views, feeds, made = set(taken), set[int](), set[int](), set[int]()
    foreign: set[int] = set()               # slots whose memory outlives the batch for others
    for call, ins, outs in steps:
        read = [s for s in ins if s >= 0]
        foreign.update(s for s in read if s not in made and s not in taken)
        made.update(outs)
        if call.kind == "feed":
            feeds.update(outs)
        elif call.kind == "start":
            pass                            # makes no array
        elif call.kind == "fused" or (
                len(outs) > 1 if call.op is None else call.op.takes_out):
            own.update(
                s for s in outs if s not in lent
            )  # a bucket's results are parts of one array that do not overlap
        else:
            views.update(outs)
            for slot in outs:
                for s in read:
                    groups.join(slot, s)
    members: dict[int, list[int]] = {}
    for slot in {*last, *groups.parent}:
        members.setdefault(groups.find(slot), []).append(slot)
    alien = {groups.find(s) for s in foreign | feeds}
    kept_set = set(kept)
    # A kept view is copied when the batch ends, and must find its memory unchanged then.
    ends = {g: NEVER if g in alien else max(NEVER if s in kept_set else last.get(s, -1) for s in slots)
            for g, slots in members.items()}
    found = [
        tuple(pair for pair in _step_reuse(call, ins, outs, at, own, groups, ends, types)
              if outs[pair[0]] not in lent)
        for at, (call, ins, outs) in enumerate(steps)
    ]
    return found, Sharing(frozenset(views & kept_set), frozenset(feeds & kept_set))


def _step_reuse(call: Any, ins: tuple[int, ...], outs: tuple[int, ...], at: int, own: set[int],
                groups: Groups, ends: Mapping[int, int], types: Mapping[int, Any]) -> Reuse:
    op = call.op
    if op is None:
        pairs = list(call.over)
    elif not op.takes_out:
        return ()
    elif op.over is not None:
        pairs = op.over(len(ins), call.attrs)
    elif op.elementwise is not None and len(outs) == 1:
        pairs = [(0, i) for i in range(len(ins))]
    else:
        return ()
    chosen: dict[int, int] = {}
    for out, i in pairs:
        slot = ins[i]
        if (
            out in chosen
            or slot not in own
            or ins.count(slot) > 1
            or ends.get(groups.find(slot), NEVER) != at
        ):
            continue
        if types[slot] == (call.shapes[out], call.dtypes[out]) and i not in chosen.values():
            chosen[out] = i
    return tuple(chosen.items())
