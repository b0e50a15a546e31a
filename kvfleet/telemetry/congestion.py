"""What a second of computing means for the requests that have not come yet."""

from __future__ import annotations

from math import exp, expm1

import attrs

__all__ = ["Congestion"]

_BUSIEST = 0.85
"""Share of the time beyond which replicas count as no busier: estimates are too rough for what would follow."""
_FIRST_S = 2.0
"""What is known of less than so many seconds says no more than if it were of these: a fleet begins with one request."""


@attrs.define
class Congestion:
    """How busy the replicas of a model are with prompts, by what was sent to them of late.

    Whoever comes while a replica is busy waits for what is in front of him, and so does whoever comes after, until it
    is idle for once. So a second of work costs those to come about rho / (1 - rho) seconds, where rho is the share of
    the time in which it is busy: next to nothing while the fleet is idle, several seconds near its limit. It is what
    makes a prefix that another replica holds worth waiting for, just when everybody is waiting.

    Args:
        since_s: When what is sent began to be counted: of a gateway that has just started, little was sent.
        span_s: What was sent fades to 1/e in this time.

    >>> known = Congestion(since_s=0.0, span_s=20.0)
    >>> known.add(10.0, now_s=1000.0)
    >>> known.later(replicas=1, now_s=1000.0)
    1.0
    """

    since_s: float
    span_s: float = 20.0
    _work_s: float = attrs.field(init=False, default=0.0)
    _at_s: float = attrs.field(init=False, default=0.0)

    def add(self, work_s: float, now_s: float) -> None:
        """So many seconds of computing were sent to one of the replicas."""
        self._work_s = self._left(now_s) + work_s
        self._at_s = now_s

    def later(self, replicas: int, now_s: float) -> float:
        """Seconds that those to come wait for each second of computing, shared by so many replicas."""
        known_s = max(now_s - self.since_s, _FIRST_S)
        span_s = -self.span_s * expm1(-known_s / self.span_s)
        busy = min(self._left(now_s) / (span_s * max(replicas, 1)), _BUSIEST)
        return busy / (1 - busy)

    def _left(self, now_s: float) -> float:
        return self._work_s * exp(min((self._at_s - now_s) / self.span_s, 0.0))
