"""Silence counts only while the driver looks."""

import pytest

from meshtape.cluster import health


@pytest.fixture
def clock(monkeypatch):
    """clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(health.time, "monotonic", lambda: now[0])
    return now


def look_for(pulse, clock, seconds, talking=()):
    """Look every half second; ranks in `talking` beat meanwhile. The first silent rank, or None."""
    for _ in range(int(seconds / 0.5)):
        clock[0] += 0.5
        now = pulse.look(0.5)
        for rank in talking:
            pulse.heard(rank, now)
        if pulse.silent(now) is not None:
            return pulse.silent(now)
    return None


def test_the_rank_that_is_silent_for_the_timeout_is_named(clock):
    pulse = health.Pulse(3, 4.0)
    assert look_for(pulse, clock, 60, talking=(0, 1, 2)) is None
    assert look_for(pulse, clock, 4.0, talking=(0, 2)) is None
    assert look_for(pulse, clock, 1.0, talking=(0, 2)) == 1


def test_time_in_which_the_driver_did_not_look_is_no_silence(clock):
    pulse = health.Pulse(1, 4.0)
    look_for(pulse, clock, 2.0, talking=(0,))
    clock[0] += 300.0
    assert look_for(pulse, clock, 4.0) is None
    assert look_for(pulse, clock, 1.0) == 0


def test_a_driver_that_was_stopped_while_it_waited_judges_nobody_for_it(clock):
    pulse = health.Pulse(1, 4.0)
    pulse.look()
    clock[0] += 300.0
    assert pulse.silent(pulse.look(0.5)) is None
