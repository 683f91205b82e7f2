"""The session: mints ids, records instructions into the pending batch, flushes, fetches and frees.

It is the only sender: nothing else talks to a mesh. Recording never waits; a fetch does, and a flush only when
too many batches are in flight.
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, NamedTuple

import msgpack
import numpy as np

from meshtape.cluster.mesh import Mesh
from meshtape.runtime.errors import SessionClosed, WorkerError
from meshtape.runtime.protocol import Failure, Fetch, Instr, Program, Reply, Run
from meshtape.runtime.shards import REPLICATE, Placements, coordinate, is_owner, is_partial, piece
from meshtape.scheduler.buckets import bucket, merge_duplicates, unflatten
from meshtape.scheduler.cost import CPU, LINKS
from meshtape.scheduler.layout import Axes, Spec
from meshtape.scheduler.planner import Plan, Planner

PENDING_LIMIT = 1024        # instructions after which a batch is sent unasked
IN_FLIGHT = 8               # batches sent and not yet answered
BODIES = 512                # programs that workers keep

HIDDEN = [-1] * 64

Site = tuple[CodeType, int]


class Block(int):
    """A tensor's data on the workers, by global id. When the last reference goes, the id is freed.

    A session makes its own subclass, whose finalizer notes the id and does nothing else.
    """

    __slots__ = ()


def block_type(free: Callable[[int], None]) -> type[Block]:
    return type("Block", (Block,), {"__slots__": (), "__del__": lambda self: free(+self)})


class Body(NamedTuple):
    """A batch's body as sent: program and digest, and for each step the recorded instruction it came from."""

    digest: bytes
    program: Program
    origin: tuple[int, ...]
    external: tuple[int, ...]


class Draw(int):
    """The number of a random draw: an operand whose value nothing but a kernel looks at."""

    __slots__ = ()


class Recording(NamedTuple):
    """Instructions recorded once, to be appended again with other operands.

    `pick` takes the flat entries of the body from a list of instruction `numbers`, the slots of the operands at
    `uses`, of the scalars `constants`, and of the `made` outputs. `results` are operand positions, or -1 - k
    for output k, or None; outputs at `hidden` places are temporaries.
    """

    numbers: tuple[int, ...]
    uses: tuple[int, ...]
    constants: tuple[Any, ...]
    made: int
    pick: Callable[[list[Any]], tuple[int, ...]] | None
    count: int
    hidden: tuple[int, ...]
    results: tuple[int | None, ...]


