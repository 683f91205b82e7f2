"""Reductions of a batch: merged, grouped, and never after their first reader."""

from __future__ import annotations

from meshtape.runtime.protocol import Instr, TensorType
from meshtape.scheduler.body import assemble
from meshtape.scheduler.buckets import Recorded, advance, bucket, hoist, merge_duplicates, unflatten
from meshtape.scheduler.cost import LINKS, bucket_bytes

P, R = ("sum",), (-1,)


def tensor(n: int, placements: tuple[int | str, ...]) -> TensorType:
    return TensorType((n,), "float32", placements)


def reduce(n: int) -> Instr:
    return Instr("redistribute", ((P, R),), (tensor(n, P),), (tensor(n, R),))


MAKE, USE = Instr("make", (), (), (tensor(4, P),)), Instr("use", (), (tensor(4, R),), (tensor(4, R),))
UPDATE = Instr("update", (), (tensor(4, R), tensor(4, R)), (tensor(4, R), tensor(4, R)))


class Numbers:
    def __init__(self, *instrs: Instr) -> None:
        self.instrs = list(instrs)

    def __call__(self, instr: Instr) -> int:
        if instr not in self.instrs:
            self.instrs.append(instr)
        return self.instrs.index(instr)


def names(steps: list[Recorded], numbers: Numbers) -> list[str]:
    return [numbers.instrs[s.number].op for s in steps]


def test_flat_recording_is_cut_by_arity() -> None:
    steps = unflatten([0, 0, 1, 0, 1, 2, 1, 0, 2, 3], [MAKE, USE, UPDATE])
    assert [(s.number, s.ins, s.outs, s.origin) for s in steps] == [
        (0, (), (0,), 0), (1, (0,), (1,), 1), (2, (1, 0), (2, 3), 2)]


def test_reductions_wait_for_their_first_reader_and_go_together() -> None:
    numbers = Numbers(MAKE, reduce(4), UPDATE)
    steps = [Recorded(0, (), (0,), 0), Recorded(1, (0,), (1,), 1), Recorded(0, (), (2,), 2),
             Recorded(1, (2,), (3,), 3), Recorded(2, (1, 3), (4, 5), 4)]
    found = bucket(steps, numbers.instrs, numbers, [1 << 20])
    assert names(found, numbers) == ["make", "make", "all_reduce_bucket", "update"]
    assert found[2].ins == (0, 2) and found[2].outs == (1, 3)


def test_a_reader_in_between_closes_the_bucket() -> None:
    numbers = Numbers(MAKE, reduce(4), USE)
    steps = [Recorded(0, (), (0,), 0), Recorded(1, (0,), (1,), 1), Recorded(2, (1,), (2,), 2),
             Recorded(0, (), (3,), 3), Recorded(1, (3,), (4,), 4)]
    assert names(bucket(steps, numbers.instrs, numbers, [1 << 20]), numbers) == [
        "make", "redistribute", "use", "make", "redistribute"]


def test_a_full_bucket_is_sent() -> None:
    numbers = Numbers(MAKE, reduce(4))
    steps = [
        s
        for k in range(4)
        for s in (Recorded(0, (), (2 * k,), 2 * k), Recorded(1, (2 * k,), (2 * k + 1,), 0))
    ]
    found = bucket(steps, numbers.instrs, numbers, [32])
    assert names(found, numbers).count("all_reduce_bucket") == 2


def test_a_value_is_reduced_once_for_all_its_readers() -> None:
    numbers = Numbers(MAKE, reduce(4), USE)
    steps = [Recorded(0, (), (0,), 0), Recorded(1, (0,), (1,), 1), Recorded(2, (1,), (2,), 2),
             Recorded(1, (0,), (3,), 3), Recorded(2, (3,), (4,), 4)]
    found = merge_duplicates(steps, numbers.instrs, frozenset({1, 3}))
    assert names(found, numbers) == ["make", "redistribute", "use", "use"] and found[-1].ins == (1,)


def test_a_parameter_is_gathered_for_each_reader() -> None:
    """Kept whole between forward and backward it would cost the memory that sharding it saved."""
    gather = Instr("redistribute", (((0,), R),), (tensor(4, (0,)),), (tensor(4, R),))
    numbers = Numbers(gather, USE)
    steps = [Recorded(0, (0,), (1,), 0), Recorded(1, (1,), (2,), 1), Recorded(0, (0,), (3,), 2),
             Recorded(1, (3,), (4,), 3)]
    assert len(merge_duplicates(steps, numbers.instrs, frozenset({1, 3}))) == 4


def test_equal_bodies_have_equal_digests() -> None:
    numbers = Numbers(MAKE, reduce(4), USE)
    bodies = [assemble([0, 0, 1, 0, 1, 2, 1, 2], numbers.instrs, 3, dead, (1,), numbers, [LINKS["shm"]], (2,))
              for dead in ((0, 1), (0, 1), (0, 1, 2))]
    assert bodies[0].digest == bodies[1].digest != bodies[2].digest
    assert bodies[0].external == () and set(bodies[0].types) == {0, 1, 2}


def test_a_bucket_that_runs_beside_kernels_begins_when_its_last_gradient_is_made() -> None:
    numbers = Numbers(MAKE, reduce(4), UPDATE, USE)
    steps = [Recorded(0, (), (0,), 0), Recorded(0, (), (2,), 1), Recorded(3, (9,), (10,), 2),
             Recorded(1, (0,), (1,), 3), Recorded(1, (2,), (3,), 4), Recorded(2, (1, 3), (4, 5), 5)]
    found = bucket(steps, numbers.instrs, numbers, [1 << 20])
    assert names(found, numbers) == ["make", "make", "use", "all_reduce_bucket", "update"]
    assert hoist(found, numbers.instrs, [False]) == found
    early = hoist(found, numbers.instrs, [True])
    assert names(early, numbers) == ["make", "make", "all_reduce_bucket", "use", "update"]


def test_buckets_are_large_where_latency_is() -> None:
    """And as large as can be where nothing is gained by sending early."""
    tcp = bucket_bytes(LINKS["tcp"], 2)
    assert round(3 * LINKS["tcp"].latency / (tcp / LINKS["tcp"].bandwidth), 6) == 0.1
    assert bucket_bytes(LINKS["tcp"], 8) > tcp and bucket_bytes(LINKS["shm"], 2) > 4 * tcp


def test_a_small_reduction_of_what_is_fed_goes_to_the_front() -> None:
    feed = Instr("feed", (), (), (tensor(4, (0,)),))
    count = Instr("target_count", (), (tensor(4, (0,)),), (TensorType((), "float32", P),))
    total = Instr("redistribute", ((P, R),), (TensorType((), "float32", P),), (TensorType((), "float32", R),))
    numbers = Numbers(MAKE, USE, feed, count, total)
    steps = [Recorded(0, (), (0,), 0), Recorded(1, (0,), (1,), 1), Recorded(2, (), (2,), 2),
             Recorded(3, (2,), (3,), 3), Recorded(4, (3,), (4,), 4), Recorded(1, (1,), (5,), 5)]
    assert names(advance(steps, numbers.instrs), numbers) == [
        "feed", "target_count", "redistribute", "make", "use", "use"]
    far = [Recorded(0, (), (0,), 0), *[Recorded(1, (k,), (k + 1,), k + 1) for k in range(5)],
           Recorded(3, (5,), (6,), 6), Recorded(4, (6,), (7,), 7)]
    assert advance(far, numbers.instrs) == far, "too much would have to come along"
