"""What a second of computing means for the requests to come."""

from __future__ import annotations

import pytest

from kvfleet.telemetry.congestion import Congestion


def test_nobody_waits_for_what_an_idle_fleet_computes() -> None:
    """Nothing was sent, or long ago."""
    known = Congestion(0.0, span_s=10.0)
    assert known.later(8, now_s=100.0) == 0.0
    known.add(5.0, now_s=100.0)
    assert known.later(8, now_s=300.0) == pytest.approx(0.0, abs=1e-6)


def test_it_rises_with_the_share_of_time_that_is_used() -> None:
    """A fifth of the time is a quarter of a second, half of it a whole one; more replicas share it."""
    known = Congestion(0.0, span_s=10.0)
    known.add(4.0, now_s=1000.0)
    assert known.later(2, now_s=1000.0) == pytest.approx(0.25)
    known.add(6.0, now_s=1000.0)
    assert known.later(2, now_s=1000.0) == pytest.approx(1.0)
    assert known.later(4, now_s=1000.0) == pytest.approx(1 / 3)


@pytest.mark.parametrize("seconds", [400, 20, 5])
def test_a_steady_stream_of_work_is_seen_as_what_it_is(seconds: int) -> None:
    """A replica to which half a second of work is sent every second is busy half of the time, soon after the start."""
    known = Congestion(7.0, span_s=20.0)
    for tenth in range(10 * seconds):
        known.add(0.05, now_s=7.0 + tenth / 10)
    assert known.later(1, now_s=7.0 + seconds) == pytest.approx(1.0, rel=0.05)


def test_the_first_request_of_all_is_no_rush() -> None:
    """A second of work in the first moment is not a fleet that works all the time."""
    known = Congestion(7.0, span_s=20.0)
    known.add(1.0, now_s=7.0)
    assert known.later(8, now_s=7.0) < 0.1


def test_more_work_than_there_is_time_for_has_an_end() -> None:
    """Also where the clock stands still, or is set back."""
    known = Congestion(0.0)
    for _ in range(1000):
        known.add(10.0, now_s=5.0)
    most = known.later(1, now_s=5.0)
    assert 5 < most < 6
    assert known.later(1, now_s=0.0) == most
