"""Runs the gateway: sockets, signals, and an end that drops nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence

import attrs

from kvfleet.config.schema import FleetConfig, TraceStoreConfig
from kvfleet.errors import TraceError
from kvfleet.gateway.app import Gateway
from kvfleet.gateway.auth import Keys
from kvfleet.gateway.cors import Cors
from kvfleet.gateway.guard import Patience
from kvfleet.gateway.headers import read_by_conditions
from kvfleet.gateway.hosts import Hosts
from kvfleet.gateway.httpd import Server, Stop
from kvfleet.gateway.listening import bind, check_exposure, is_loopback, url_of
from kvfleet.gateway.logs import set_up_logging
from kvfleet.runtime import Router
from kvfleet.trace.explanation import TraceSink
from kvfleet.trace.otel import make_bridge
from kvfleet.trace.rows import default_path
from kvfleet.trace.store import TraceStore

__all__ = ["Serving", "create_gateway_app", "loop_factory", "running", "serve"]

_log = logging.getLogger(__name__)


def create_gateway_app(
    router: Router, api_key: str = "", cors_origins: Sequence[str] | None = None, *, host: str = ""
) -> Gateway:
    """The gateway as an ASGI application, for a server of your own.

    Args:
        router: Opened and closed by the application, if the server speaks ASGI's lifespan protocol.
        api_key: A key for clients, beside the configured ones.
        cors_origins: Web origins that may call; the configured ones if None.
        host: The address it is to listen on. On the loopback and without keys it answers under the loopback's names
            alone; if empty, under any.

    Raises:
        ConfigError: if the configured headers cannot be what they are to be.
    """
    config = router.config.gateway
    cors = Cors.of(config.cors_origins if cors_origins is None else cors_origins)
    conditions = read_by_conditions(stage.component for stage in router.pipeline.all_stages)
    keys = Keys.of(config, api_key, tenants=router.config.tenants)
    is_open = bool(host) and not keys and is_loopback(host)
    hosts = Hosts.of((host, *config.allowed_hosts)) if is_open else None
    return Gateway(router, keys=keys, cors=cors, hosts=hosts, condition_headers=conditions)


@attrs.frozen
class Serving:
    """A gateway that is being served.

    Attributes:
        url: Where, without a path.
        gateway: The application.
        router: Its router.
    """

    url: str
    gateway: Gateway

    @property
    def router(self) -> Router:
        """The router behind it."""
        return self.gateway.router


def serve(
    config: FleetConfig,
    *,
    host: str | None = None,
    port: int | None = None,
    api_key: str | None = None,
    on_ready: Callable[[Serving], None] | None = None,
    allow_unauthenticated: bool = False,
    unready_s: float = 0.0,
    drain_s: float = 30.0,
    log_level: str = "INFO",
) -> None:
    """Serve a fleet until SIGTERM or SIGINT; returns after the last answer.

    The first signal makes ``/readyz`` say 503; after `unready_s` no connection is accepted any more; requests in flight
    have `drain_s` to end. A second signal ends at once.

    Args:
        config: The fleet.
        host: Address to listen on; the configured one if None.
        port: Port to listen on, 0 for any free one; the configured one if None.
        api_key: A key for clients, beside the configured ones.
        on_ready: Called once requests are accepted.
        allow_unauthenticated: Listen beyond loopback without a key.
        unready_s: Seconds between not being ready and closing the door, for load balancers that poll ``/readyz``.
        drain_s: Seconds for requests in flight.
        log_level: From which level kvfleet's own lines are logged.

    Raises:
        ConfigError: if the fleet cannot be served as configured.
        TraceError: if the configured place of the trace store cannot be used.
        OSError: if the address cannot be listened on.
    """
    set_up_logging(as_json=config.telemetry.structured_logs, level=log_level.upper())
    stop = Stop(unready_s=unready_s)
    run = _serve(
        config,
        host=config.gateway.host if host is None else host,
        port=config.gateway.port if port is None else port,
        api_key=api_key or "",
        allow_unauthenticated=allow_unauthenticated,
        drain_s=drain_s,
        on_ready=on_ready,
        stop=stop,
    )
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run)


@contextlib.asynccontextmanager
async def running(
    config: FleetConfig,
    *,
    router: Router | None = None,
    api_key: str = "",
    patience: Patience | None = None,
) -> AsyncIterator[Serving]:
    """Serve a fleet on a free port of the loopback, in the current event loop, until the block ends. For tests.

    Args:
        config: The fleet.
        router: Its router, if it is one's own; it is closed at the end.
        api_key: A key for clients, beside the configured ones.
        patience: With clients that stall.
    """
    router = Router(config) if router is None else router
    gateway = create_gateway_app(router, api_key, host="127.0.0.1")
    sockets = bind("127.0.0.1", 0)
    await gateway.start()
    server = Server(gateway, drain_s=5.0, patience=patience or Patience())
    await server.start(sockets)
    task = asyncio.create_task(server.run(), name="kvfleet-gateway")
    try:
        yield Serving(url_of(sockets[0]), gateway)
    finally:
        gateway.drain()
        server.stop()
        await task
        await gateway.stop()


async def _serve(
    config: FleetConfig,
    *,
    host: str,
    port: int,
    api_key: str,
    allow_unauthenticated: bool,
    drain_s: float,
    on_ready: Callable[[Serving], None] | None,
    stop: Stop,
) -> None:
    check_exposure(host, Keys.of(config.gateway, api_key, tenants=config.tenants), allowed=allow_unauthenticated)
    async with contextlib.AsyncExitStack() as stack:
        router = await _open_router(config, host, stack)
        gateway = create_gateway_app(router, api_key, host=host)
        sockets = bind(host, port)
        for one in sockets:
            stack.callback(one.close)
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        server = Server(gateway, drain_s=drain_s, patience=Patience())
        await server.start(sockets)
        task = asyncio.create_task(server.run(), name="kvfleet-gateway")
        _calm_garbage_collector()
        with stop.on_signals(gateway, server):
            serving = Serving(url_of(sockets[0]), gateway)
            if on_ready is not None:
                on_ready(serving)
            _log.info("gateway listening url=%s fleet=%s", serving.url, config.fleet_name)
            await task
        _log.info("gateway stopped")


def _calm_garbage_collector() -> None:
    """Look for cycles less often, and not among what lives as long as the process.

    Requests leave few cycles behind, and Python's default looks for them after every 700 new objects: 11 to 24 % of the
    gateway's time; so 2 to 4 %, for a megabyte of memory (measured with `benchmarks/gateway.py`'s load).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


