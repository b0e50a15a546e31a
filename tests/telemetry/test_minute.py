"""Counts of the last minute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.clock import FrozenClock
from kvfleet.telemetry.minute import Minute


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 100)), max_size=200))
def test_a_minute_is_bounded(steps: list[tuple[float, int]]) -> None:
    """However many requests come, it holds one entry a second, and its sums are those of its entries."""
    clock, minute = FrozenClock(), Minute()
    for pause_s, tokens in steps:
        clock.advance(pause_s)
        minute.trim(clock.now_s())
        minute.add(clock.now_s(), 1, tokens)
        assert len(minute._seconds) <= 62
        assert minute.tokens == sum(entry[2] for entry in minute._seconds)
        assert minute.requests == sum(entry[1] for entry in minute._seconds)
