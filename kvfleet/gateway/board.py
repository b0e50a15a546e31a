"""The dashboard of a running gateway: its page, its data, and the data's changes as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson

from kvfleet.errors import RouteError
from kvfleet.gateway.exchange import Exchange
from kvfleet.gateway.health import is_usable, with_others
from kvfleet.gateway.merging import MergedMetrics, dumped
from kvfleet.gateway.page import load_page
from kvfleet.gateway.recent import RecentRoutes, detail_of
from kvfleet.gateway.replicas import ReplicaNames
from kvfleet.gateway.tallies import Tallies
from kvfleet.trace.spans import Trace
from kvfleet.turns import Steps, in_turns

if TYPE_CHECKING:
    from kvfleet.gateway.siblings import Siblings
    from kvfleet.runtime import Router

__all__ = ["PATH", "Board"]

PATH = "/dashboard"
_MOST_ROWS = 50
_SHOWN = (
    "model", "provider", "enabled", "healthy", "reason", "breaker", "share", "panic", "in_flight", "running", "waiting",
    "kv_usage", "prefix_hit_rate", "expected_ttfb_s", "cache_mode", "cache_why", "rate_limit_left",
    "rate_limited_for_s",
)  # fmt: skip
_NO_STORE = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
_ANY_KEYS = orjson.OPT_NON_STR_KEYS
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Board:
    """Shows a fleet to whoever looks. While nobody does, a request costs one append to `recent`.

    Args:
        router: Whose fleet.
        names: Names for its replicas; their addresses are not shown.
        every_s: Seconds between two events; what they say is gathered once for all watchers.
        most_watchers: Most event streams at a time.
        before: The board of the gateway before a reload, whose decisions are shown on.
    """

    def __init__(
        self,
        router: Router,
        names: ReplicaNames,
        *,
        every_s: float = 1.0,
        most_watchers: int = 16,
        before: Board | None = None,
    ) -> None:
        self.recent: RecentRoutes = RecentRoutes() if before is None else before.recent
        self.recent.replicas = len(router.models)
        self.watchers = 0
        self.siblings: Siblings | None = None if before is None else before.siblings
        self._router = router
        self._names = names
        self._every_s = every_s
        self._most_watchers = most_watchers
        self._clock = router.services.clock
        self.since_s: float = self._clock.now_s() if before is None else before.since_s
        self._gathered: tuple[float, bytes] = (float("-inf"), b"")
        self._over = asyncio.Event()

    def open(self) -> None:
        """Begin to keep traces."""
        self._router.add_sink(self.recent)

    def close(self) -> None:
        """End every event stream; twice is harmless."""
        self._over.set()

    # Handlers --------------------------------------------------------------------------------------------------------

    async def page(self, exchange: Exchange) -> None:
        """The page itself, which holds no data."""
        page = load_page(api="dashboard/api", events="dashboard/events")
        await exchange.whole(200, page.body, list(page.headers))

    async def state(self, exchange: Exchange) -> None:
        """What the page shows, as JSON."""
        await exchange.whole(200, await self._gather(), _NO_STORE)

    async def route(self, exchange: Exchange) -> None:
        """One of the last decisions, whole.

        Raises:
            RouteError: 404 if it is not kept.
        """
        name = exchange.path.removeprefix(f"{PATH}/api/route/")
        body = await self._own_route(name)
        if body is None and self.siblings is not None:
            body = next(iter(await self.siblings.bodies(f"/-/worker/route/{quote(name)}")), None)
        if body is None:
            raise RouteError(
                f"this route is not among the last {self.recent.size}; 'kvfleet trace show ID' has older ones",
                status=404,
                code="trace_not_found",
            )
        await exchange.whole(200, body, _NO_STORE)

    async def _own_route(self, name: str) -> bytes | None:
        """A route as JSON, made in a thread: with hundreds of candidates that takes long."""
        trace = self.recent.find(name)
        return None if trace is None else await asyncio.to_thread(self._told, trace)

    def _told(self, trace: Trace) -> bytes:
        return orjson.dumps(detail_of(trace, self._names.hide_in), option=_ANY_KEYS)

    async def own_route(self, exchange: Exchange, name: str) -> None:
        """The same for another worker, of what this one decided."""
        body = await self._own_route(name)
        await exchange.whole(404 if body is None else 200, body or b"", _NO_STORE)

    async def events(self, exchange: Exchange) -> None:
        """The same as `state` every second, until the watcher leaves or the gateway stops.

        Raises:
            RouteError: 503 if too many watch.
        """
        if self.watchers >= self._most_watchers:
            raise RouteError(
                f"{self.watchers} dashboards are open, and no more may be", status=503, code="too_many_watchers"
            )
        self.watchers += 1
        exchange.watch()
        try:
            await self._push(exchange)
        except asyncio.CancelledError:
            # Leaving is how a watcher's visit ends.
            if not exchange.has_left:
                raise
        finally:
            self.watchers -= 1
            exchange.unwatch()

    async def _push(self, exchange: Exchange) -> None:
        await exchange.start(200, _STREAM)
        while not self._over.is_set():
            await exchange.piece(b"data: " + await self._gather() + b"\n\n")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._over.wait()
        exchange.unwatch()
        await exchange.end()

    # Gathering -------------------------------------------------------------------------------------------------------

    async def _gather(self) -> bytes:
        """The state as JSON, at most `every_s` old."""
        now_s = self._clock.now_s()
        if now_s - self._gathered[0] >= 0.9 * self._every_s:  # timers may be early
            shown = await (in_turns(self.snapshot()) if self.siblings is None else self._of_all(self.siblings))
            self._gathered = (now_s, orjson.dumps(shown, option=_ANY_KEYS))
        return self._gathered[1]

    async def _of_all(self, siblings: Siblings) -> dict[str, Any]:
        """The fleet as all workers have it: their counts and requests added, their decisions by time."""
        metrics = self._router.services.metrics
        await in_turns(metrics.read_ahead())
        merged = await asyncio.to_thread(lambda: siblings.metrics(dumped(metrics.registry)))
        return await in_turns(self.snapshot(merged, await siblings.snapshots()))

    def snapshot(
        self, merged: MergedMetrics | None = None, others: Sequence[Mapping[str, Any]] = ()
    ) -> Steps[dict[str, Any]]:
        """The fleet, its counters and its last decisions, without addresses.

        Args:
            merged: The metrics of all workers; this one's if None.
            others: What the other workers have in flight, and decided.
        """
        router, metrics = self._router, self._router.services.metrics
        state = with_others((yield from router.state_steps(_MOST_ROWS)), others)
        tallies = (yield from Tallies.read_steps(merged or metrics.registry)) if metrics.enabled else None
        rows = [*(yield from self.recent.row_steps(_MOST_ROWS)), *(row for other in others for row in other["rows"])]
        if others:
            rows = sorted(rows, key=lambda row: str(row["timestamp"]), reverse=True)[:_MOST_ROWS]
        replicas = []
        for replica in state["replicas"]:
            replicas.append(self._replica(replica))
            yield
        return {
            "fleet": {
                "name": state["fleet"],
                "strategy": state["strategy"],
                "pipeline": state["pipeline"],
                "models": len({replica["model"] for replica in state["replicas"]}),
                "replicas": len(state["replicas"]),
                "uptime_seconds": self._clock.now_s() - self.since_s,
                "version": version("kvfleet"),
            },
            "counters": None if tallies is None else tallies.counters(),
            "series": None if tallies is None else tallies.series(),
            "model_stats": {} if tallies is None else tallies.by_model(),
            "replicas": replicas,
            "rate_limits": (yield from self._hidden(state.get("rate_limits", {}))),
            "stages": (yield from self._hidden(state["stages"])),
            "recent_routes": [{**row, "served_by": self._names.by_id.get(row["served_by"], "")} for row in rows],
        }

    def _hidden(self, things: Mapping[str, Any]) -> Steps[dict[str, Any]]:
        """What is told of each thing, without addresses."""
        found: dict[str, Any] = {}
        for name, told in things.items():
            found |= self._names.hide_in({name: told})
            yield
        return found

    def own_snapshot(self) -> Steps[dict[str, Any]]:
        """What another worker needs to show the fleet: what is in flight here, and the last decisions."""
        load = self._router.services.load
        in_flight = {model.id: load.in_flight(model.id) for model in self._router.models}
        rows = yield from self.recent.row_steps(_MOST_ROWS)
        return {"in_flight": in_flight, "rows": rows}

    def _replica(self, state: dict[str, Any]) -> dict[str, Any]:
        replica = f"{state['model']}@{state['endpoint']}"
        found = {key: state.get(key) for key in _SHOWN}
        found["name"] = self._names.by_id.get(replica, state["model"])
        found["reason"] = self._names.hide(state.get("reason") or "")
        found["usable"] = is_usable(state)
        if state.get("cache_mode") == "approximate" and not state.get("cache_why"):
            found["cache_mode"] = self.recent.modes.get(replica) or found["cache_mode"]
        return found
