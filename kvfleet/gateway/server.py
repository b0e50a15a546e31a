"""Runs the gateway: sockets, signals, and an end that drops nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence

import attrs

from kvfleet.config.parts import part_of
from kvfleet.config.schema import FleetConfig, TraceStoreConfig
from kvfleet.errors import KVFleetError, TraceError
from kvfleet.gateway.app import Gateway, Reload
from kvfleet.gateway.auth import Keys
from kvfleet.gateway.cors import Cors
from kvfleet.gateway.doors import Doors, Stop
from kvfleet.gateway.file_watch import files_of, watch
from kvfleet.gateway.guard import Patience
from kvfleet.gateway.headers import read_by_conditions
from kvfleet.gateway.hosts import Hosts
from kvfleet.gateway.listening import bind, bind_for, check_exposure, is_loopback, naming, url_of
from kvfleet.gateway.logs import set_up_logging
from kvfleet.gateway.memory import calm_memory
from kvfleet.gateway.news import News
from kvfleet.gateway.reload import FleetFile, Reloader
from kvfleet.gateway.siblings import Siblings
from kvfleet.gateway.workers import Seat, Supervisor
from kvfleet.runtime import Router
from kvfleet.trace.explanation import TraceSink
from kvfleet.trace.otel import make_bridge
from kvfleet.trace.rows import default_path
from kvfleet.trace.store import TraceStore

__all__ = ["Serving", "create_gateway_app", "loop_factory", "running", "serve"]

_log = logging.getLogger(__name__)


def create_gateway_app(
    router: Router,
    api_key: str = "",
    cors_origins: Sequence[str] | None = None,
    *,
    host: str = "",
    before: Gateway | None = None,
) -> Gateway:
    """The gateway as an ASGI application, for a server of your own.

    Args:
        router: Opened and closed by the application, if the server speaks ASGI's lifespan protocol.
        api_key: A key for clients, beside the configured ones.
        cors_origins: Web origins that may call; the configured ones if None.
        host: The address it is to listen on. On the loopback and without keys it answers under the loopback's names
            alone; if empty, under any.
        before: The gateway whose place this one is to take.

    Raises:
        ConfigError: if the configured headers cannot be what they are to be.
    """
    config = router.config.gateway
    cors = Cors.of(config.cors_origins if cors_origins is None else cors_origins)
    conditions = read_by_conditions(stage.component for stage in router.pipeline.all_stages)
    keys = Keys.of(config, api_key, tenants=router.config.tenants)
    is_open = bool(host) and not keys and is_loopback(host)
    hosts = Hosts.of((host, *config.allowed_hosts)) if is_open else None
    return Gateway(router, keys=keys, cors=cors, hosts=hosts, condition_headers=conditions, before=before)


@attrs.frozen
class Serving:
    """A gateway that is being served.

    Attributes:
        url: Where, without a path.
        doors: Its listeners.
        admin_url: Where operators have a listener of their own; empty if they have none.
        gateway: The application that answers now.
        router: Its router.
    """

    url: str
    doors: Doors
    admin_url: str = ""

    @property
    def gateway(self) -> Gateway:
        """The application that answers now."""
        return self.doors.gateway

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
    file: FleetFile | None = None,
    watches: bool | None = None,
    workers: int = 1,
) -> None:
    """Serve a fleet until SIGTERM or SIGINT; returns after the last answer.

    The first signal makes ``/readyz`` say 503; after `unready_s` no connection is accepted any more; requests in flight
    have `drain_s` to end. A second signal ends at once. SIGHUP reads the fleet file again.

    Args:
        config: The fleet, as the process starts.
        host: Address to listen on; the configured one if None.
        port: Port to listen on, 0 for any free one; the configured one if None.
        api_key: A key for clients, beside the configured ones.
        on_ready: Called once requests are accepted.
        allow_unauthenticated: Listen beyond loopback without a key.
        unready_s: Seconds between not being ready and closing the door, for load balancers that poll ``/readyz``.
        drain_s: Seconds for requests in flight.
        log_level: From which level kvfleet's own lines are logged.
        file: Where a reload reads the fleet; None for a fleet that cannot be reloaded.
        watches: Reload when the file changes; as configured if None.
        workers: How many processes serve, behind one port.

    Raises:
        ConfigError: if the fleet cannot be served as configured.
        TraceError: if the configured place of the trace store cannot be used.
        OSError: if the address cannot be listened on.
    """
    set_up_logging(as_json=config.telemetry.structured_logs, level=log_level.upper())
    house = _House(
        host=config.gateway.host if host is None else host,
        port=config.gateway.port if port is None else port,
        api_key=api_key or "",
        allow_unauthenticated=allow_unauthenticated,
        drain_s=drain_s,
        unready_s=unready_s,
        file=file,
        watches=config.gateway.watch if watches is None else watches,
    )
    house.run(config, workers, on_ready)


@contextlib.asynccontextmanager
async def running(
    config: FleetConfig,
    *,
    router: Router | None = None,
    api_key: str = "",
    patience: Patience | None = None,
    file: FleetFile | None = None,
) -> AsyncIterator[Serving]:
    """Serve a fleet on a free port of the loopback, in the current event loop, until the block ends. For tests.

    Args:
        config: The fleet.
        router: Its router, if it is one's own; it is closed at the end.
        api_key: A key for clients, beside the configured ones.
        patience: With clients that stall.
        file: Where a reload reads the fleet.
    """
    router = Router(config) if router is None else router
    gateway = create_gateway_app(router, api_key, host="127.0.0.1")
    has_operators = config.gateway.admin.port is not None
    sockets, operators = bind("127.0.0.1", 0), bind("127.0.0.1", 0) if has_operators else []
    await gateway.start()
    doors = Doors(gateway, drain_s=5.0, patience=patience, has_operators=has_operators)
    await doors.open(sockets, operators)
    task = asyncio.create_task(doors.run(), name="kvfleet-gateway")
    make = functools.partial(_successor, api_key, "127.0.0.1")
    reloader = None if file is None else Reloader(doors, file, make)
    try:
        yield Serving(url_of(sockets[0]), doors, url_of(operators[0]) if operators else "")
    finally:
        doors.gateway.drain()
        doors.stop()
        await task
        if reloader is not None:
            await reloader.aclose()
        await doors.gateway.stop()


def _successor(api_key: str, host: str, router: Router, before: Gateway) -> Gateway:
    return create_gateway_app(router, api_key, host=host, before=before)


@attrs.frozen
class Sockets:
    """What is listened on.

    Attributes:
        clients: For each worker, where clients connect.
        operators: Where operators do, if they have a listener of their own.
    """

    clients: Sequence[Sequence[socket.socket]]
    operators: Sequence[socket.socket]

    @property
    def all(self) -> Sequence[socket.socket]:
        """Every one."""
        return [*(one for own in self.clients for one in own), *self.operators]

    def others(self, number: int) -> Sequence[socket.socket]:
        """Where clients connect to other workers than this."""
        return [one for at, own in enumerate(self.clients) if at != number for one in own]


@attrs.frozen(kw_only=True)
class _House:
    """Everything around a gateway that `serve` has, and tests have not; see there."""

    host: str
    port: int
    api_key: str
    allow_unauthenticated: bool
    drain_s: float
    unready_s: float
    file: FleetFile | None
    watches: bool

    def run(self, config: FleetConfig, workers: int, on_ready: Callable[[Serving], None] | None) -> None:
        """Serve with so many processes until a signal."""
        self.check_exposure(config)
        with contextlib.ExitStack() as stack:
            sockets = self.bind(config, workers, stack)

            def work(seat: Seat | None = None) -> None:
                with asyncio.Runner(loop_factory=loop_factory()) as runner:
                    own = self if seat is None else self.for_worker(seat)
                    runner.run(own.serve(own.begin_with(config, seat), sockets, on_ready, seat))

            if workers == 1:
                work()
            else:
                Supervisor(workers, sockets.all, work).run()

    async def serve(
        self, config: FleetConfig, sockets: Sockets, on_ready: Callable[[Serving], None] | None, seat: Seat | None
    ) -> None:
        """Serve until a signal; with a seat, as one of several workers."""
        async with contextlib.AsyncExitStack() as stack:
            news = None if seat is None else News(seat)
            router = await _open_router(config, stack, news, seat)
            gateway = create_gateway_app(router, self.api_key, host=self.host)
            await gateway.start()
            doors = Doors(
                gateway,
                drain_s=self.drain_s,
                has_operators=bool(sockets.operators),
                ends_all=(lambda: True) if seat is None else seat.is_everybody_stopping,
            )
            stack.push_async_callback(lambda: doors.gateway.stop())  # noqa: PLW0108 - whoever stands there at the end
            siblings = None if seat is None else Siblings(seat)
            reloader = self._reloader(doors, siblings, stack)
            if seat is not None and siblings is not None and news is not None:
                stack.callback(siblings.close)
                await _join(doors, siblings, None if reloader is None else reloader.reload_here)
                telling = asyncio.create_task(news.run(lambda: doors.gateway.router), name="kvfleet-news")
                stack.callback(telling.cancel)
            _serve_metrics(config, doors, siblings, stack)
            number = 0 if seat is None else seat.number
            await doors.open(sockets.clients[number], sockets.operators, sockets.others(number))
            task = asyncio.create_task(doors.run(), name="kvfleet-gateway")
            calm_memory()
            with Stop(self.unready_s).on_signals(doors, None if reloader is None else reloader.soon, seat):
                admin_url = url_of(sockets.operators[0]) if sockets.operators else ""
                serving = Serving(url_of(sockets.clients[number][0]), doors, admin_url)
                _announce(serving, config, on_ready, seat)
                await task
            _log.info("gateway stopped")

    def bind(self, config: FleetConfig, workers: int, stack: contextlib.ExitStack) -> Sockets:
        """The listening sockets."""
        admin = config.gateway.admin
        found = Sockets(bind_for(workers, self.host, self.port), [])
        for one in found.all:
            stack.callback(one.close)
        if admin.port is None:
            return found
        with naming("gateway.admin.port", admin.host, admin.port):
            operators = bind(admin.host, admin.port)
        for one in operators:
            stack.callback(one.close)
        return attrs.evolve(found, operators=operators)

    def for_worker(self, seat: Seat) -> _House:
        """The same for one of several workers, which has a part of each limit that it counts by itself."""
        if self.file is None:
            return self
        file = self.file
        return attrs.evolve(self, file=attrs.evolve(file, read=lambda: part_of(file.read(), seat.count, seat.number)))

    def begin_with(self, config: FleetConfig, seat: Seat | None) -> FleetConfig:
        """The configuration to begin with: a worker that is started again takes the file as it is now."""
        if seat is None:
            return config
        if self.file is not None and seat.starts > 1:
            try:
                return self.file.read()
            except (KVFleetError, OSError) as error:
                _log.error("worker begins with the configuration of the start, for the file is refused: %s", error)
        return part_of(config, seat.count, seat.number)

    def check_exposure(self, config: FleetConfig) -> None:
        """Refuse to listen beyond loopback without a key.

        Raises:
            ConfigError: if so.
        """
        keys = Keys.of(config.gateway, self.api_key, tenants=config.tenants)
        check_exposure(self.host, keys, allowed=self.allow_unauthenticated)
        if config.gateway.admin.port is not None:
            place = ("gateway", "admin", "host")
            check_exposure(config.gateway.admin.host, keys, allowed=self.allow_unauthenticated, place=place)

    def _reloader(self, doors: Doors, siblings: Siblings | None, stack: contextlib.AsyncExitStack) -> Reloader | None:
        """What reloads, and whoever watches the file; both end with the stack."""
        if self.file is None:
            return None
        file, reloader = self.file, Reloader(doors, self.file, self._make, siblings=siblings)
        stack.push_async_callback(reloader.aclose)
        if self.watches and (siblings is None or siblings.seat.number == 0):  # one is enough, and tells the others
            watching = asyncio.create_task(
                watch(
                    lambda: files_of(file.path, doors.gateway.router.config), lambda: reloader.quietly("file changed")
                ),
                name="kvfleet-watch",
            )
            stack.callback(watching.cancel)
        return reloader

    def _make(self, router: Router, before: Gateway) -> Gateway:
        self.check_exposure(router.config)
        return _successor(self.api_key, self.host, router, before)


async def _join(doors: Doors, siblings: Siblings, reload: Reload | None) -> None:
    """Have a worker answer for the others, and they for it."""
    doors.gateway.join(siblings)
    await doors.open_to_siblings(siblings.seat.path(siblings.seat.number), reload)


def _announce(
    serving: Serving, config: FleetConfig, on_ready: Callable[[Serving], None] | None, seat: Seat | None
) -> None:
    """Say that requests are accepted; of several workers one says so for all, the first time."""
    is_first = seat is None or (seat.number == 0 and seat.starts == 1)
    if on_ready is not None and is_first:
        on_ready(serving)
    admin = f" admin_url={serving.admin_url}" if serving.admin_url else ""
    worker = "" if seat is None else f" worker={seat.number} pid={os.getpid()}"
    _log.info("gateway listening url=%s fleet=%s%s%s", serving.url, config.fleet_name, admin, worker)


async def _open_router(
    config: FleetConfig, stack: contextlib.AsyncExitStack, news: News | None, seat: Seat | None
) -> Router:
    """The router with everything around it that a running gateway has: trace store, export, news of other workers."""
    telemetry = config.telemetry
    sinks: list[TraceSink] = []
    store = _open_store(telemetry.trace_store) if telemetry.trace_store.enabled else None
    if store is not None:
        stack.push_async_callback(store.aclose)
        sinks.append(store)
    bridge = make_bridge(telemetry, os.environ)
    stack.push_async_callback(bridge.aclose)
    router = Router(
        config,
        sinks=sinks,
        bridge=bridge,
        state_dir=default_path(os.environ).parent,
        news=None if news is None else news.publish,
        minutes=None if seat is None else seat.minute,
    )
    metrics = router.services.metrics
    if seat is not None and router.lag is not None:
        router.lag.worker = seat.number
    if store is not None:
        metrics.read("kvfleet_trace_store_dropped_total", lambda: store.dropped)
    return router


def _serve_metrics(
    config: FleetConfig, doors: Doors, siblings: Siblings | None, stack: contextlib.AsyncExitStack
) -> None:
    """Serve the metrics on a port of their own, if that is configured; of several workers the first does."""
    telemetry, metrics = config.telemetry, doors.gateway.router.services.metrics
    if telemetry.prometheus_port is None or (siblings is not None and siblings.seat.number):
        return
    metrics.port = telemetry.prometheus_port
    merged = None if siblings is None else siblings.registry(metrics.registry)
    with naming("telemetry.prometheus_port", config.gateway.admin.host, telemetry.prometheus_port):
        metrics.start_server(config.gateway.admin.host, merged)
    stack.callback(metrics.stop_server)


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
