"""Shared connections: who shares what, on which event loop, and for how long."""

from __future__ import annotations

import asyncio
import importlib.util
import threading

import httpx
import pytest

from kvfleet.adapters.connections import Connections, Route
from kvfleet.adapters.transport import PooledTransport
from kvfleet.clock import FrozenClock
from kvfleet.errors import ComponentError
from tests.adapters.scripted import answering, engine, whole

HELLO = whole(b"hello")
ROUTE = Route("http://gpu-1:8000", "key")


async def test_one_transport_for_each_route() -> None:
    """Adapters of one origin and credential share connections; another credential, or another origin, gets its own."""
    connections = Connections()
    first = connections.transport_for(ROUTE)
    assert isinstance(first, PooledTransport)
    assert connections.transport_for(Route("http://gpu-1:8000", "key")) is first
    assert connections.transport_for(Route("http://gpu-1:8000", "other")) is not first
    assert connections.transport_for(Route("http://gpu-2:8000", "key")) is not first
    assert connections.client_for(ROUTE) is connections.client_for(ROUTE)
    await connections.aclose()
    await connections.aclose()


def test_a_route_does_not_show_its_credential() -> None:
    """Neither key nor proxy password is in the repr."""
    assert repr(Route("http://x", "SECRET", proxy="http://u:SECRET@p")) == "Route(origin='http://x', http2=False)"


async def test_a_proxy_or_http2_takes_the_ordinary_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the lean transport does not speak goes through httpx's own: configured, or from the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    connections = Connections()
    configured = connections.transport_for(Route("http://a", proxy="http://127.0.0.1:3128"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    proxied = connections.transport_for(Route("https://api.example"))
    assert isinstance(configured, httpx.AsyncHTTPTransport)
    assert isinstance(proxied, httpx.AsyncHTTPTransport)
    for direct in ("http://api.example", "https://inside.example", "https://127.0.0.1:8000", "https://localhost"):
        assert isinstance(connections.transport_for(Route(direct)), PooledTransport)
    await connections.aclose()


@pytest.mark.skipif(importlib.util.find_spec("h2") is not None, reason="h2 is installed")
async def test_http2_says_what_it_needs() -> None:
    """Without the extra, the error names the line that installs it."""
    with pytest.raises(ComponentError, match=r"pip install 'kvfleet\[http2\]'"):
        Connections().transport_for(Route("https://a", http2=True))


def test_two_loops_at_a_time_do_not_meet() -> None:
    """One `Connections` used from two event loops in two threads: each keeps to its own, closing closes both."""
    ready = threading.Barrier(2, timeout=10)
    done = threading.Event()
    found: list[tuple[httpx.AsyncBaseTransport, httpx.AsyncClient]] = []
    connections = Connections()

    async def use(*, closes: bool) -> None:
        async with engine(answering(HELLO)) as at:
            route = Route(at.url)
            transport = connections.transport_for(route)
            for _ in range(3):
                response = await transport.handle_async_request(httpx.Request("GET", at.url))
                assert await response.aread() == b"hello"
            found.append((transport, connections.client_for(route)))
            await asyncio.to_thread(ready.wait)
            if closes:
                await connections.aclose()
                done.set()
            else:
                await asyncio.to_thread(done.wait, 10)
            assert transport.state == {"free": 0, "busy": 0}  # type: ignore[attr-defined]
            assert len(at.wires) == 1

    other = threading.Thread(target=lambda: asyncio.run(use(closes=False)))
    other.start()
    asyncio.run(use(closes=True))
    other.join(10)
    assert len(found) == 2
    assert found[0][0] is not found[1][0]
    assert found[0][1].is_closed
    assert found[1][1].is_closed


def test_one_loop_after_the_other() -> None:
    """The same object works in a second event loop after the first one has gone."""
    connections = Connections()

    async def use() -> int:
        async with engine(answering(HELLO)) as at:
            response = await connections.transport_for(Route(at.url)).handle_async_request(httpx.Request("GET", at.url))
            await response.aread()
            await connections.aclose()
            return response.status_code

    assert asyncio.run(use()) == asyncio.run(use()) == 200


async def test_shared_is_made_once_for_a_while() -> None:
    """Callers at the same time get one result, later ones too until it is too old."""
    clock = FrozenClock()
    connections = Connections(clock=clock)
    made = 0

    async def make() -> int:
        nonlocal made
        made += 1
        await asyncio.sleep(0)
        return made

    async def get() -> int:
        return await connections.shared("key", 5.0, make)

    assert await asyncio.gather(get(), get(), get()) == [1, 1, 1]
    clock.advance(4.9)
    assert await get() == 1
    clock.advance(0.2)
    assert await get() == 2
    assert await connections.shared("other", 5.0, make) == 3


async def test_a_failed_turn_is_taken_by_the_next() -> None:
    """An error, or a caller that left, concerns that caller alone: whoever waited tries for itself."""
    connections = Connections(clock=FrozenClock())
    started = asyncio.Event()
    tries = 0

    async def make() -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            started.set()
            await asyncio.Event().wait()
        if tries == 2:
            raise ValueError("no")
        return "made"

    def get() -> asyncio.Task[str]:
        return asyncio.ensure_future(connections.shared("key", 5.0, make))

    left, failed, lucky = get(), get(), get()
    await started.wait()
    left.cancel()
    results = await asyncio.gather(left, failed, lucky, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert isinstance(results[1], ValueError)
    assert results[2] == "made"


async def test_control_calls_share_the_connections() -> None:
    """Reading a replica's load keeps a connection warm for the data path."""
    async with engine(answering(HELLO)) as at:
        connections = Connections()
        client = connections.client_for(Route(at.url))
        for _ in range(3):
            assert (await client.get("/metrics")).text == "hello"
        request = httpx.Request("GET", at.url)
        response = await connections.transport_for(Route(at.url)).handle_async_request(request)
        assert await response.aread() == b"hello"
        assert len(at.wires) == 1
        assert at.requests[0].path == "/metrics"
        await connections.aclose()


async def test_a_mock_transport_takes_everything() -> None:
    """The seam for tests: data and control calls both go through the transport given."""
    mock = httpx.MockTransport(lambda request: httpx.Response(200, text=request.url.host))
    connections = Connections(transport=mock)
    assert connections.transport_for(ROUTE) is mock
    assert (await connections.client_for(ROUTE).get("/x")).text == "gpu-1"
    await connections.aclose()
