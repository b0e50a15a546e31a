"""What is known of one endpoint, and what of it one worker of a gateway tells the others."""

from __future__ import annotations

import attrs

from kvfleet.adapters.base import EndpointHealth

__all__ = ["BreakerNews", "Endpoint"]

_TOLD = " (told by another worker)"


@attrs.frozen
class BreakerNews:
    """How a breaker stands at one of several workers.

    Attributes:
        endpoint: Whose.
        changed_s: When it came to stand so, by the monotonic clock, which all processes of a machine read alike.
        opened_by, reason: The cause, in a word and in words; empty if it is closed.
        opened_s, wait_s: When it was opened, and how long it waits until one call may try.
        probe_until_s: Until when that call has the one slot; 0 if none has.
        is_bounded: True if it may be opened only while enough of its model's other replicas are not out.
    """

    endpoint: str
    changed_s: float
    opened_by: str
    reason: str
    opened_s: float
    wait_s: float
    probe_until_s: float
    is_bounded: bool


@attrs.define
class Endpoint:
    """What is known of one endpoint: its last check, what failed in a row, and its breaker (see `BreakerNews`)."""

    health: EndpointHealth | None = None
    checked_s: float = 0.0
    failed_checks: int = 0
    failed_calls: int = 0
    opened_by: str = ""
    opened_s: float = 0.0
    wait_s: float = 0.0
    reason: str = ""
    probe_until_s: float = 0.0
    is_bounded: bool = True
    changed_s: float = float("-inf")

    def news(self, endpoint: str) -> BreakerNews:
        """How its breaker stands, for the others."""
        return BreakerNews(
            endpoint,
            self.changed_s,
            self.opened_by,
            self.reason,
            self.opened_s,
            self.wait_s,
            self.probe_until_s,
            self.is_bounded,
        )

    def take(self, news: BreakerNews) -> None:
        """Have the breaker stand open, as it does elsewhere."""
        self.opened_by, self.opened_s, self.wait_s = news.opened_by, news.opened_s, news.wait_s
        self.reason = news.reason.removesuffix(_TOLD) + _TOLD
        self.probe_until_s, self.is_bounded = news.probe_until_s, news.is_bounded
