"""Programs replayed as CUDA graphs.

A program that runs for the third time is captured: it runs once more, with nothing done on the device but
its launches noted, and from then on a single call replays them. What a graph reads and writes stands at
addresses that stay:

* Blocks that stood at the same place in the two runs before (parameters and states, which are updated in
  place) are read and written where they are.
* Blocks that moved are copied, before each replay, to where they were in the capture.
* Fed arrays and Python numbers are loaded into the program's own memory (runtime.cuda.inputs).
* Everything else comes from a memory pool of the graph's own. Results that the program keeps there (gradients
  until zero_grad(), a loss) are good until its next replay; a block that still stands there then is moved out
  first. Other programs may write their results over such blocks, so blocks are known by their addresses.

A program is not captured when something in it cannot be: a collective that goes through the host, a kernel
that waits for the device or reads its memory, numbers that kernels take by value and that keep changing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from meshtape.runtime.cuda.standing import Spot, Standing, moved, picker, spot

# Copies of blocks that move are worth it up to so many bytes per replay.
MOVED_BYTES = 64 << 20
# A program whose blocks keep moving is captured at most so often.
CAPTURES = 4
# Runs of a body before it is captured, of those that the generated function does.
RUNS_BEFORE = 2


# What a rank would do with a program; all do the least of it.
STEP, CAPTURE, LAUNCH = range(3)


def refusal(steps: Sequence[Any], capturable: Sequence[bool]) -> str:
    """Why a program cannot be captured, as far as its steps tell; "" if nothing speaks against it.

    capturable[axis]: whether collectives along a mesh axis can be part of a graph.
    """
    if not any(step.call.kind not in ("feed",) for step in steps):
        return "nothing to run"
    for step in steps:
        if step.call.kind in ("collective", "start") and not all(capturable):
            return f"{step.call.name} goes through the host"
    return ""


class Captured(NamedTuple):
    """A graph with the arrays that it reads and writes; positions are those of the program's external slots.
    """

    graph: Any
    pool: Any
    spots: tuple[Spot, ...]
    standing: Standing                      # of arrays that are read where they are
    buffers: Mapping[int, Any]              # by position: where arrays that move are copied to
    numbers: tuple[str, ...]                # by value
    kept: tuple[Any, ...]                   # in the order of the program's kept slots
    own: frozenset[int]                     # slots of those that stand in the graph's memory
    foreign: tuple[tuple[int, Any], ...]    # (slot, replay in whose graph's memory it stands) of others
    traffic: tuple[tuple[int, int], ...]    # (calls, bytes sent) by every communicator in it


class Replay:
    """One program's way from running step by step to being replayed. `reason`: why it is not, or "".

    `owners` are the replays of all programs by the addresses of results in their graphs' memory.
    """

    def __init__(self, device: Any, program: Any, communicators: Sequence[Any],
                 owners: dict[int, Replay]) -> None:
        self.device = device
        self.owners = owners
        self.lent: list[int] = []           # ids of blocks that may stand in the graph's memory
        self.program = program
        self.reason = refusal(program.steps, [c.size == 1 or c.capturable for c in communicators])
        collective = any(step.call.kind in ("collective", "start") for step in program.steps)
        self.joined = [c for c in communicators if collective and c.size > 1 and not self.reason]
        self.replays = 0
        self.captured: Captured | None = None
        self._external, self._taken, self._kept = map(
            picker, (program.external, tuple(program.taken), program.kept))
        self._captures = self._changes = 0
        self._runs = 0
        self._moving: set[int] = set()
        self._spots: tuple[Spot, ...] | None = None
        self._numbers: tuple[str, ...] = ()

    def run(self, code: Callable[..., None], blocks: dict[int, Any], ids: Sequence[int],
            scalars: Sequence[Any], feeds: Sequence[Any]) -> None:
        """Do what `code(blocks, ids, scalars, feeds)` does, by the graph where there is one.

        Raises CommError if other ranks cannot be asked whether they do the same.
        """
        arrays = list(map(blocks.__getitem__, self._external(ids)))
        way = self._agreed(self._wish(blocks, ids, scalars, arrays))
        if way == CAPTURE:
            self.drop()
            self._capture(code, blocks, ids, scalars, feeds, arrays)
            ready = self.captured is not None and self._ready(blocks, ids, arrays)
            way = self._agreed(LAUNCH if ready else STEP)
            if way == STEP and ready:
                self.reason = "another rank could not capture it"
                self.drop()
        if way == LAUNCH:
            self._launch(blocks, ids)
        else:
            self._plainly(code, blocks, ids, scalars, feeds)

    def stand_aside(self) -> None:
        """Tell the other ranks that this one runs the program step by step this time."""
        self._agreed(STEP)

    def _agreed(self, wish: int) -> int:
        """The least of what the ranks wish, where they join in collectives that a graph would hold: these
        must be recorded, and replayed, by all or by none.
        """
        for comm in self.joined:
            wish = comm.agree(wish)
        return wish

    def _wish(self, blocks: dict[int, Any], ids: Sequence[int], scalars: Sequence[Any],
              arrays: Sequence[Any]) -> int:
        """What this rank would do with the program now. To launch a graph, everything is made ready."""
        if self.reason:
            return STEP
        numbers = tuple(repr(scalars[k]) for k in self.program.by_value)
        if self.captured is not None and self._fits(self.captured, arrays, numbers):
            if self._ready(blocks, ids, arrays):
                return LAUNCH
            self.drop()
            return STEP
        spots = tuple(map(spot, arrays))
        self._settle(spots, numbers, arrays)
        due = not self.reason and self._due(numbers)
        self._runs += 1
        self._spots, self._numbers = spots, numbers
        return CAPTURE if due else STEP

    def _ready(self, blocks: dict[int, Any], ids: Sequence[int], arrays: Sequence[Any]) -> bool:
        """Make way for a replay, and bring it what it reads; False without memory for that."""
        return self._move_out(blocks, ids) and self._bring(arrays)

    def _plainly(self, code: Callable[..., None], blocks: dict[int, Any], ids: Sequence[int],
                 scalars: Sequence[Any], feeds: Sequence[Any]) -> None:
        code(blocks, ids, scalars, feeds)
        note_lent(self.owners, blocks, [ids[slot] for slot in self.program.kept])

    def _move_out(self, blocks: dict[int, Any], ids: Sequence[int]) -> bool:
        """Give memory of their own to blocks in the graph's memory that outlive the next replay; False if
        there is none.
        """
        left = [name for name in self.lent if name in blocks]
        taken = set(self._taken(ids)) if left else set()
        staying = [name for name in left
                   if name not in taken and owner_of(self.owners, blocks[name]) is self]
        room = self._room([blocks[name] for name in staying])
        if room is None:
            return False
        for name, target in zip(staying, room, strict=True):
            target[...] = blocks[name]
            blocks[name] = target
        self.lent = []
        return True

    def _room(self, like: Sequence[Any]) -> list[Any] | None:
        """Arrays like these; None without memory for them, and then `reason` says so."""
        try:
            return [self.device.cp.empty_like(a) for a in like]
        except Exception as error:
            if not self.device.is_out_of_memory(error):
                raise
            self.reason = "there was no memory beside that of its graph"
            return None

    def _fits(self, made: Captured, arrays: Sequence[Any], numbers: tuple[str, ...]) -> bool:
        """Whether the graph does what is asked for."""
        if numbers != made.numbers:
            return False
        for k in made.standing.others(arrays):
            if k not in made.buffers:
                if spot(arrays[k]) != made.spots[k]:
                    return False
                made.standing.see(k, arrays[k])
        return True

    def _settle(self, spots: tuple[Spot, ...], numbers: tuple[str, ...], arrays: Sequence[Any]) -> None:
        """Note what moved since the run before, and give up on what keeps changing."""
        before, self._spots = self._spots, spots
        if self.captured is not None:
            before = self.captured.spots
            self.drop()
        if before is not None:
            self._moving.update(moved(before, spots))
        self._changes += numbers != self._numbers
        if self._changes > CAPTURES:
            self.reason = "kernels take numbers by value that keep changing"
        elif self._captures >= CAPTURES:
            self.reason = "the blocks it reads keep moving, or memory is short"
        elif sum(arrays[k].nbytes for k in self._moving) > MOVED_BYTES:
            self.reason = f"over {MOVED_BYTES >> 20} MiB of what it reads stand elsewhere in every run"

    def _due(self, numbers: tuple[str, ...]) -> bool:
        return self._runs + 1 >= RUNS_BEFORE and numbers == self._numbers

    def _bring(self, arrays: Sequence[Any]) -> bool:
        """Copy arrays to where the graph reads them; False if there is no memory for it."""
        made = self.captured
        assert made is not None
        given = {k: arrays[k] for k, place in made.buffers.items() if arrays[k].data.ptr != place.data.ptr}
        # A program that writes its results over each other's operands leaves them in each other's places.
        places = {made.buffers[k].data.ptr for k in given}
        crossed = [k for k, array in given.items() if array.data.ptr in places]
        room = self._room([given[k] for k in crossed])
        if room is None:
            return False
        for k, held in zip(crossed, room, strict=True):
            held[...] = given[k]
            given[k] = held
        for k, array in given.items():
            made.buffers[k][...] = array
        return True

    def _launch(self, blocks: dict[int, Any], ids: Sequence[int]) -> None:
        made = self.captured
        assert made is not None
        for comm in self.joined:
            comm.check()
        made.graph.launch(self.device.stream)
        for comm, traffic in zip(self.joined, made.traffic, strict=True):
            comm.launched(*traffic)
        deque(map(blocks.pop, self._taken(ids), repeat(None)), maxlen=0)
        blocks.update(zip(self._kept(ids), made.kept, strict=True))
        self.lent = [ids[slot] for slot in made.own]
        for slot, other in made.foreign:
            other.lent.append(ids[slot])
        self.replays += 1

    def _capture(self, code: Callable[..., None], blocks: dict[int, Any], ids: Sequence[int],
                 scalars: Sequence[Any], feeds: Sequence[Any], arrays: Sequence[Any]) -> None:
        """Capture a run on a copy of the block table; on failure `reason` says why, and nothing has changed.
        """
        self._captures += 1
        self.device.synchronize()
        self.device.pool.free_all_blocks()
        pool = self.device.new_graph_pool()
        try:
            self.captured = self._captured_in(pool, code, blocks, ids, scalars, feeds, arrays)
        finally:
            if self.captured is None:
                self.device.retire(pool)
            else:
                self.device.share()

    def _captured_in(self, pool: Any, code: Callable[..., None], blocks: dict[int, Any], ids: Sequence[int],
                     scalars: Sequence[Any], feeds: Sequence[Any], arrays: Sequence[Any]) -> Captured | None:
        """The graph of a run, with its memory from `pool`; None, and then `reason` says why."""
        external, table = self.program.external, dict(blocks)
        moving = sorted(self._moving)
        with self.device.cp.cuda.using_allocator(pool.malloc):
            found = self._room([arrays[k] for k in moving])
        if found is None:
            return None
        buffers = dict(zip(moving, found, strict=True))
        table.update((ids[external[k]], buffer) for k, buffer in buffers.items())
        before = [(comm.calls, comm.bytes_sent) for comm in self.joined]
        graph = self._record(code, table, ids, scalars, feeds, pool)
        traffic = tuple((comm.calls - calls, comm.bytes_sent - sent)
                        for comm, (calls, sent) in zip(self.joined, before, strict=True))
        for comm, (calls, sent) in zip(self.joined, before, strict=True):
            comm.calls, comm.bytes_sent = calls, sent       # nothing has been sent yet
        if graph is None:
            return None
        fixed = {a.data.ptr for k, a in enumerate(arrays) if k not in buffers}
        kept = {slot: table[ids[slot]] for slot in self.program.kept}
        own = frozenset(slot for slot, a in kept.items() if a.data.ptr not in fixed)
        found_owners = [(slot, owner_of(self.owners, a)) for slot, a in kept.items() if slot not in own]
        self.owners.update((a.data.ptr, self) for slot, a in kept.items() if slot in own)
        return Captured(graph, pool, tuple(spot(buffers.get(k, a)) for k, a in enumerate(arrays)),
                        Standing(len(arrays)), buffers, self._numbers, tuple(kept.values()), own,
                        tuple((slot, o) for slot, o in found_owners if o is not None), traffic)

    def _record(self, code: Callable[..., None], table: dict[int, Any], ids: Sequence[int],
                scalars: Sequence[Any], feeds: Sequence[Any], pool: Any) -> Any:
        """The graph of a run, or None, and then `reason` says why."""
        device, failed = self.device, ""
        device.capturing = True
        device.stream.begin_capture()
        try:
            with device.cp.cuda.using_allocator(pool.malloc):
                code(table, ids, scalars, feeds)
        except Exception as error:
            # Whatever a kernel raises: the program runs uncaptured then, where a real error shows again.
            failed = f"{type(error).__name__}: {error}"
        finally:
            device.capturing = False
            graph, problem = self._end()
        if failed or problem:
            self.reason = f"it cannot be captured ({failed or problem})"
            return None
        return graph

    def _end(self) -> tuple[Any, str]:
        """The graph, or None and why there is none: the device refused something that was asked of it."""
        try:
            return self.device.stream.end_capture(), ""
        except self.device.cp.cuda.runtime.CUDARuntimeError as error:
            return None, str(error)

    def drop(self) -> None:
        """Give the graph up, once the device is done with it."""
        if self.captured is not None:
            self.device.synchronize()
            for array in self.captured.kept:
                if self.owners.get(array.data.ptr) is self:
                    del self.owners[array.data.ptr]
            pool, self.captured = self.captured.pool, None
            self.device.retire(pool)


def owner_of(owners: Mapping[int, Replay], value: Any) -> Replay | None:
    """In whose graph's memory an array stands; None for what is no array."""
    data = getattr(value, "data", None)
    return None if data is None else owners.get(data.ptr)


