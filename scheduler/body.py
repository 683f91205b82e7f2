"""A batch's body: from the flat list that recording fills to the program that workers keep. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import msgpack

from meshtape.runtime.protocol import Instr, Program, TensorType
from meshtape.scheduler.buckets import advance, bucket, hoist, merge_duplicates, unflatten
from meshtape.scheduler.cost import Link, bucket_bytes
from meshtape.scheduler.updates import join_updates


class Body(NamedTuple):
    """A program and its digest; `origin[step]` is the recorded instruction it came from.

    `external` are the slots that are bound before the first step, `types` the types of the slots that steps
    make, `feeds` those of them that are fed, and `asked` those whose values the user fetched after an earlier
    run: they come with the reply.
    """

    digest: bytes
    program: Program
    origin: tuple[int, ...]
    external: tuple[int, ...]
    types: dict[int, TensorType]
    asked: set[int]
    feeds: tuple[int, ...]


def assemble(recorded: Sequence[int], instrs: Sequence[Instr], n_slots: int, dead: tuple[int, ...],
             temporary: Sequence[int], number: Callable[[Instr], int], links: Sequence[Link],
             mesh_shape: Sequence[int], precision: str = "highest") -> Body:
    """The body of a recorded batch, its reductions merged and bucketed where there is more than one worker,
    and begun early where they can run beside kernels.
    """
    steps = unflatten(recorded, instrs)
    if prod(mesh_shape) > 1:
        overlaps = [link.overlaps for link in links]
        steps = merge_duplicates(steps, instrs, frozenset(temporary))
        limits = [bucket_bytes(link, n) for link, n in zip(links, mesh_shape, strict=True)]
        steps = bucket(steps, instrs, number, limits)
        steps = join_updates(steps, instrs, number, frozenset(dead), overlaps)
        steps = advance(steps, instrs)
        if any(overlaps):
            steps = hoist(steps, instrs, overlaps)
    numbers = {n: k for k, n in enumerate(dict.fromkeys(s.number for s in steps))}
    program = Program(tuple(instrs[n] for n in numbers),
                      tuple((numbers[s.number], s.ins, s.outs) for s in steps), n_slots, dead, precision)
    digest = hashlib.blake2b(msgpack.packb(program), digest_size=16).digest()
    types: dict[int, TensorType] = {}
    external: dict[int, None] = {}
    for s in steps:
        external.update(dict.fromkeys(i for i in s.ins if i >= 0 and i not in types))
        types.update(zip(s.outs, instrs[s.number].outs, strict=True))
    fed = tuple(s.outs[0] for s in steps if instrs[s.number].op == "feed")
    return Body(digest, program, tuple(s.origin for s in steps), tuple(external), types, set(), fed)
