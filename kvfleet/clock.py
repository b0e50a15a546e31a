"""Clocks, which are injected: nothing on the route reads the time by itself."""

from __future__ import annotations

import time
from typing import Protocol

import attrs

__all__ = ["Clock", "FrozenClock", "SystemClock"]


class Clock(Protocol):
    """Two readings: monotonic seconds for durations and leases, Unix nanoseconds for spans."""

    def now_s(self) -> float:
        """Monotonic seconds."""

    def time_ns(self) -> int:
        """Unix time in nanoseconds."""


class SystemClock:
    """The machine's clocks."""

    now_s = staticmethod(time.monotonic)
    time_ns = staticmethod(time.time_ns)


@attrs.define
class FrozenClock:
    """A clock that moves when told to.

    >>> clock = FrozenClock()
    >>> clock.advance(1.5)
    >>> clock.now_s()
    1001.5
    """

    seconds: float = 1000.0
    epoch_ns: int = 1_700_000_000_000_000_000

    def now_s(self) -> float:
        """Monotonic seconds."""
        return self.seconds

    def time_ns(self) -> int:
        """Unix time in nanoseconds."""
        return self.epoch_ns + round((self.seconds - 1000.0) * 1e9)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.seconds += seconds
