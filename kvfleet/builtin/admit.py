"""Admission: refused early, and with an honest word about when to come back, rather than left to queue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from kvfleet.config.fields import mapping, number
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind, Lease, Outcome, Refusal, RoutingContext
from kvfleet.plugin.spec import hookimpl

__all__ = ["ConcurrencyAdmission"]

_WEIGHT_OF_NEW = 0.1
Queue = tuple[str, str]
"""Whose requests are counted together: everybody's, a tenant's, a key's."""
_EVERYBODY: Queue = ("", "")
_SAYS = {
    "": "the gateway is at its limit of requests in flight",
    "tenant": "the tenant is at its limit of requests in flight",
    "key": "the key is at its limit of requests in flight",
}


@attrs.define(eq=False)
class _Slot:
    """One request's place in each queue that is counted; given back once."""

    owner: ConcurrencyAdmission
    queues: Sequence[Queue]
    _is_released: bool = attrs.field(init=False, default=False)

    def release(self, outcome: Outcome) -> None:
        if not self._is_released:
            self._is_released = True
            self.owner.release(self.queues, outcome)


class _Nothing:
    """What a dry run reserves."""

    def release(self, outcome: Outcome) -> None:
        """Nothing to give back."""


@attrs.define
class ConcurrencyAdmission:
    """Let in at most so many requests at once: overall, for each tenant, and for keys of the gateway.

    A refused request is told when a place should be free: those refused since are taken to come back in turn, and each
    place to be given back after the time that requests have taken so far.
    """

    max_concurrent: int = number(0, ge=0, unit="requests", doc="Most requests in flight; no limit if 0.")
    max_per_tenant: int = number(0, ge=0, unit="requests", doc="Most requests of one tenant in flight; no limit if 0.")
    keys: Mapping[str, int] = mapping(
        doc="Most requests in flight of each of the gateway's keys, by its name.", example={"ml-ci": 4}
    )
    _in_flight: dict[Queue, int] = attrs.field(init=False, factory=dict, repr=False)
    _turned_away: dict[Queue, int] = attrs.field(init=False, factory=dict, repr=False)
    _duration_s: float | None = attrs.field(init=False, default=None)
    _refused: int = attrs.field(init=False, default=0)

    def inherit(self, before: ConcurrencyAdmission) -> None:
        """Count on with the requests that were let in before a reload."""
        self._in_flight, self._turned_away = before._in_flight, before._turned_away
        self._duration_s, self._refused = before._duration_s, before._refused

    async def admit(self, ctx: RoutingContext) -> Lease | Refusal:
        """A place, or a refusal."""
        queues = self._queues(ctx)
        for queue, places in queues:
            if places and self._in_flight.get(queue, 0) >= places:
                return self._refuse(ctx, queue, places)
        if ctx.dry_run:
            return _Nothing()
        for queue, _ in queues:
            self._in_flight[queue] = self._in_flight.get(queue, 0) + 1
        return _Slot(self, [queue for queue, _ in queues])

    def _queues(self, ctx: RoutingContext) -> list[tuple[Queue, int]]:
        """Where the request is counted, each with its places; no limit if 0."""
        queues = [(_EVERYBODY, self.max_concurrent)]
        if self.max_per_tenant:
            queues.append((("tenant", ctx.tenant), self.max_per_tenant))
        if places := self.keys.get(ctx.request.key):
            queues.append((("key", ctx.request.key), places))
        return queues

    def release(self, queues: Sequence[Queue], outcome: Outcome) -> None:
        """Take a place back, and learn how long it was used."""
        for queue in queues:
            _one_less(self._in_flight, queue)
            self._move_up(queue)
        known = self._duration_s
        took_s = outcome.duration_s
        self._duration_s = took_s if known is None else known + _WEIGHT_OF_NEW * (took_s - known)

    def state(self) -> Mapping[str, float]:
        """How many are in flight, how many were refused, and how long a request takes."""
        return {
            "in_flight": self._in_flight.get(_EVERYBODY, 0),
            "max_concurrent": self.max_concurrent,
            "refused": self._refused,
            "duration_s": self._duration_s or 0.0,
        }

    def _move_up(self, queue: Queue) -> None:
        """One of those turned away may come; nobody waits any more where nobody is in flight."""
        if queue in self._in_flight:
            _one_less(self._turned_away, queue)
        else:
            self._turned_away.pop(queue, None)

    def _refuse(self, ctx: RoutingContext, queue: Queue, places: int) -> Refusal:
        ahead = self._turned_away.get(queue, 0) + 1
        if not ctx.dry_run:
            self._refused += 1
            self._turned_away[queue] = ahead
        wait_s = None if self._duration_s is None else self._duration_s * ahead / places
        return Refusal(reason=f"{_SAYS[queue[0]]} ({places})", retry_after_s=wait_s)


def _one_less(counts: dict[Queue, int], key: Queue) -> None:
    """Count down, and forget what reaches nothing, so that the table is never larger than what is in flight."""
    count = counts.get(key, 0) - 1
    if count > 0:
        counts[key] = count
    else:
        counts.pop(key, None)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The admissions."""
    yield Component(Kind.ADMIT, "concurrency", ConcurrencyAdmission)
