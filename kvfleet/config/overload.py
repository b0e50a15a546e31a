"""What a fleet file says of more requests than the fleet can serve: how many at once, who waits, and who goes first."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from kvfleet.config.fields import flag, mapping, number, text

__all__ = ["OverloadConfig", "QueueOptions", "TenantShare"]


@attrs.frozen(kw_only=True)
class TenantShare:
    """What a tenant gets while requests wait."""

    weight: float = number(1.0, gt=0, doc="How many times as much as others it gets.")
    priority: int = number(0, ge=-100, le=100, doc="Priority of its requests that ask for none.")
    max_priority: int | None = number(
        None, ge=-100, le=100, doc="Highest priority that its requests may ask for; its `priority` if absent."
    )


@attrs.define(kw_only=True)
class QueueOptions:
    """Letting in as many requests as the fleet can serve, and having some of the others wait; of `admit.queue` too."""

    max_in_flight: int = number(0, ge=0, unit="requests", doc="Most requests in flight; no limit if 0.")
    max_in_flight_per_replica: int = number(
        0,
        ge=0,
        unit="requests",
        doc="Most for each replica that may be called, those of others that its engine counts included; no limit if 0.",
    )
    max_queue: int = number(256, ge=0, unit="requests", doc="Most that wait; nobody does if 0.")
    max_wait_ms: float = number(10_000, gt=0, unit="ms", doc="Longest wait.")
    refuse_late: bool = flag(
        True, doc="Refuse a request at once that is not expected to be answered within its own deadline."
    )
    priority_header: str = text(
        "", doc="Header with which a request asks for a priority; off if empty.", example="X-KVFleet-Priority"
    )
    priority: int = number(0, ge=-100, le=100, doc="Priority of a request that asks for none; greater goes first.")
    max_priority: int | None = number(
        None, ge=-100, le=100, doc="Highest that a request may ask for; `priority` if absent."
    )
    tenants: Mapping[str, TenantShare] = mapping(
        doc="By tenant: its weight and its priorities.", example={"team-ml": {"weight": 2, "priority": 10}}
    )


@attrs.frozen(kw_only=True)
class OverloadConfig(QueueOptions):
    """Letting in as many requests as the fleet can serve, and having some of the others wait."""
