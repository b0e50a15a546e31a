"""A gateway as its sibling workers see it: what `kvfleet.gateway.siblings` asks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from kvfleet.errors import RouteError
from kvfleet.gateway.app import Gateway, Reload
from kvfleet.gateway.exchange import Exchange
from kvfleet.gateway.feedback import read_feedback
from kvfleet.gateway.merging import dumped
from kvfleet.gateway.table import Access, Route, Table
from kvfleet.turns import in_turns

__all__ = ["SiblingsDoor"]

_MOST_BYTES = 64 * 1024


class SiblingsDoor:
    """A gateway as its sibling workers see it, on a socket of the file system that is this user's alone.

    Args:
        gateway: Whose.
        reload: Reloads this worker alone; None if there is no file.
    """

    def __init__(self, gateway: Gateway, reload: Reload | None) -> None:
        self.gateway = gateway
        self._reload_here = reload
        self._table = Table.of(
            (
                Route("GET", "/-/worker/metrics", Access.OPEN, self._metrics),
                Route("GET", "/-/worker/snapshot", Access.OPEN, self._snapshot),
                Route("GET", "/-/worker/route/{id}", Access.OPEN, self._route),
                Route("POST", "/-/worker/reload", Access.OPEN, self._reload),
                Route("POST", "/-/worker/feedback", Access.OPEN, self._feedback),
            )
        )

    def handle(self, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """Answer one question."""
        return self.gateway.handle(exchange, self._table)

    async def _metrics(self, exchange: Exchange) -> None:
        metrics = self.gateway.router.services.metrics
        await in_turns(metrics.read_ahead())
        body = await asyncio.to_thread(dumped, metrics.registry)
        await exchange.whole(200, body, [(b"content-type", b"application/json")])

    async def _snapshot(self, exchange: Exchange) -> None:
        await exchange.json(200, await in_turns(self.gateway.board.own_snapshot()))

    async def _route(self, exchange: Exchange) -> None:
        await self.gateway.board.own_route(exchange, exchange.path.removeprefix("/-/worker/route/"))

    async def _reload(self, exchange: Exchange) -> None:
        if self._reload_here is None:
            raise RouteError("there is no file", status=409, code="nothing_to_reload")
        await exchange.json(200, await self._reload_here("told by another worker"))

    async def _feedback(self, exchange: Exchange) -> None:
        given = read_feedback(await exchange.body(_MOST_BYTES))
        await exchange.json(200, {"model": self.gateway.router.feedback(given.identifier, given.score)})