def note_lent(owners: Mapping[int, Replay], blocks: Mapping[int, Any], names: Sequence[int]) -> None:
    """After a run that made these blocks: they may have been written over blocks in a graph's memory."""
    if owners:
        for name in names:
            owner = owner_of(owners, blocks[name])
            if owner is not None:
                owner.lent.append(name)


class GraphCounts:
    """The replays of one worker's programs, as far as they are worth telling."""

    def __init__(self) -> None:
        self._all: list[Replay] = []
        self._replays = 0                   # of programs that are gone
        self.owners: dict[int, Replay] = {}

    def add(self, device: Any, program: Any, communicators: Sequence[Any]) -> Replay:
        made = Replay(device, program, communicators, self.owners)
        self._all.append(made)
        return made

    def remove(self, made: Replay) -> None:
        """Its program will not be run again."""
        made.drop()
        self._all.remove(made)
        self._replays += made.replays

    def drop(self) -> None:
        """Give all graphs up, for their memory."""
        for made in self._all:
            made.drop()

    def report(self) -> tuple[Any, ...]:
        """(programs captured, replays done, reasons why programs are not captured)."""
        reasons = dict.fromkeys(made.reason for made in self._all if made.reason)
        return (sum(made.captured is not None for made in self._all),
                self._replays + sum(made.replays for made in self._all), tuple(reasons))
