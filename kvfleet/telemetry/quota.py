"""What is left of a limit between two answers that tell of it."""

from __future__ import annotations

import attrs

from kvfleet.adapters.limit_headers import ToldQuota

__all__ = ["BELIEVED_S", "Quota"]

BELIEVED_S = 3600.0
"""Longest time for which anything a backend said is believed: a wrong word must not shut it out for a day."""

_MINUTE_S = 60.0


@attrs.define
class Quota:
    """One limit of a backend, as an answer told it, and what became of it since.

    A bucket fills steadily until its reset, which is what OpenAI and Anthropic mean by it, so that a request may be
    possible long before. A window stays as it is and is forgotten at its end. Where no reset is told it is a minute.

    Attributes:
        told: What the answer said.
        at_s: When it came, by the monotonic clock.
        limit: How many there are when it is whole; None if nobody says.
        unseen: Requests of ours that the answer could not have counted yet. Tokens are the backend's to count.
        rate: How many come back in a second.
    """

    told: ToldQuota
    at_s: float
    limit: float | None
    unseen: int = 0
    rate: float = attrs.field(init=False, default=0.0)
    _lasts_s: float = attrs.field(init=False, default=_MINUTE_S)

    def __attrs_post_init__(self) -> None:
        """Reckon how many come back in a second, and for how long it is believed."""
        told = self.told
        reset_s = _MINUTE_S if told.reset_s is None else told.reset_s
        self._lasts_s = min(reset_s, BELIEVED_S)
        if told.refills and self.limit is not None and reset_s:
            self.rate = max(self.limit - told.remaining, 0.0) / reset_s

    @property
    def ends_s(self) -> float:
        """When it is forgotten: at its reset, and while requests of ours may be missing in it not within a minute."""
        lasts_s = self._lasts_s
        if self.unseen and self.told.refills and lasts_s < _MINUTE_S:
            lasts_s = _MINUTE_S
        return self.at_s + lasts_s

    def left(self, now_s: float) -> float:
        """How much is left now."""
        left, limit = self.told.remaining + self.rate * (now_s - self.at_s), self.limit
        if limit is not None and left > limit:
            left = limit
        left -= self.unseen
        return left if left > 0 else 0.0

    def used(self, now_s: float) -> float | None:
        """Which share of it is used, 0..1; None if nobody says how much there is."""
        return None if self.limit is None else 1.0 - self.left(now_s) / self.limit

    def when_left(self, enough: float) -> float:
        """When so much will be left, if nothing more is sent; at the latest when it is forgotten."""
        missing = enough + self.unseen - self.told.remaining
        if missing <= 0:
            return self.at_s
        reaches = self.rate > 0 and (self.limit is None or enough + self.unseen <= self.limit)
        return min(self.at_s + missing / self.rate, self.ends_s) if reaches else self.ends_s
