"""What the workers of a gateway tell each other of the engines: breakers that open, backends that ask to wait.

Each statement has the time at which it came to be so, and the latest counts (a last-writer-wins register, Shapiro et
al., 2011), so it does not matter in which order they come, how often, or whether one is lost: what has changed of late
is told again once a second.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.telemetry.endpoint import BreakerNews
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.limited import Wait

__all__ = ["SiblingsState"]

_AGAIN_S = 1.0
_OF_LATE_S = 10.0
_MOST_AT_ONCE = 64


@attrs.define
class SiblingsState:
    """Tells what is known here, and takes in what others tell.

    Attributes:
        health: Whose breakers.
        limits: Whose waits.
    """

    health: HealthManager
    limits: FleetLimits
    _said: Sequence[Any] = attrs.field(init=False, default=(), repr=False)
    _said_s: float = attrs.field(init=False, default=float("-inf"), repr=False)

    def told(self, now_s: float) -> Iterator[bytes]:
        """What there is to tell now: nothing, if nothing is other than it was a moment ago."""
        since_s = now_s - _OF_LATE_S
        news = [("breaker", *attrs.astuple(one)) for one in self.health.news(since_s)]
        news += [("wait", replica, *attrs.astuple(wait)) for replica, wait in self.limits.waits(since_s).items()]
        if not news or (news == self._said and now_s - self._said_s < _AGAIN_S):
            return
        self._said, self._said_s = news, now_s
        for start in range(0, len(news), _MOST_AT_ONCE):
            yield orjson.dumps(news[start : start + _MOST_AT_ONCE])

    def hear(self, told: bytes, endpoints: Container[str]) -> None:
        """What another worker tells, of these endpoints.

        Raises:
            Exception: whatever nonsense leads to; what came before it is taken in.
        """
        for kind, name, *fields in orjson.loads(told):
            if kind == "breaker" and name in endpoints:
                self.health.hear(BreakerNews(name, *fields))
            elif kind == "wait":
                self.limits.hear(name, Wait(*fields))
