"""A dashboard for programs that route without a gateway: a state they fill, and a small server in a thread.

A running gateway needs none of this: it shows the same page, fed by itself, at ``/dashboard``.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any

import attrs
import orjson

from kvfleet.config.schema import GatewayConfig
from kvfleet.errors import AuthenticationError
from kvfleet.gateway.auth import Keys
from kvfleet.gateway.listening import is_loopback
from kvfleet.gateway.page import load_page
from kvfleet.gateway.recent import RecentRoutes, detail_of
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace

__all__ = ["DashboardHandler", "DashboardState", "start_dashboard"]

_log = logging.getLogger(__name__)

_SHOWN = 20
_PREVIEW = 80
_MOST_NAMES = 1000
_FAILED = ("failed", "no_candidates")
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_PORT = re.compile(r":\d+$")


@attrs.define
class _Model:
    requests: int = 0
    errors: int = 0
    latency_ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        average = self.latency_ms / self.requests if self.requests else 0.0
        return {"requests": self.requests, "errors": self.errors, "avg_latency_ms": average}


@attrs.define
class DashboardState:
    """What a dashboard shows; may be written from any thread.

    It is a `TraceSink`: with ``Router(config, sinks=[state])`` every route is recorded by itself, with its trace and
    without its prompt.

    Attributes:
        max_history: Most routes kept.
        fleet_name, strategy, model_count: About the fleet.
    """

    max_history: int = attrs.field(default=500, validator=attrs.validators.ge(1))
    fleet_name: str = ""
    strategy: str = ""
    model_count: int = 0
    _routes: deque[dict[str, Any]] = attrs.field(init=False, repr=False)
    _traces: RecentRoutes = attrs.field(init=False, repr=False)
    _counters: dict[str, int] = attrs.field(init=False, repr=False)
    _models: dict[str, _Model] = attrs.field(init=False, repr=False, factory=dict)
    _latency_ms: float = attrs.field(init=False, repr=False, default=0.0)
    _health: dict[str, dict[str, Any]] = attrs.field(init=False, repr=False, factory=dict)
    _limits: dict[str, Any] = attrs.field(init=False, repr=False, factory=dict)
    _budgets: dict[str, Any] = attrs.field(init=False, repr=False, factory=dict)
    _since_s: float = attrs.field(init=False, repr=False, factory=time.monotonic)
    _lock: threading.Lock = attrs.field(init=False, repr=False, factory=threading.Lock)

    def __attrs_post_init__(self) -> None:
        self._routes = deque(maxlen=self.max_history)
        self._traces = RecentRoutes(self.max_history)
        self._counters = dict.fromkeys(("requests", "errors", "fallbacks", "cache_hits", "policy_blocks"), 0)

    def record_route(  # noqa: PLR0917 - the documented order
        self,
        prompt_preview: str = "",
        selected_model: str = "",
        strategy: str = "",
        latency_ms: float = 0.0,
        scores: Mapping[str, float] | None = None,
        cache_hit: bool = False,
        fallback: bool = False,
        error: str | bool = "",
    ) -> None:
        """A route ended.

        Args:
            prompt_preview: Its first 80 characters are shown to whoever opens the dashboard; empty for nothing.
            selected_model: The model chosen.
            strategy: Its strategy.
            latency_ms: From its start to its end.
            scores: Of the candidates, by model.
            cache_hit: True if a cache had the answer.
            fallback: True if the first choice did not answer.
            error: What went wrong; empty, or False, if nothing did.
        """
        row = {
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "prompt": prompt_preview[:_PREVIEW],
            "selected_model": selected_model,
            "strategy": strategy,
            "outcome": "failed" if error else "answered",
            "error": "error" if error is True else error or "",
            "latency_ms": latency_ms,
            "scores": dict(scores or {}),
            "cache_hit": cache_hit,
            "fallback": fallback,
        }
        with self._lock:
            self._add(row)

    def write(self, trace: Trace) -> None:
        """A route ended, and this is its trace."""
        explanation = Explanation(trace)
        with self._lock:
            self._traces.write(trace)
            row = self._traces.rows(1)[0]
            self._add({**row, "scores": {c.id: c.total_score for c in explanation.candidates if c.rank is not None}})
            if any(not decision.passed for decision in explanation.policy_decisions):
                self._counters["policy_blocks"] += 1

    def _add(self, row: dict[str, Any]) -> None:
        self._routes.appendleft(row)
        counters, has_failed = self._counters, row["outcome"] in _FAILED
        counters["requests"] += 1
        counters["errors"] += has_failed
        counters["fallbacks"] += row["fallback"]
        counters["cache_hits"] += row["cache_hit"]
        self._latency_ms += row["latency_ms"]
        name = row["selected_model"]
        if name and (name in self._models or len(self._models) < _MOST_NAMES):
            model = self._models.setdefault(name, _Model())
            model.requests += 1
            model.errors += has_failed
            model.latency_ms += row["latency_ms"]

    def record_policy_block(self) -> None:
        """A policy kept a request from a model."""
        with self._lock:
            self._counters["policy_blocks"] += 1

    def update_health(
        self, model: str, endpoint: str, healthy: bool, latency_ms: float = 0.0, **more: float | str | None
    ) -> None:
        """How a replica is; replaces what was said of it before.

        Args:
            model: The replica's model.
            endpoint: Where it is.
            healthy: True if it may be used.
            latency_ms: What its last health check took.
            more: Further facts, as the gateway shows them: breaker, in_flight, running, waiting, kv_usage, cache_mode.
        """
        name = f"{model}@{endpoint}"
        with self._lock:
            if name in self._health or len(self._health) < _MOST_NAMES:
                known = {"model": model, "endpoint": endpoint, "healthy": healthy, "latency_ms": latency_ms}
                self._health[name] = known | more

    def update_rate_limits(self, limits: Mapping[str, Any]) -> None:
        """The limits by endpoint, as in ``{"http://gpu-1:8000": {"used": 40, "limit": 60, "throttled": False}}``.

        `RateLimitTracker.summary` gives them, and ``router.services.limits.summary()`` those of a `Router`.
        """
        with self._lock:
            self._limits = dict(limits)

    def update_budgets(self, budgets: Mapping[str, Any]) -> None:
        """The budgets by tenant, as in ``{"team-a": {"spent_usd": 3.2, "limit_usd": 50}}``."""
        with self._lock:
            self._budgets = dict(budgets)

    def to_dict(self) -> dict[str, Any]:
        """What the page shows, as plain JSON types."""
        with self._lock:
            counters = self._counters
            requests, errors = counters["requests"], counters["errors"]
            return {
                "fleet": {
                    "name": self.fleet_name,
                    "strategy": self.strategy,
                    "models": self.model_count,
                    "uptime_seconds": time.monotonic() - self._since_s,
                },
                "counters": {
                    **{f"total_{name}": count for name, count in counters.items()},
                    "avg_latency_ms": self._latency_ms / requests if requests else 0.0,
                    "error_rate": f"{errors / requests if requests else 0:.1%}",
                },
                "model_stats": {name: model.to_dict() for name, model in self._models.items()},
                "health": {name: dict(known) for name, known in self._health.items()},
                "rate_limits": dict(self._limits),
                "budgets": dict(self._budgets),
                "recent_routes": [dict(row) for row, _ in zip(self._routes, range(_SHOWN), strict=False)],
            }

    def find(self, name: str) -> Trace | None:
        """The trace of a recorded route, by its number or trace identifier; None if there is none."""
        with self._lock:
            return self._traces.find(name)


class DashboardHandler(BaseHTTPRequestHandler):
    """Answers ``/``, ``/dashboard``, ``/api/state``, ``/api/route/{id}`` and ``/api/health``, all by GET.

    Attributes:
        state: What is shown.
        keys: Who may see it; anybody if there are none.
        hosts: Names by which the server may be called; any if empty. A server on loopback is called by no other, or a
            web page could point a name of its own at it and read it.
    """

    state: DashboardState
    keys: Keys = Keys()
    hosts: tuple[str, ...] = ()
    server_version = "kvfleet"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer a request."""
        path = self.path.partition("?")[0]
        if self.hosts and _PORT.sub("", self.headers.get("host", "")) not in self.hosts:
            self._json(421, {"error": {"message": "this server is not called by that name"}})
        elif path in ("/", "/dashboard"):
            page = load_page(api="api")
            self._send(200, page.body, page.headers)
        elif path == "/api/health":
            self._json(200, {"status": "ok"})
        elif self._is_known():
            self._data(path)

    def _is_known(self) -> bool:
        try:
            self.keys.caller(self.headers.get("authorization", "").encode("latin-1"))
        except AuthenticationError as error:
            self._json(401, {"error": {"message": error.message}})
            return False
        return True

    def _data(self, path: str) -> None:
        if path == "/api/state":
            self._json(200, self.state.to_dict())
        elif path.startswith("/api/route/") and (trace := self.state.find(path.removeprefix("/api/route/"))):
            self._json(200, detail_of(trace, lambda data: data))
        else:
            self._json(404, {"error": {"message": "there is no such page, or this route is not kept any more"}})

    def _json(self, status: int, data: Any) -> None:
        body = orjson.dumps(data, default=str, option=orjson.OPT_NON_STR_KEYS)
        self._send(status, body, ((b"content-type", b"application/json"), (b"cache-control", b"no-store")))

    def _send(self, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name.decode(), value.decode())
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's name
        """Nothing: a page that asks every 3 seconds would fill a log."""


def start_dashboard(
    state: DashboardState, host: str = "127.0.0.1", port: int = 8501, *, api_key: str = ""
) -> HTTPServer:
    """Serve a dashboard from a daemon thread until its ``shutdown()`` and ``server_close()``.

    Args:
        state: What it shows.
        host: Address to listen on; loopback unless you say otherwise.
        port: Port to listen on; 0 for any free one, which ``server_port`` of the result tells.
        api_key: Key the page asks its visitors for; anybody may look if it is empty.

    Raises:
        OSError: if the address cannot be listened on.
    """
    local = is_loopback(host)
    keys = Keys.of(GatewayConfig(), api_key, tenants=())
    attributes = {"state": state, "keys": keys, "hosts": (*_LOCAL, host) if local else ()}
    handler: Callable[..., DashboardHandler] = type("BoundHandler", (DashboardHandler,), attributes)
    server = ThreadingHTTPServer((host, port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="kvfleet-dashboard", daemon=True).start()
    _log.info("admin dashboard running at http://%s:%d", "localhost" if local else host, server.server_port)
    if not local and not api_key:
        _log.warning("the dashboard is open to whoever reaches %s; set api_key", host)
    return server
