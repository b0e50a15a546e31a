"""The handlers that tell of the gateway itself: its models, its tenants, how it is, what it counts, and its API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from kvfleet.errors import ModelNotFoundError, RouteError
from kvfleet.gateway.catalogue import catalogue
from kvfleet.gateway.exchange import JSON, Exchange
from kvfleet.gateway.health import Phase, fleet_report, is_usable_fleet, with_others
from kvfleet.gateway.openapi import openapi
from kvfleet.gateway.replicas import ReplicaNames
from kvfleet.gateway.table import Route
from kvfleet.gateway.tenants import statements
from kvfleet.turns import in_turns

if TYPE_CHECKING:
    from kvfleet.gateway.auth import Keys
    from kvfleet.gateway.siblings import Siblings
    from kvfleet.runtime import Router

__all__ = ["Lookups", "Subject"]


class Subject(Protocol):
    """The gateway that is asked about.

    Attributes:
        router: What routes its requests.
        replicas: What its replicas are called in public.
        keys: Those that clients need.
        routes: What may be asked of it.
        phase: Whether it serves.
        siblings: Its other workers; None for a single one.
        is_split: True if operators have a listener of their own.
    """

    router: Router
    replicas: ReplicaNames
    keys: Keys
    routes: tuple[Route, ...]
    phase: Phase
    siblings: Siblings | None
    is_split: bool


class Lookups:
    """Answers what the gateway is asked about itself.

    Args:
        gateway: Which.
    """

    def __init__(self, gateway: Subject) -> None:
        self._gateway = gateway
        self._catalogue = catalogue(gateway.router.config, int(time.time()))

    async def models(self, exchange: Exchange) -> None:
        """The models clients may name."""
        await exchange.json(200, {"object": "list", "data": list(self._catalogue.values())})

    async def model(self, exchange: Exchange) -> None:
        """One of them."""
        name = exchange.path.removeprefix("/v1/models/")
        found = self._catalogue.get(name)
        if found is None:
            raise ModelNotFoundError(f"no model is called {name[:256]!r}; GET /v1/models lists them", param="model")
        await exchange.json(200, found)

    async def tenants(self, exchange: Exchange) -> None:
        """What budgets came to."""
        body = await in_turns(statements(self._gateway.router, exchange.caller))
        await exchange.whole(200, body, [JSON])

    async def health(self, exchange: Exchange) -> None:
        """How the fleet is."""
        state: Mapping[str, Any] = await in_turns(self._gateway.router.replica_steps())
        if self._gateway.siblings is not None:
            state = with_others(state, await self._gateway.siblings.snapshots())
        status, report = await in_turns(fleet_report(state, self._gateway.replicas, self._gateway.phase))
        await exchange.json(status, report)

    async def livez(self, exchange: Exchange) -> None:
        """That the process lives."""
        await exchange.json(200, {"status": "ok"})

    async def readyz(self, exchange: Exchange) -> None:
        """Whether requests may be sent here."""
        if self._gateway.phase is not Phase.SERVING:
            await exchange.json(503, {"status": self._gateway.phase.value})
        elif is_usable_fleet(self._gateway.router.replica_states()):
            await exchange.json(200, {"status": "ok"})
        else:
            await exchange.json(503, {"status": "unavailable"})

    async def openapi(self, exchange: Exchange) -> None:
        """The API, as a machine reads it."""
        shown = [one for one in self._gateway.routes if not self._gateway.is_split or not one.is_operators]
        await exchange.json(200, openapi(shown, has_keys=bool(self._gateway.keys)))

    async def metrics(self, exchange: Exchange) -> None:
        """The metrics, for Prometheus."""
        metrics = self._gateway.router.services.metrics
        if not metrics.enabled:
            raise RouteError("metrics are switched off; see telemetry.prometheus_enabled", status=404, code="disabled")
        await in_turns(metrics.read_ahead())
        if self._gateway.siblings is None:
            body = await asyncio.to_thread(metrics.render)
        else:
            body = await asyncio.to_thread(self._gateway.siblings.rendered, metrics.registry)
        await exchange.whole(200, body, [(b"content-type", metrics.content_type.encode())])