async def _open_router(config: FleetConfig, host: str, stack: contextlib.AsyncExitStack) -> Router:
    """The router with everything around it that a running gateway has: trace store, export, a metrics port."""
    telemetry = config.telemetry
    sinks: list[TraceSink] = []
    store = _open_store(telemetry.trace_store) if telemetry.trace_store.enabled else None
    if store is not None:
        stack.push_async_callback(store.aclose)
        sinks.append(store)
    bridge = make_bridge(telemetry, os.environ)
    stack.push_async_callback(bridge.aclose)
    router = Router(config, sinks=sinks, bridge=bridge, state_dir=default_path(os.environ).parent)
    metrics = router.services.metrics
    if store is not None:
        metrics.read("kvfleet_trace_store_dropped_total", lambda: store.dropped)
    if telemetry.prometheus_port is not None:
        metrics.port = telemetry.prometheus_port
        metrics.start_server(host)
        stack.callback(metrics.stop_server)
    return router


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Makes uvloop's event loops, where there is uvloop."""
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _open_store(config: TraceStoreConfig) -> TraceStore | None:
    """The trace store; None, with a warning, if its usual place cannot be written, as in a read-only container.

    Raises:
        TraceError: if a configured place cannot be used.
    """
    store = TraceStore.from_config(config, os.environ)
    try:
        store.open()
    except TraceError as error:
        if config.path:
            raise
        _log.warning("trace store off reason=%s remedy=set telemetry.trace_store.path or .enabled", error)
        return None
    return store
