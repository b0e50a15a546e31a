"""What happened within the last minute: counts that slide, in a bounded space."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import attrs

__all__ = ["Minute"]

_WINDOW_S = 60


@attrs.define
class Minute:
    """Requests and tokens of the last minute, by the second: at most 61 entries.

    A second counts until it has been over for a whole minute, so that no 60 seconds ever hold more than is allowed.
    """

    _seconds: deque[list[int]] = attrs.field(init=False, factory=deque, repr=False)
    requests: int = attrs.field(init=False, default=0)
    tokens: int = attrs.field(init=False, default=0)

    def trim(self, now_s: float) -> None:
        """Forget what is over."""
        while self._seconds and self._seconds[0][0] + 1 + _WINDOW_S <= now_s:
            _, requests, tokens = self._seconds.popleft()
            self.requests -= requests
            self.tokens -= tokens

    def add(self, now_s: float, requests: int, tokens: int) -> int:
        """Count; gives the second it was counted in."""
        second = math.floor(now_s)
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
        self._seconds[-1][1] += requests
        self._seconds[-1][2] += tokens
        self.requests += requests
        self.tokens += tokens
        return second

    def correct(self, second: int, tokens: int) -> None:
        """Add so many tokens, or fewer than none, to a second that still counts."""
        for entry in self._seconds:
            if entry[0] == second:
                entry[2] += tokens
                self.tokens += tokens
                return

    def at(self, second: int) -> tuple[int, int]:
        """Requests and tokens of one second."""
        found = next((entry for entry in self._seconds if entry[0] == second), (second, 0, 0))
        return found[1], found[2]

    def seconds(self) -> Iterator[tuple[int, int, int]]:
        """Every second that counts, with its requests and tokens."""
        return ((second, requests, tokens) for second, requests, tokens in self._seconds)

    def wait_s(self, now_s: float, *, requests: int = 0, tokens: int = 0) -> float:
        """Seconds until so many requests and tokens have been forgotten, if nothing else comes."""
        for second, gone_requests, gone_tokens in self._seconds:
            requests -= gone_requests
            tokens -= gone_tokens
            if requests <= 0 and tokens <= 0:
                return max(second + 1 + _WINDOW_S - now_s, 0.0)
        return _WINDOW_S + 1.0
