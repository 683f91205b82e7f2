"""The control channel lets only its own driver in and never mixes messages."""

import socket
import threading

import numpy as np
import pytest

from meshtape.cluster import channel as channels
from meshtape.cluster import wire
from meshtape.cluster.channel import Channel, Listener, dial
from meshtape.runtime.errors import CommError, MeshError


@pytest.fixture(params=[None, "127.0.0.1"], ids=["unix", "tcp"])
def listener(request):
    listener = Listener(request.param, b"right")
    yield listener
    listener.close()


def accept_in_background(listener, timeout=10.0):
    """A thread that accepts, and the list in which the channel will stand."""
    found = []
    thread = threading.Thread(target=lambda: found.append(listener.accept(timeout)))
    thread.start()
    return thread, found


def test_a_wrong_secret_is_refused_and_the_right_one_still_gets_in(listener):
    thread, found = accept_in_background(listener)
    with pytest.raises(CommError, match="secret"):
        dial(listener.address, b"wrong", 5.0)
    driver = dial(listener.address, b"right", 5.0)
    thread.join()
    driver.put(wire.frame(wire.RUN, wire.pack("hello")))
    assert found[0].receive().head == "hello"
    driver.close()
    assert found[0].receive() is None
    found[0].close()


def test_a_caller_that_says_nothing_keeps_nobody_out(listener, monkeypatch):
    monkeypatch.setattr(channels, "HANDSHAKE_SECONDS", 0.2)
    thread, found = accept_in_background(listener)
    family = socket.AF_UNIX if isinstance(listener.address, str) else socket.AF_INET
    with socket.socket(family) as silent, socket.socket(family) as noisy:
        silent.connect(listener.address)
        noisy.connect(listener.address)
        noisy.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 200)
        dial(listener.address, b"right", 5.0).close()
    thread.join()
    found[0].close()


def test_waiting_for_a_driver_ends(listener):
    with pytest.raises(MeshError, match=r"no driver connected .* within 0.05 s"):
        listener.accept(0.05)


def test_an_address_where_nobody_listens_is_named():
    listener = Listener("127.0.0.1", b"s")
    listener.close()
    with pytest.raises(MeshError, match=r'cannot be reached.*channel="ray"'):
        dial(listener.address, b"s", 2.0)


def test_heartbeats_never_split_a_message():
    ours, theirs = (Channel(sock) for sock in socket.socketpair())
    sent, stop = np.arange(300_000.0), threading.Event()

    def beat():
        while not stop.is_set():
            ours.beat()

    def send():
        for _ in range(20):
            ours.send(wire.frame(wire.REPLY, wire.pack(None), [sent]))

    threads = [threading.Thread(target=beat), threading.Thread(target=send)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert np.array_equal(theirs.receive().arrays[0], sent)
    stop.set()
    for thread in threads:
        thread.join()
    ours.close()
    theirs.close()


def test_a_beat_that_nobody_reads_does_not_block():
    ours, theirs = (Channel(sock) for sock in socket.socketpair())
    for _ in range(5000):
        ours.beat()
    ours.close()
    theirs.close()


def test_put_takes_what_fits_and_flush_the_rest():
    ours, theirs = (Channel(sock) for sock in socket.socketpair())
    arrays = [np.full(1000, i) for i in range(300)]     # more buffers than one system call takes
    ours.put(wire.frame(wire.RUN, wire.pack(1), arrays))
    assert ours.unsent
    while not theirs.messages:
        ours.flush()
        theirs.fill()
    got = theirs.messages.popleft().arrays
    assert all(np.array_equal(g, a) for g, a in zip(got, arrays, strict=True))
    assert not ours.unsent
    with pytest.raises(BlockingIOError):
        theirs.fill()
    ours.close()
    theirs.close()
