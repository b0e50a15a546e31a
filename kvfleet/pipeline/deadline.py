"""A request's own time, and what of it an attempt may use."""

from __future__ import annotations

import math

import attrs

from kvfleet.adapters.call import Limits
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.pipeline.relayed import deadline_passed
from kvfleet.plugin.contract import RouteRequest

__all__ = ["Deadline", "Named"]

_OURS = "timeout_s"  # a program that calls the router says no more
_SLACK_S = 0.005  # uvloop's timers may be a millisecond early


@attrs.define(eq=False)
class Deadline:
    """When a request's time is up, by the monotonic clock; infinite if nobody said. It does not change.

    Attributes:
        whole_s, whole_by: When its answer must have ended, and what set that.
        first_s, first_by: When its first byte must be there; never later.
        idle_s: Longest silence that the client bears; infinite if it does not say.
        idle_by: What set that.
    """

    whole_s: float = math.inf
    whole_by: str = ""
    first_s: float = math.inf
    first_by: str = ""
    idle_s: float = math.inf
    idle_by: str = ""

    @classmethod
    def of(cls, request: RouteRequest, started_s: float) -> Deadline:
        """The deadline of a request that began then."""
        whole_s, by = request.timeout_s, request.timeout_by or _OURS
        first_s = request.first_byte_s
        if whole_s is None and first_s is None:
            return _NONE
        whole_at_s = math.inf if whole_s is None else started_s + whole_s
        if first_s is None:
            return cls(whole_at_s, by, whole_at_s, by)
        first_by, first_at_s = request.first_byte_by, started_s + first_s
        if whole_at_s <= first_at_s:
            return cls(whole_at_s, by, whole_at_s, by, first_s, first_by)
        return cls(whole_at_s, by if whole_s is not None else "", first_at_s, first_by, first_s, first_by)

    @property
    def is_set(self) -> bool:
        """True if there is one."""
        return self.first_s != math.inf

    def amid(self, now_s: float) -> Deadline:
        """The deadline of an attempt that goes on with an answer: it counts as silence until its first byte."""
        silent_s = now_s + self.idle_s
        if self.whole_s <= silent_s:
            return attrs.evolve(self, first_s=self.whole_s, first_by=self.whole_by)
        return attrs.evolve(self, first_s=silent_s, first_by=self.idle_by)

    def told(self, started_s: float) -> tuple[float, str]:
        """The seconds a request has in all, or else up to its first byte, and what set that."""
        at_s, by = (self.first_s, self.first_by) if self.whole_s == math.inf else (self.whole_s, self.whole_by)
        return at_s - started_s, by

    def left_s(self, now_s: float, first_byte_s: float | None) -> float:
        """What was left of that when the answer ended, or when its first byte came."""
        if self.whole_s != math.inf:
            return self.whole_s - now_s
        return self.first_s - (now_s if first_byte_s is None else first_byte_s)

    def limits(self, candidate: ModelConfig, wait_s: float | None, now_s: float) -> Named:
        """The limits of an attempt that begins now: its own, or what is left, whichever is less.

        Raises:
            BackendError: if nothing is left.
        """
        usual = _usual(candidate, wait_s)
        if self.first_s - now_s >= usual.limits.first_byte_s and self.idle_s >= usual.limits.idle_s:
            return usual
        return self._limits(candidate, wait_s, now_s)

    def _limits(self, candidate: ModelConfig, wait_s: float | None, now_s: float) -> Named:
        own_s = candidate.timeout_seconds
        first_s, first_by = own_s, "timeout_seconds"
        if wait_s is not None and wait_s != own_s:
            first_s, first_by = wait_s, "fallback.timeout_ms"
        connect_s, connect_by = candidate.connect_timeout_seconds, "connect_timeout_seconds"
        idle_s, idle_by = candidate.idle_timeout_seconds, "idle_timeout_seconds"
        left_s = self.first_s - now_s
        if left_s <= 0:
            raise deadline_passed(self.first_by)
        if left_s < first_s:
            first_s, first_by = left_s, self.first_by
        if self.idle_s < idle_s:
            idle_s, idle_by = self.idle_s, self.idle_by
        if first_s < connect_s:
            connect_s, connect_by = first_s, first_by
        limits = Limits(connect_s=connect_s, first_byte_s=first_s, idle_s=idle_s)
        return Named(limits, connect_by, first_by, idle_by, self.first_by if first_by == self.first_by else "")

    def passed(self, now_s: float) -> bool:
        """True if the time to the first byte is up."""
        return now_s >= self.first_s - _SLACK_S


_NONE = Deadline()
_USUAL: dict[tuple[str, float | None], tuple[ModelConfig, Named]] = {}
_MOST_USUAL = 16_384


def _usual(candidate: ModelConfig, wait_s: float | None) -> Named:
    """The limits of an attempt whose request sets none; kept, since they are the same each time."""
    found = _USUAL.get((candidate.id, wait_s))
    if found is not None and found[0] is candidate:
        return found[1]
    if len(_USUAL) >= _MOST_USUAL:
        _USUAL.clear()
    made = _NONE._limits(candidate, wait_s, 0.0)  # noqa: SLF001 - of this module
    _USUAL[candidate.id, wait_s] = candidate, made
    return made


@attrs.frozen
class Named:
    """An attempt's limits, and what set each.

    Attributes:
        limits: In seconds.
        connect_by, first_by, idle_by: Options or headers.
        deadline_by: What set the request's own deadline, if it is that which limits the first byte; else empty.
    """

    limits: Limits
    connect_by: str
    first_by: str
    idle_by: str
    deadline_by: str = ""

    def name(self, error: BackendError) -> BackendError:
        """The error, which says now what ended it; another one if that was the request's own deadline."""
        if error.limit:
            return error
        found = {
            Fault.CONNECT_TIMEOUT: (self.connect_by, self.limits.connect_s),
            Fault.TIMEOUT: (self.first_by, self.limits.first_byte_s),
            Fault.IDLE_TIMEOUT: (self.idle_by, self.limits.idle_s),
        }.get(error.kind)
        if found is None or error.status is not None:  # a 408 is the backend's own patience
            return error
        by, seconds = found
        if self.deadline_by and by == self.deadline_by and not error.received:
            return deadline_passed(by)
        error.limit = by
        error.message = f"{error.message} ({by}: {seconds:g} s)"
        return error
