"""Admission: refused early, and with an honest word about when to come back, rather than left to queue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import attrs

from kvfleet.config.fields import number
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind, Lease, Outcome, Refusal, RoutingContext
from kvfleet.plugin.spec import hookimpl

__all__ = ["ConcurrencyAdmission"]

_WEIGHT_OF_NEW = 0.1
_EVERYBODY = None
K = TypeVar("K")


@attrs.define(eq=False)
class _Slot:
    """One request's place; given back once."""

    owner: ConcurrencyAdmission
    tenant: str
    _is_released: bool = attrs.field(init=False, default=False)

    def release(self, outcome: Outcome) -> None:
        if not self._is_released:
            self._is_released = True
            self.owner.release(self.tenant, outcome)


class _Nothing:
    """What a dry run reserves."""

    def release(self, outcome: Outcome) -> None:
        """Nothing to give back."""


@attrs.define
class ConcurrencyAdmission:
    """Let in at most so many requests at once, overall and for each tenant.

    A refused request is told when a place should be free: those refused since are taken to come back in turn, and each
    place to be given back after the time that requests have taken so far.
    """

    max_concurrent: int = number(0, ge=0, unit="requests", doc="Most requests in flight; no limit if 0.")
    max_per_tenant: int = number(0, ge=0, unit="requests", doc="Most requests of one tenant in flight; no limit if 0.")
    _in_flight: int = attrs.field(init=False, default=0)
    _tenants: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    _turned_away: dict[str | None, int] = attrs.field(init=False, factory=dict, repr=False)
    _duration_s: float | None = attrs.field(init=False, default=None)
    _refused: int = attrs.field(init=False, default=0)

    async def admit(self, ctx: RoutingContext) -> Lease | Refusal:
        """A place, or a refusal."""
        tenant = ctx.tenant
        if self.max_concurrent and self._in_flight >= self.max_concurrent:
            return self._refuse(
                ctx, _EVERYBODY, self.max_concurrent, "the gateway is at its limit of requests in flight"
            )
        if self.max_per_tenant and self._tenants.get(tenant, 0) >= self.max_per_tenant:
            return self._refuse(ctx, tenant, self.max_per_tenant, "the tenant is at its limit of requests in flight")
        if ctx.dry_run:
            return _Nothing()
        self._in_flight += 1
        self._tenants[tenant] = self._tenants.get(tenant, 0) + 1
        return _Slot(self, tenant)

    def release(self, tenant: str, outcome: Outcome) -> None:
        """Take a place back, and learn how long it was used."""
        self._in_flight -= 1
        _one_less(self._tenants, tenant)
        self._move_up(_EVERYBODY, self._in_flight)
        self._move_up(tenant, self._tenants.get(tenant, 0))
        known = self._duration_s
        took_s = outcome.duration_s
        self._duration_s = took_s if known is None else known + _WEIGHT_OF_NEW * (took_s - known)

    def state(self) -> Mapping[str, float]:
        """How many are in flight, how many were refused, and how long a request takes."""
        return {
            "in_flight": self._in_flight,
            "max_concurrent": self.max_concurrent,
            "refused": self._refused,
            "duration_s": self._duration_s or 0.0,
        }

    def _move_up(self, queue: str | None, in_flight: int) -> None:
        """One of those turned away may come; nobody waits any more where nobody is in flight."""
        if in_flight:
            _one_less(self._turned_away, queue)
        else:
            self._turned_away.pop(queue, None)

    def _refuse(self, ctx: RoutingContext, queue: str | None, places: int, reason: str) -> Refusal:
        ahead = self._turned_away.get(queue, 0) + 1
        if not ctx.dry_run:
            self._refused += 1
            self._turned_away[queue] = ahead
        wait_s = None if self._duration_s is None else self._duration_s * ahead / places
        return Refusal(reason=f"{reason} ({places})", retry_after_s=wait_s)


def _one_less(counts: dict[K, int], key: K) -> None:
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