class Sent(NamedTuple):
    """A batch under way: what is needed to read its replies."""

    body: Body | None
    ids: list[int]
    sites: list[Site]
    replies: list[Reply]


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
        self.planner = Planner(self.axes, links, CPU)
        self.specs = self.planner.specs
        self.plans = self.planner.plans
        self.weak = {**self.specs.weak, Draw: self.specs.weak[int]}
        self.coords = [coordinate(r, mesh.shape) for r in range(mesh.size)]
        self.closed = False
        self.grad_enabled = True
        self.site: Site | None = None       # set while the tape or an optimizer records on the user's behalf
        self.seed = 0
        self.draws = 0
        self.stats = Stats()
        self.replays: Any = None            # the tape's: backward walks it has noted
        self.freed: deque[int] = deque()
        self.Block = block_type(self.freed.append)
        self._next_id = 0
        self._bodies: OrderedDict[Any, Body] = OrderedDict()
        self._drop: list[bytes] = []
        self._batch = 0
        self._answered = 0
        self._sent: dict[int, Sent] = {}
        self._poisoned: dict[int, WorkerError] = {}
        self._errors: list[WorkerError] = []
        self.last: Body | None = None
        self._begin()

    def _begin(self) -> None:
        self.body: list[int] = []
        self.slots: dict[int, int] = {}         # slot of every id that the batch uses and the user can reach
        self.names: list[int] = []              # id of every slot, -1 for temporaries
        self.scalars: list[Any] = []
        self.sites: list[Site] = []
        self.feeds: list[tuple[np.ndarray[Any, Any], Placements]] = []
        self.temporary: list[int] = []

    # --- recording ----------------------------------------------------------------------------------

    def record(self, plan: Plan, inputs: Sequence[Any], site: Site) -> list[Block]:
        """Append a planned op. `inputs` are Blocks and Python scalars; returns the outputs' Blocks."""
        slots, names, kind = self.slots, self.names, self.Block
        entry = [plan.number]
        if plan.before is not None:
            inputs = self._bring(plan, inputs, site)
        for x in inputs:
            if type(x) is kind:
                slot = slots.get(x)
                entry.append(self._external(x) if slot is None else slot)
            elif type(x) is Slot:
                entry.append(+x)
            else:
                self.scalars.append(x)
                entry.append(-len(self.scalars))
        name = self._next_id
        slot = len(names)
        if plan.single is not None:
            slots[name] = slot
            names.append(name)
            entry.append(slot)
            self._next_id = name + 1
            blocks = [kind(name)]
        else:
            n = len(plan.outs)
            blocks = [kind(name + k) for k in range(n)]
            names += range(name, name + n)
            entry += range(slot, slot + n)
            slots.update((name + k, slot + k) for k in range(n))
            self._next_id = name + n
        self.body += entry
        sites = self.sites
        sites.append(site)
        if len(sites) >= PENDING_LIMIT:
            self.flush()
        return blocks

    def repeat(self, recording: Recording, operands: Sequence[Any], site: Site) -> list[Block | None]:
        """Append a recording again, with other operands; returns the Blocks of its results."""
        slots, names = self.slots, self.names
        values: list[Any] = [*recording.numbers]
        for i in recording.uses:
            x = operands[i]
            if type(x) is self.Block:
                slot = slots.get(x)
                values.append(self._external(x) if slot is None else slot)
            else:
                self.scalars.append(x)
                values.append(-len(self.scalars))
        for x in recording.constants:
            self.scalars.append(x)
            values.append(-len(self.scalars))
        first, made = len(names), recording.made
        values += range(first, first + made)
        names += HIDDEN[:made] if made <= len(HIDDEN) else [-1] * made
        name = self._next_id
        out: list[Block | None] = []
        for r in recording.results:
            if r is None or r >= 0:
                out.append(None if r is None else operands[r])
            else:
                slot = first - 1 - r
                known = names[slot]
                if known < 0:
                    names[slot] = known = name
                    slots[name] = slot
                    name += 1
                out.append(self.Block(known))
        self._next_id = name
        if recording.pick is not None:
            for k in recording.hidden:
                self.temporary.append(first + k)
            self.body += recording.pick(values)
            sites = self.sites
            for _ in range(recording.count):
                sites.append(site)
            if len(sites) >= PENDING_LIMIT:
                self.flush()
        return out

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
        made = self._new(self.planner.move(spec, placements), self._slot(block))
        return made, self.specs.get(spec.shape, spec.dtype, placements)

    def place(self, array: np.ndarray[Any, Any], placements: Placements) -> tuple[Block, Spec]:
        """Hand an array to the workers; the session owns `array` from now on (no copy is made)."""
        self.check()
        spec = self.specs.get(array.shape, array.dtype, placements)
        number = self.planner.number(Instr("feed", (), (), (spec.wire,)))
        self.feeds.append((array, placements))
        return self._new(number), spec

    def draw(self) -> Draw:
        """The number of the next random draw."""
        self.draws += 1
        return Draw(self.draws - 1)

    # --- sending ------------------------------------------------------------------------------------

    def flush(self, fetch: Sequence[Fetch] = ()) -> int:
        """Send the pending batch, without waiting for it; returns its number."""
        self.check()
        dead, frees = list(self.temporary), []
        while self.freed:
            name = self.freed.popleft()
            slot = self.slots.get(name)
            if slot is None:
                frees.append(name)
                self._poisoned.pop(name, None)
            else:
                dead.append(slot)
        if not self.body and not frees and not fetch:
            return self._batch
        body, fresh = self._body(tuple(sorted(dead))) if self.body else (None, False)
        if body is not None:
            self.last = body
        self._batch += 1
        ids = self.names
        feeds = self._cut_feeds()
        self._sent[self._batch] = Sent(body, ids, self.sites, [])
        self.stats.recorded += len(self.sites)
        self.stats.batches += 1
        self.stats.digest_hits += body is not None and not fresh
        self.stats.messages += self.mesh.size
        runs = [Run(self._batch, body.digest if body else b"", ids, self.scalars, feeds[rank], list(fetch), frees,
                    self._drop, body.program if body and fresh else None) for rank in range(self.mesh.size)]
        self._drop = []
        self._begin()
        self.mesh.send(runs)
        while self._batch - self._answered > IN_FLIGHT:
            self._collect()
        return self._batch

    def _body(self, dead: tuple[int, ...]) -> tuple[Body, bool]:
        """The body of the pending batch, and whether workers see it for the first time."""
        key = (tuple(self.body), dead)
        found = self._bodies.get(key)
        if found is not None:
            self._bodies.move_to_end(key)
            return found, False
        body = self._assemble(dead)
        self._bodies[key] = body
        if len(self._bodies) > BODIES:
            _, old = self._bodies.popitem(last=False)
            if all(b.digest != old.digest for b in self._bodies.values()):
                self._drop.append(old.digest)
        return body, True

    def _assemble(self, dead: tuple[int, ...]) -> Body:
        instrs = self.planner.instrs
        steps = unflatten(self.body, instrs)
        if self.mesh.size > 1:
            steps = merge_duplicates(steps, instrs, frozenset(self.temporary))
            steps = bucket(steps, instrs, self.planner.number)
        numbers = {n: k for k, n in enumerate(dict.fromkeys(s.number for s in steps))}
        program = Program(tuple(instrs[n] for n in numbers),
                          tuple((numbers[s.number], s.ins, s.outs) for s in steps), len(self.names), dead)
        digest = hashlib.blake2b(msgpack.packb(program), digest_size=16).digest()
        made = set[int]()
        external: dict[int, None] = {}
        for s in steps:
            external.update(dict.fromkeys(i for i in s.ins if i >= 0 and i not in made))
            made.update(s.outs)
        return Body(digest, program, tuple(s.origin for s in steps), tuple(external))

    def _cut_feeds(self) -> list[list[Any]]:
        """Each rank's pieces of the arrays fed in."""
        out: list[list[Any]] = [[] for _ in self.coords]
        for array, placements in self.feeds:
            split = any(p != REPLICATE for p in placements)
            for rank, coord in enumerate(self.coords):
                mine = array[piece(array.shape, placements, self.axes.shape, coord).slices] if split else array
                if any(is_partial(p) and c > 0 for p, c in zip(placements, coord, strict=True)):
                    mine = np.zeros_like(mine) if "sum" in placements else mine
                out[rank].append(mine)
        return out

    # --- waiting ------------------------------------------------------------------------------------

    def fetch(self, wanted: Sequence[tuple[Block, Spec]]) -> list[np.ndarray[Any, Any]]:
        """The values of tensors as NumPy arrays of their own. Waits; raises what went wrong on a worker."""
        self.check()
        settled = [self._settled(b, s) for b, s in wanted]
        batch = self.flush([Fetch(+b, s.wire) for b, s in settled])
        sent = self._sent[batch]
        while self._answered < batch:
            self._collect()
        self._raise_pending()
        for block, _ in settled:
            if block in self._poisoned:
                raise self._poisoned[block]
        return [self._assembled(k, s, sent.replies) for k, (_, s) in enumerate(settled)]

    def _settled(self, block: Block, spec: Spec) -> tuple[Block, Spec]:
        """With Partial placements reduced, so that slices only need laying side by side."""
        if any(is_partial(p) for p in spec.placements):
            whole = tuple(REPLICATE if is_partial(p) else p for p in spec.placements)
            return self.redistribute(block, spec, whole)
        return block, spec

    def _assembled(self, k: int, spec: Spec, replies: Sequence[Reply]) -> np.ndarray[Any, Any]:
        by_rank = {r.rank: r.values[k] for r in replies}
        owners = [r for r, c in enumerate(self.coords) if is_owner(spec.placements, c)]
        if len(owners) == 1:
            return np.array(by_rank[owners[0]])
        out = np.empty(spec.shape, spec.dtype)
        for rank in owners:
            out[piece(spec.shape, spec.placements, self.axes.shape, self.coords[rank]).slices] = by_rank[rank]
        return out

    def wait(self) -> None:
        """Flush, then wait until every batch is answered; raises what went wrong on a worker."""
        self.flush()
        while self._answered < self._batch:
            self._collect()
        self._raise_pending()

    def _collect(self) -> None:
        """Take in one reply."""
        reply = self.mesh.collect(None)
        if reply is None:
            return
        sent = self._sent[reply.batch]
        sent.replies.append(reply)
        if len(sent.replies) == self.mesh.size:
            self._answered = reply.batch
            del self._sent[reply.batch]
            self._settle(sent)

    def _settle(self, sent: Sent) -> None:
        """All ranks answered a batch: note its failures and everything that they spoil."""
        if sent.body is None:
            return
        failures = [f for r in sent.replies for f in r.failures]
        if not failures and not self._poisoned:
            return
        bad: dict[int, WorkerError] = {}
        for slot in sent.body.external:
            if sent.ids[slot] in self._poisoned:
                bad[slot] = self._poisoned[sent.ids[slot]]
        first = {}
        for f in sorted(failures, key=lambda f: (f.step, f.kind == "CommError", f.rank)):
            first.setdefault(f.step, f)
        made: dict[int, WorkerError] = {}
        for at, (_, ins, outs) in enumerate(sent.body.program.steps):
            error = next((bad[s] for s in ins if s in bad), None)
            if at in first and error is None:
                error = made[at] = self._explain(first[at], sent)
            if error is not None:
                bad.update(dict.fromkeys(outs, error))
        if made:
            self._errors.append(made[min(made)])
        dead = set(sent.body.program.dead)
        for slot, error in bad.items():
            if slot in dead:
                self._poisoned.pop(sent.ids[slot], None)
            else:
                self._poisoned[sent.ids[slot]] = error

    def _explain(self, failure: Failure, sent: Sent) -> WorkerError:
        assert sent.body is not None
        instr = sent.body.program.instrs[sent.body.program.steps[failure.step][0]]
        shapes = ", ".join("scalar" if t is None else f"{t.shape} {t.dtype} {self.axes_text(t.placements)}"
                           for t in instr.ins)
        where = site_text(sent.sites[sent.body.origin[failure.step]])
        return WorkerError(f"{instr.op}({shapes}) failed on rank {failure.rank}: {failure.kind}: {failure.message} "
                           f"({where})")

    def axes_text(self, placements: Placements) -> str:
        names = [p if is_partial(p) else "R" if p == REPLICATE else f"S{p}" for p in placements]
        return "[" + ",".join(map(str, names)) + "]"

    def _raise_pending(self) -> None:
        if self._errors:
            first = self._errors[0]
            self._errors.clear()
            raise first

    # --- ending -------------------------------------------------------------------------------------

    def check(self) -> None:
        if self.closed:
            raise SessionClosed("the mesh was shut down; call meshtape.init() again and make new tensors")

    def close(self) -> None:
        """Let the workers go. Idempotent; tensors of this session cannot be used any more."""
        if not self.closed:
            self.closed = True
            self.freed.clear()
            self.mesh.close()


class Slot(int):
    """An input that is already known by its slot in the pending batch."""


_inside: dict[CodeType, bool] = {}


def user_site() -> Site:
    """Code and instruction of the innermost caller outside meshtape; cheap enough to note for every op."""
    frame = sys._getframe(2)
    while True:
        code = frame.f_code
        inside = _inside.get(code)
        if inside is None:
            name = frame.f_globals.get("__name__", "")
            inside = _inside[code] = name == "meshtape" or name.startswith("meshtape.")
        outer = frame.f_back
        if not inside or outer is None:
            return code, frame.f_lasti
        frame = outer


def site_text(site: Site) -> str:
    """file:line of a noted call."""
    code, at = site
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= at < end and number is not None:
            line = number
    return f"{code.co_filename}:{line}"
