"""Who is connected to whom: pools shared by the adapters of one endpoint and credential, each on one event loop."""

from __future__ import annotations

import asyncio
import importlib.util
import ssl
import urllib.request
import weakref
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

import attrs
import httpx

from kvfleet.adapters.splitters import MAX_EVENT_BYTES
from kvfleet.adapters.transport import PooledTransport, trusting
from kvfleet.clock import Clock, SystemClock
from kvfleet.errors import ComponentError

__all__ = ["Connections", "Route"]

T = TypeVar("T")

CONTROL_TIMEOUT_S = 5.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@attrs.frozen(cache_hash=True)
class Route:
    """The way to a backend: its origin, whose credential travels it, and how.

    Attributes:
        origin: Scheme, host and port, as in ``http://gpu-1:8000``.
        credential: What tells one account from another there; connections are never shared between two.
        http2: True to speak HTTP/2.
        proxy: URL of a proxy; empty for what the environment says (``HTTPS_PROXY``, ``NO_PROXY``).
    """

    origin: str
    credential: str = attrs.field(default="", repr=False)
    http2: bool = False
    proxy: str = attrs.field(default="", repr=False)


@attrs.define
class _Open:
    """What is open on one event loop."""

    transports: dict[Route, httpx.AsyncBaseTransport] = attrs.field(factory=dict)
    clients: dict[Route, httpx.AsyncClient] = attrs.field(factory=dict)
    shared: dict[Hashable, tuple[float, Any]] = attrs.field(factory=dict)
    pending: dict[Hashable, asyncio.Future[None]] = attrs.field(factory=dict)

    async def aclose(self) -> None:
        transports, self.transports = self.transports, {}
        clients, self.clients = self.clients, {}
        self.shared.clear()
        for client in clients.values():
            await client.aclose()
        for transport in transports.values():
            await transport.aclose()


@attrs.define(kw_only=True, eq=False)
class Connections:
    """Owns the connections of a router's adapters.

    The data path goes through a transport for each `Route`; control calls (health, metrics, model lists) through one
    ordinary `httpx.AsyncClient` on the same transport: reading a replica's load every second also keeps a connection
    warm, where the engine would close an idle one (vLLM after 5 s). Both are bound to the event loop they were made on:
    the same object may serve several loops, and they do not meet.

    Args:
        transport: Stands in for every connection; for tests, as in ``httpx.MockTransport(handler)``.
        idle_s: Seconds after which an unused connection is closed.
        event_bytes: Longest event of an answer's stream.
        clock: The time, for what is shared for a while.
    """

    transport: httpx.AsyncBaseTransport | None = None
    idle_s: float = 30.0
    event_bytes: int = MAX_EVENT_BYTES
    clock: Clock = attrs.field(factory=SystemClock)
    _loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Open] = attrs.field(
        init=False, factory=weakref.WeakKeyDictionary, repr=False
    )
    _last: tuple[asyncio.AbstractEventLoop, _Open] | None = attrs.field(init=False, default=None, repr=False)

    def transport_for(self, route: Route) -> httpx.AsyncBaseTransport:
        """The data path's transport on the running event loop.

        Raises:
            ComponentError: if HTTP/2 is wanted and not installed.
        """
        if self.transport is not None:
            return self.transport
        opened = self._opened()
        found = opened.transports.get(route)
        if found is None:
            found = opened.transports[route] = self._make(route)
        return found

    def client_for(self, route: Route) -> httpx.AsyncClient:
        """The client for control calls on the running event loop. It follows no redirects and holds no credential."""
        clients = self._opened().clients
        found = clients.get(route)
        if found is None:
            found = clients[route] = httpx.AsyncClient(
                base_url=route.origin, transport=self.transport_for(route), timeout=CONTROL_TIMEOUT_S, trust_env=False
            )
        return found

    async def shared(self, key: Hashable, ttl_s: float, make: Callable[[], Awaitable[T]]) -> T:
        """What `make` gives, at most `ttl_s` seconds old; callers that come meanwhile wait for the first one's.

        Raises:
            Exception: whatever `make` raises, to the caller whose turn it was; another one then takes its turn.
        """
        opened = self._opened()
        while (turn := opened.pending.get(key)) is not None:
            await asyncio.shield(turn)
        found = opened.shared.get(key)
        now_s = self.clock.now_s()
        if found is not None and found[0] > now_s:
            value: T = found[1]
            return value
        opened.pending[key] = turn = asyncio.get_running_loop().create_future()
        try:
            value = await make()
            opened.shared[key] = (self.clock.now_s() + ttl_s, value)
            return value
        finally:
            del opened.pending[key]
            turn.set_result(None)

    async def aclose(self) -> None:
        """Close every connection; those of another loop that still runs are closed there. Safe twice."""
        here = asyncio.get_running_loop()
        for loop, opened in list(self._loops.items()):
            if loop is here:
                await opened.aclose()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(opened.aclose(), loop))
        self._loops.clear()
        self._last = None

    def _opened(self) -> _Open:
        loop = asyncio.get_running_loop()
        if self._last is not None and self._last[0] is loop:  # a look-up by weak reference costs ten times as much
            return self._last[1]
        found = self._loops.get(loop)
        if found is None:
            for gone in [each for each in self._loops if each.is_closed()]:
                del self._loops[gone]
            found = self._loops[loop] = _Open()
        self._last = (loop, found)
        return found

    def _make(self, route: Route) -> httpx.AsyncBaseTransport:
        proxy = _proxy_for(route)
        if not proxy and not route.http2:
            return PooledTransport(idle_s=self.idle_s)
        if route.http2 and importlib.util.find_spec("h2") is None:
            raise ComponentError("HTTP/2 needs another package: pip install 'kvfleet[http2]'")
        # httpx looks through all its idle connections at each request: keep few of them
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50, keepalive_expiry=self.idle_s)
        return httpx.AsyncHTTPTransport(
            http2=route.http2, proxy=proxy or None, limits=limits, trust_env=False, verify=_tls_of(route)
        )


def _tls_of(route: Route) -> ssl.SSLContext:
    """A context for each choice of protocols, because httpx writes that into the one it is given."""
    if httpx.URL(route.origin).scheme != "https":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used, trusts nobody, costs nothing
    return trusting("http/1.1", "h2") if route.http2 else trusting("http/1.1")


def _proxy_for(route: Route) -> str:
    """The proxy to use: the configured one, else the environment's; never one for loopback."""
    if route.proxy:
        return route.proxy
    url = httpx.URL(route.origin)
    if url.host in _LOOPBACK or urllib.request.proxy_bypass(url.host):
        return ""
    return urllib.request.getproxies().get(url.scheme, "")
