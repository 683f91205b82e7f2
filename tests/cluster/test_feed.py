"""Arrays that reach workers through shared memory."""

import gc
import socket
import threading

import numpy as np
import pytest

from meshtape.cluster import wire
from meshtape.cluster.feed import LARGEST, SIZE, SMALLEST, FeedMemory, FeedView
from meshtape.runtime.errors import CommError
from meshtape.runtime.protocol import Run

F32 = np.dtype(np.float32)


@pytest.fixture
def memory():
    made = FeedMemory()
    yield made
    made.close()


def view_of(memory):
    ours, theirs = socket.socketpair()
    memory.send(ours)
    view = FeedView(theirs)
    ours.close()
    theirs.close()
    return view


def test_a_reader_sees_what_was_written_and_cannot_write(memory):
    view, array = view_of(memory), memory.room((64, 50), F32)
    array[...] = np.arange(3200).reshape(64, 50)
    for piece in (array, array[10:20], array[:, 7:31], array.T):
        seen = view.array(memory.locate(piece))
        assert np.array_equal(seen, piece) and seen.strides == piece.strides
        with pytest.raises(ValueError, match="read-only"):
            seen[0] = 1


def test_other_arrays_are_elsewhere(memory):
    assert memory.locate(np.ones(5000)) is None and memory.locate(np.ones(5000)[3:]) is None


def test_memory_is_taken_again_when_the_last_array_over_it_goes(memory):
    first = memory.room((2000,), F32)
    where = memory.locate(first)
    part = first[100:200]
    del first
    gc.collect()
    second = memory.room((2000,), F32)
    assert memory.locate(second) != where, "a view keeps the memory"
    del part
    assert memory.locate(memory.room((2000,), F32)) == where


def test_regions_do_not_overlap(memory):
    rng, live = np.random.default_rng(0), []
    for number in range(400):
        array = memory.room((int(rng.integers(2000, 90000)),), F32)
        array[...] = number
        live.append((number, array))
        while len(live) > rng.integers(1, 20):
            del live[int(rng.integers(len(live)))]
        assert all((a == n).all() for n, a in live)
    live.clear()
    del array
    assert memory.locate(memory.room((SMALLEST,), F32))[2] == 0, "all is free again"


def test_what_does_not_fit_has_no_room(memory):
    assert memory.room((SMALLEST // 4 - 1,), F32) is None
    assert memory.room((LARGEST // 4 + 1,), F32) is None
    held = [memory.room((LARGEST // 4,), F32) for _ in range(SIZE // LARGEST)]
    assert memory.room((SMALLEST,), F32) is None and all(h is not None for h in held)


def test_room_may_be_asked_for_from_any_thread(memory):
    wrong = []

    def work(mark):
        for k in range(300):
            array = memory.room((1024 + k,), F32)
            array[...] = mark
            if not (array == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_driver_that_sends_no_memory_is_told(memory):
    ours, theirs = socket.socketpair()
    ours.sendall(b"f")
    with pytest.raises(CommError, match="sent no memory"):
        FeedView(theirs)


def test_a_message_says_only_where_an_array_lies(memory):
    room = memory.room((64, 128), F32)
    room[...] = 1
    run = Run(1, b"", [], [], [room[:32]], [], [], [], None)
    near, far = wire.run_frames([run, run], [memory, None])
    assert sum(map(len, near)) < 200 and sum(memoryview(b).nbytes for b in far) > room[:32].nbytes
    assembler = wire.Assembler(view=view_of(memory))
    data = b"".join(near)
    assembler.space()[0][:len(data)] = data
    assembler.took(len(data))
    assert np.array_equal(wire.run_of(assembler.messages[0]).feeds[0], room[:32])
