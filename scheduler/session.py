"""The session: mints ids, records instructions into the pending batch, flushes, fetches and frees.

It is the only sender: nothing else talks to a mesh. Recording never waits; a fetch does, and a flush only
when too many batches are in flight.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from operator import itemgetter
from threading import current_thread, get_ident
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np

from meshtape.cluster.mesh import Mesh
from meshtape.runtime.errors import MeshError, SessionClosed
from meshtape.runtime.protocol import Fetch, Instr, Run
from meshtape.runtime.shards import REPLICATE, Placements, is_partial, piece
from meshtape.scheduler.body import Body, assemble
from meshtape.scheduler.cost import CPU, GPU, LINKS
from meshtape.scheduler.inflight import Inflight, Sent
from meshtape.scheduler.interrupt import Whole
from meshtape.scheduler.layout import Axes, Spec
from meshtape.scheduler.planner import Plan, Planner
from meshtape.scheduler.sites import Site, user_site
from meshtape.scheduler.trace import Tracer

PENDING_LIMIT = 1024        # instructions after which a batch is sent unasked
PENDING_LIMIT_GPU = 1 << 14  # the same for GPUs, which replay a whole step as one graph
IN_FLIGHT = 8               # batches sent and not yet answered
ANSWER_EVERY = 4            # batches of which one is answered though nothing is fetched: a driver that wakes
                            # takes the processor from a worker
BODIES = 512                # programs that workers keep
SMALL = 1 << 16             # bytes up to which a Partial tensor is fetched as addends and combined here


class Block(int):
    """A tensor's data on the workers, by global id. When the last reference goes, the id is freed.

    A session makes its own subclass, whose finalizer notes the id and does nothing else.
    """

    __slots__ = ()


def block_type(free: Callable[[int], None]) -> type[Block]:
    return type("Block", (Block,), {"__slots__": (), "__del__": lambda self: free(+self)})


class Draw(int):
    """The number of a random draw: an operand whose value nothing but a kernel looks at."""

    __slots__ = ()


class Recording(NamedTuple):
    """Instructions recorded once, to be appended again with other operands.

    `pick` takes the flat entries of the body from a list of instruction `numbers`, the slots of the blocks
    among the operands that are at `uses`, the scalars among them at `given`, the scalars `constants`, and the
    `made` outputs. Of the outputs, those at `shown` are results and the others, at `hidden`, temporaries.
    """

    numbers: tuple[int, ...]
    uses: tuple[int, ...]
    given: tuple[int, ...]
    constants: tuple[Any, ...]
    made: int
    pick: Callable[[list[Any]], tuple[int, ...]] | None
    steps: int
    shown: tuple[int, ...]
    hidden: tuple[int, ...]


class Stats:
    """Counts since the session began."""

    def __init__(self) -> None:
        self.recorded = 0
        self.batches = 0
        self.digest_hits = 0
        self.messages = 0


class Session:
    """One driver's connection to one mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.axes = Axes(tuple(mesh.names), tuple(mesh.shape))
        links = [LINKS[k] for k in mesh.links]
        gpus = all(device != "cpu" for device in mesh.devices)
        self.limit = PENDING_LIMIT_GPU if gpus else PENDING_LIMIT
        self.planner = Planner(self.axes, links, GPU if gpus else CPU)
        self.specs = self.planner.specs
        self.plans = self.planner.plans
        self.weak = {**self.specs.weak, Draw: self.specs.weak[int]}
        self.closed = False
        self.thread = get_ident()           # the one thread that may use this session
        self.grad_enabled = True
        self.autocast: Any = None           # the tape's: the region of autocast that ops are recorded in,
        self.regions: dict[Any, Any] = {}   # the regions that there were, by dtype,
        self.nested = 0                     # how many of them are entered now,
        self.casts: dict[Any, Any] = {}     # and the casts that these share
        self.precision = "highest"          # of products of float32: see runtime.protocol.Program
        self.site: Site | None = None       # set while the tape or an optimizer records on the user's behalf
        self.seed = 0
        self.draws = 0
        self.stats = Stats()
        self.tracer: Tracer | None = None   # set while a profile is taken
        self.replays: dict[Any, Any] = {}   # the tape's: backward walks it has noted
        self.freed: deque[int] = deque()
        self.Block = block_type(self.freed.append)
        self._next_id = 0
        self._bodies: OrderedDict[Any, Body] = OrderedDict()
        self._feed_numbers: dict[Spec, int] = {}
        self._cuts: dict[Spec, list[Callable[[Any], Any] | None]] = {}      # what cuts each rank's piece
        self._known: set[bytes] = set()         # digests whose programs the workers have
        self._drop: list[bytes] = []
        self._batch = 0
        self._asked = 0                     # the last batch that will be answered even if all goes well
        self.inflight = Inflight(mesh)
        self.last: Sent | None = None       # the last batch with a body, for explain()
        self._begin()

    def _begin(self) -> None:
        self.body: list[int] = []
        self.slots: dict[int, int] = {}         # slot of every id that the batch uses and the user can reach
        self.names: list[int] = []              # id of every slot, -1 for temporaries
        self.scalars: list[Any] = []
        self.sites: list[Site] = []
        self.feeds: dict[int, tuple[np.ndarray[Any, Any], Spec]] = {}           # by slot
        self.temporary: list[int] = []

    # --- recording ----------------------------------------------------------------------------------

    def record(self, plan: Plan, inputs: Sequence[Any], site: Site) -> list[Block]:
        """Append a planned op. `inputs` are Blocks and Python scalars; returns the outputs' Blocks."""
        if get_ident() != self.thread:
            raise other_thread()
        slots, names, kind = self.slots, self.names, self.Block
        if plan.plain:
            entry = [plan.number]
            for x in inputs:
                slot = slots.get(x)
                if slot is None:
                    slot = slots[+x] = len(names)
                    names.append(+x)
                entry.append(slot)
        else:
            entry = self._entry(plan, inputs, site)
        name = self._next_id
        slot = len(names)
        if plan.single is not None:
            slots[name] = slot
            names.append(name)
            entry.append(slot)
            self._next_id = name + 1
            blocks = [kind(name)]
        else:
            stop = self._next_id = name + len(plan.outs)
            blocks = list(map(kind, range(name, stop)))
            names += range(name, stop)
            entry += range(slot, len(names))
            slots.update(zip(range(name, stop), range(slot, len(names)), strict=True))
        self.body += entry
        sites = self.sites
        sites.append(site)
        if len(sites) >= self.limit:
            self.flush()
        return blocks

    def _entry(self, plan: Plan, inputs: Sequence[Any], site: Site) -> list[int]:
        """The number and the inputs of an op with scalars among them, or with moves and casts before it."""
        slots, kind = self.slots, self.Block
        if plan.before is not None:
            inputs = self._bring(plan, inputs, site)
        entry = [plan.number]
        for x in inputs:
            if type(x) is kind:
                slot = slots.get(x)
                entry.append(self._external(x) if slot is None else slot)
            elif type(x) is Slot:
                entry.append(+x)
            else:
                self.scalars.append(x)
                entry.append(-len(self.scalars))
        return entry

    def repeat(self, recording: Recording, operands: Sequence[Any], site: Site) -> list[Block]:
        """Append a recording again, with other operands; returns the Blocks of its results."""
        if get_ident() != self.thread:
            raise other_thread()
        slots, names = self.slots, self.names
        values = list(recording.numbers)
        for i in recording.uses:
            x = operands[i]
            slot = slots.get(x)
            if slot is None:
                slot = slots[+x] = len(names)
                names.append(+x)
            values.append(slot)
        if recording.given or recording.constants:
            before = -1 - len(self.scalars)
            self.scalars += [operands[i] for i in recording.given]
            self.scalars += recording.constants
            values += range(before, -1 - len(self.scalars), -1)
        first, name, made = len(names), self._next_id, recording.made
        values += range(first, first + made)
        names += [-1] * made
        blocks = list(map(self.Block, range(name, name + len(recording.shown))))
        for k in recording.shown:
            slots[name] = first + k
            names[first + k] = name
            name += 1
        self._next_id = name
        self.temporary += map(first.__add__, recording.hidden)
        if recording.pick is not None:
            self.body += recording.pick(values)
            sites = self.sites
            sites += [site] * recording.steps
            if len(sites) >= self.limit:
                self.flush()
        return blocks

    def _external(self, block: Block) -> int:
        """The slot of a block that this batch has not used before."""
        slot = self.slots[+block] = len(self.names)
        self.names.append(+block)
        return slot

    def _slot(self, block: Block) -> int:
        slot = self.slots.get(block)
        return self._external(block) if slot is None else slot

    def _bring(self, plan: Plan, inputs: Sequence[Any], site: Site) -> list[Any]:
        """Record the moves and casts that a plan asks for; their results live inside the batch only."""
        assert plan.before is not None
        out = list(inputs)
        for i, numbers in enumerate(plan.before):
            if not numbers:
                continue
            slot = self._slot(inputs[i])
            for number in numbers:
                slot = self._emit(number, slot, name=-1, site=site)
                self.temporary.append(slot)
            out[i] = Slot(slot)
        return out

    def _emit(self, number: int, *ins: int, name: int, site: Site | None = None) -> int:
        """Append one instruction with one output, called `name`; returns the output's slot."""
        made = len(self.names)
        self.names.append(name)
        self.body += (number, *ins, made)
        self.sites.append(site or self.site or user_site())
        return made

    def _new(self, number: int, *ins: int) -> Block:
        name = self._next_id
        self._next_id += 1
        self.slots[name] = self._emit(number, *ins, name=name)
        return self.Block(name)

    def redistribute(self, block: Block, spec: Spec, placements: Placements) -> tuple[Block, Spec]:
        """The same tensor under other placements."""
        if spec.placements == placements:
            return block, spec
        self.check()
        made = self._new(self.planner.move(spec, placements), self._slot(block))
        return made, self.specs.get(spec.shape, spec.dtype, placements)

    def place(self, array: np.ndarray[Any, Any], placements: Placements, *,
              owned: bool = True) -> tuple[Block, Spec]:
        """Hand an array to the workers: a copy of it unless the session owns it from now on."""
        self.check()
        if not owned:
            room = self.mesh.room(array.shape, array.dtype)
            if room is None:
                array = array.copy()
            else:
                room[...] = array
                array = room
        spec = self.specs.get(array.shape, array.dtype, placements)
        number = self._feed_numbers.get(spec)
        if number is None:
            number = self._feed_numbers[spec] = self.planner.number(Instr("feed", (), (), (spec.wire,)))
        self.feeds[len(self.names)] = (array, spec)
        return self._new(number), spec

    def draw(self) -> Draw:
        """The number of the next random draw."""
        self.draws += 1
        return Draw(self.draws - 1)

    # --- sending ------------------------------------------------------------------------------------

    def flush(self, fetch: Sequence[Fetch] = (), *, ask: bool = False) -> int:
        """Send the pending batch, without waiting for it; returns its number.

        With `ask` the workers will answer up to here, if need be by an empty batch.
        """
        self.check()
        start = perf_counter_ns() if self.tracer is not None else 0
        dead, frees = list(self.temporary), []
        while self.freed:
            name = self.freed.popleft()
            slot = self.slots.get(name)
            if slot is None:
                frees.append(name)
            else:
                dead.append(slot)
        if not self.body and not frees and not fetch and not (ask and self._asked < self._batch):
            return self._batch
        body = self._body(tuple(sorted(dead))) if self.body else None
        wanted = list(fetch)
        if body is not None and body.asked:
            unasked = {self.names[s]: s for s in sorted(body.asked) if s not in dead}
            wanted += [Fetch(name, body.types[s]) for name, s in unasked.items()]
            self.inflight.unread.update((name, (body, s)) for name, s in unasked.items())
        batch = self._batch + 1
        answer = ask or bool(wanted) or batch % ANSWER_EVERY == 0 or self.tracer is not None
        digest, fresh = (b"", False) if body is None else (body.digest, body.digest not in self._known)
        feeds = self._cut_feeds(() if body is None else body.feeds)
        runs = [Run(batch, digest, self.names, self.scalars, feeds[rank], wanted, frees, self._drop,
                    body.program if body and fresh else None, self.tracer is not None, answer)
                for rank in range(self.mesh.size)]
        ops = len(self.sites)
        with Whole():       # what is noted as sent is sent, to all
            self._count(body is not None and not fresh)
            sent = Sent(body, self.names, self.sites, wanted, frees, [])
            self._batch, self._asked, self._drop = batch, batch if answer else self._asked, []
            self.inflight.add(batch, sent)
            if body is not None:
                self.last = sent
                self._known.add(digest)
            self._begin()
            self.mesh.send(runs)
        if self.tracer is not None:
            fed = sum(a.nbytes for rank in feeds for a in rank)
            self.tracer.flushed(batch, start, ops, not fresh, fed)
        while self._batch - self.inflight.answered > IN_FLIGHT:
            self.inflight.collect()
        return self._batch

    def _count(self, hit: bool) -> None:
        self.stats.recorded += len(self.sites)
        self.stats.batches += 1
        self.stats.digest_hits += hit
        self.stats.messages += self.mesh.size

    def _body(self, dead: tuple[int, ...]) -> Body:
        """The body of the pending batch."""
        key = (tuple(self.body), dead, self.precision)
        found = self._bodies.get(key)
        if found is not None:
            if self.last is None or found is not self.last.body:        # else it is at the end
                self._bodies.move_to_end(key)
            return found
        body = assemble(
            self.body,
            self.planner.instrs,
            len(self.names),
            dead,
            self.temporary,
            self.planner.number,
            self.planner.links,
            self.axes.shape,
            self.precision,
        )
        self._bodies[key] = body
        if len(self._bodies) > BODIES:
            _, old = self._bodies.popitem(last=False)
            if old.digest in self._known and all(b.digest != old.digest for b in self._bodies.values()):
                self._known.discard(old.digest)
                self._drop.append(old.digest)
        return body

    def _cut_feeds(self, slots: Sequence[int]) -> list[list[Any]]:
        """Each rank's pieces of the arrays fed in to `slots`."""
        out: list[list[Any]] = [[] for _ in self.inflight.coords]
        for array, spec in (self.feeds[slot] for slot in slots):
            cuts = self._cuts.get(spec)
            if cuts is None:
                cuts = self._cuts[spec] = [self._cut(spec, coord) for coord in self.inflight.coords]
            for pieces, cut in zip(out, cuts, strict=True):
                pieces.append(array if cut is None else cut(array))
        return out

    def _cut(self, spec: Spec, coord: Sequence[int]) -> Callable[[Any], Any] | None:
        """What takes the piece of the worker at `coord` from an array; None if that is all of it."""
        if all(p == REPLICATE for p in spec.placements):
            return None
        mine = itemgetter(piece(spec.shape, spec.placements, self.axes.shape, coord).slices)
        if any(p == "sum" and c > 0 for p, c in zip(spec.placements, coord, strict=True)):
            return lambda array: np.zeros_like(mine(array))
        return mine

    # --- waiting ------------------------------------------------------------------------------------

    def fetch(self, wanted: Sequence[tuple[Block, Spec]]) -> list[np.ndarray[Any, Any]]:
        """The values of tensors as NumPy arrays of their own. Waits; raises what went wrong on a worker.

        A tensor that an earlier run of the same batch was asked for has come with the batch's reply, and
        costs no message.
        """
        self.check()
        inflight = self.inflight
        settled = [self._settled(b, s) for b, s in wanted]
        predicted = [inflight.expected(b) for b, _ in settled]
        if any(p is None for p in predicted):
            self._remember(settled)
            batch = self.flush([Fetch(+b, s.wire) for b, s in settled])
        else:
            batch = max((p for p in predicted if p is not None), default=0)
        inflight.wait_for(batch)
        for block, _ in settled:
            if block in inflight.poisoned:
                raise inflight.poisoned[block]
        found = {+b: inflight.take(b) for b, _ in dict(settled).items()}
        return [found[+b] for b, _ in settled]

    def _remember(self, settled: Sequence[tuple[Block, Spec]]) -> None:
        """What was made by the batch before and is fetched now will come with that batch's reply next time.
        """
        last = self.last
        if last is None or last.body is None:
            return
        for block, _ in settled:
            slot = last.ids.index(block) if block in last.ids else -1
            if slot in last.body.types and block not in self.slots:
                last.body.asked.add(slot)

    def _settled(self, block: Block, spec: Spec) -> tuple[Block, Spec]:
        """A large Partial tensor is reduced by the workers; a small one is combined here from its addends."""
        ways = {p for p in spec.placements if is_partial(p)}
        if ways and (spec.nbytes > SMALL or len(ways) > 1):
            whole = tuple(REPLICATE if is_partial(p) else p for p in spec.placements)
            return self.redistribute(block, spec, whole)
        return block, spec

    def wait(self) -> None:
        """Flush, then wait until every batch is answered; raises what went wrong on a worker."""
        self.inflight.wait_for(self.flush(ask=True))

    def trace(self, tracer: Tracer | None) -> None:
        """Note what driver and workers do in `tracer` from now on (None: no more)."""
        self.tracer = self.inflight.tracer = tracer

    # --- ending -------------------------------------------------------------------------------------

    def check(self) -> None:
        if self.closed:
            raise SessionClosed("the mesh was shut down; call meshtape.init() again and make new tensors")
        if get_ident() != self.thread:
            raise other_thread()

    def close(self) -> None:
        """Let the workers go. Idempotent; tensors of this session cannot be used any more."""
        if not self.closed:
            self.closed = True
            self.freed.clear()
            self.mesh.close()


def other_thread() -> MeshError:
    return MeshError(f"tensors are used by one thread, the one that called init() or made the first tensor; "
                     f"this is {current_thread().name!r}: give other threads NumPy arrays")


class Slot(int):
    """An input that is already known by its slot in the pending batch."""
