"""Messages survive the wire, however the stream is cut."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshtape.cluster import wire
from meshtape.runtime.errors import MeshError
from meshtape.runtime.protocol import Failure, Fetch, Instr, Program, Reply, Run, TensorType

TYPE = TensorType((4, 6), "float32", (0, -1, "sum"))
PROGRAM = Program((Instr("sum", ((0, 1), False, None, 1.5, "x"), (TYPE, None), (TYPE,)),),
                  ((0, (0, -1), (1,)),), 2, (1,), "high")
RUN = Run(3, b"\x00digest", [1, 2**40], [0.5, True, 3, 2**70, 1 + 2j, math.inf], [], [Fetch(9, TYPE)], [7],
          [b"old"], PROGRAM)


def arrays():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    names = ["bool", "int8", "uint16", "int64", "float16", "float32", "float64", "complex64"]
    return [*(np.arange(12).reshape(3, 4).astype(name) for name in names), None, np.array(2.5),
            np.zeros((0, 3)), np.ones((2, 2), bfloat16), np.arange(12.0).reshape(3, 4).T, np.arange(10)[::-2],
            np.arange(3, dtype=">i4"), np.full((100, 100), 7.0)]


def same(got, sent):
    return got is sent is None or (got.dtype == sent.dtype.newbyteorder("=") and got.shape == sent.shape
                                   and got.flags.writeable and np.array_equal(got, sent))


def stream_of(*frames):
    return b"".join(b"".join(buffers) for buffers in frames)


def test_a_run_arrives_as_it_was_sent():
    message = wire.from_bytes(stream_of(*wire.run_frames([RUN])))
    assert wire.run_of(message) == RUN


def test_a_reply_arrives_as_it_was_sent():
    sent = Reply(1, 2, [Failure(2, 5, 1, "ShapeError", "no")], arrays())
    got = wire.reply_of(wire.from_bytes(stream_of(wire.reply_frame(sent))))
    assert got[:3] == sent[:3]
    assert all(same(g, s) for g, s in zip(got.values, sent.values, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=50), st.integers(1, 300))
def test_messages_do_not_depend_on_how_the_stream_is_cut(cuts, capacity):
    reply = Reply(0, 0, [], [np.arange(40.0), None, np.arange(3)])
    stream = (b"\0" + stream_of(wire.run_frames([RUN])[0], wire.reply_frame(reply)) + b"\0\0") * 3
    assembler, at, turn = wire.Assembler(capacity), 0, 0
    while at < len(stream):
        space = assembler.space()[0]
        n = min(cuts[turn % len(cuts)], len(space), len(stream) - at)
        space[:n] = stream[at:at + n]
        assembler.took(n)
        at, turn = at + n, turn + 1
    kinds = [message.kind for message in assembler.messages]
    assert kinds == [wire.RUN, wire.REPLY] * 3
    for message in list(assembler.messages)[1::2]:
        assert all(same(g, s) for g, s in zip(wire.reply_of(message).values, reply.values, strict=True))


def test_the_common_part_of_a_batch_is_packed_once():
    first, second = wire.run_frames([RUN, RUN])
    assert first is second
    feeds = np.arange(4.0)
    first, second = wire.run_frames([RUN._replace(feeds=[feeds]), RUN._replace(feeds=[feeds + 1])])
    assert np.shares_memory(np.asarray(first[1]), feeds), "arrays are not copied"
    assert np.array_equal(wire.run_of(wire.from_bytes(stream_of(second))).feeds[0], feeds + 1)


def test_noise_and_lies_are_refused():
    with pytest.raises(MeshError, match="no message of meshtape"):
        wire.from_bytes(b"GET / HTTP/1.1\r\nHost: here\r\n")
    with pytest.raises(MeshError, match="announces 9 bytes"):
        wire.arrays_for(wire.pack([("float32", (2,))]), 9, None)
    with pytest.raises(MeshError, match="shared memory"):
        wire.arrays_for(wire.pack([("float32", (2,), 0, None)]), 0, None)
    with pytest.raises(MeshError, match="no message of meshtape"):
        wire.from_bytes(wire.PREFIX.pack(wire.RUN, 2**31, 0, 0))


def test_a_value_that_cannot_travel_is_named():
    with pytest.raises(TypeError, match=r"object.* cannot travel"):
        wire.run_frames([RUN._replace(scalars=[object()])])
