"""The base of the adapters that speak HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import attrs
import httpx
import pytest

from kvfleet.adapters.base import EndpointHealth
from kvfleet.adapters.call import Call, Limits, Reply
from kvfleet.adapters.connections import Connections
from kvfleet.adapters.control import MAX_CONTROL_BYTES
from kvfleet.adapters.http import HTTPAdapter
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, ComponentError, Fault
from tests.adapters.scripted import STREAM_HEAD, Request, Wire, answering, chunk, engine, whole


@attrs.define(kw_only=True)
class Plain(HTTPAdapter):
    """The least of an adapter."""

    async def send(self, call: Call) -> Reply:
        raise NotImplementedError

    async def health_check(self) -> EndpointHealth:
        return await self.probe()


Handler = Callable[[httpx.Request], httpx.Response]


def plain(handler: Handler, endpoint: str = "http://gpu-1:8000", **options: object) -> Plain:
    """An adapter whose network is a function."""
    connections = Connections(transport=httpx.MockTransport(handler), clock=FrozenClock())
    return Plain(endpoint=endpoint, model_id="m", connections=connections, **options)  # type: ignore[arg-type]


async def sent(endpoint: str, passed: tuple[tuple[str, str], ...] = (), **options: object) -> httpx.Request:
    """The request that one exchange sends."""
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={})

    await plain(handler, endpoint, **options).exchange("POST", "/v1/chat/completions", b"{}", headers=passed)
    return seen[0]


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://gpu-1:8000", "http://gpu-1:8000/v1/chat/completions"),
        ("http://gpu-1:8000/", "http://gpu-1:8000/v1/chat/completions"),
        ("http://gpu-1:8000/v1", "http://gpu-1:8000/v1/chat/completions"),
        ("http://gpu-1:8000/v1/", "http://gpu-1:8000/v1/chat/completions"),
        ("https://host/team/v1", "https://host/team/v1/chat/completions"),
        ("http://[::1]:8000", "http://[::1]:8000/v1/chat/completions"),
    ],
)
async def test_endpoints_with_and_without_v1(endpoint: str, url: str) -> None:
    """An endpoint may be written in any of the usual ways."""
    assert str((await sent(endpoint)).url) == url


async def test_the_fixed_headers() -> None:
    """Host, type, length and the credential; nothing is to be compressed."""
    request = await sent("http://gpu-1:8000", passed=(("traceparent", "00-1"),), api_key="SECRET")
    assert dict(request.headers) == {
        "host": "gpu-1:8000",
        "content-type": "application/json",
        "accept-encoding": "identity",
        "user-agent": "kvfleet",
        "authorization": "Bearer SECRET",
        "traceparent": "00-1",
        "content-length": "2",
    }


@pytest.mark.parametrize(
    "name",
    [
        "authorization",
        "Authorization",
        "HOST",
        "content-length",
        "Transfer-Encoding",
        "connection",
        "Upgrade",
        "te",
        "cookie",
        "x-api-key",
        "api-key",
        "proxy-authorization",
        "accept-encoding",
        "expect",
        "X-Team",
    ],
)
async def test_passed_headers_never_replace_ours(name: str) -> None:
    """A caller's header overrides neither the credential nor the framing, and none that the operator set."""
    ours = await sent("http://gpu-1:8000", api_key="SECRET", headers={"X-Team": "ml"})
    theirs = await sent("http://gpu-1:8000", ((name, "evil"),), api_key="SECRET", headers={"X-Team": "ml"})
    assert theirs.headers.raw == ours.headers.raw


async def test_the_operators_headers_win() -> None:
    """A header set in the configuration may replace the usual credential."""
    request = await sent("http://gpu-1:8000", api_key="SECRET", headers={"Authorization": "Token x", "api-key": "y"})
    assert (request.headers["authorization"], request.headers["api-key"]) == ("Token x", "y")


@pytest.mark.parametrize("path", ["//evil.example/x", "/@evil.example", "/..//evil", "/x?u=http://evil", "/\\evil"])
async def test_a_path_cannot_leave_its_origin(path: str) -> None:
    """Whatever a path looks like, the call and its credential stay with the endpoint's origin."""
    hosts: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.netloc.decode())
        return httpx.Response(200, json={})

    adapter = plain(handler, api_key="SECRET")
    await adapter.exchange("POST", path, b"{}")
    await adapter.control("GET", path)
    assert hosts == ["gpu-1:8000", "gpu-1:8000"]


async def test_redirects_are_not_followed() -> None:
    """A redirect is an answer that makes no sense, and the key never reaches the other origin."""

    async def elsewhere(wire: Wire, asked: Request) -> None:
        raise AssertionError("reached")

    async with engine(elsewhere) as other:
        location = b"location: %b/v1/x\r\n" % other.url.encode()
        async with engine(answering(whole(b"", status="307 Temporary Redirect", headers=location))) as at:
            adapter = Plain(endpoint=at.url, api_key="SECRET")
            with pytest.raises(BackendError) as raised:
                await adapter.exchange("POST", "/v1/x", b"{}")
            assert raised.value.kind is Fault.PROTOCOL
            with pytest.raises(BackendError):
                await adapter.control_json("GET", "/v1/x")
            assert other.requests == []
            await adapter.aclose()


def test_nothing_secret_is_shown() -> None:
    """The adapter's repr has neither key nor headers."""
    adapter = Plain(endpoint="http://x", api_key="SECRET", headers={"x": "SECRET"}, proxy="http://u:SECRET@p")
    assert "SECRET" not in repr(adapter)


@pytest.mark.parametrize("endpoint", ["http://user:SECRET@gpu-1:8000", "http://gpu-1:80x"])
def test_bad_endpoints(endpoint: str) -> None:
    """An endpoint that is no URL, or holds a credential, is refused; the credential is not repeated."""
    with pytest.raises(ComponentError) as raised:
        Plain(endpoint=endpoint)
    assert "SECRET" not in str(raised.value)


async def test_from_config_takes_shared_connections() -> None:
    """A router hands its connections on; such an adapter closes none of them."""
    connections = Connections()
    model = ModelConfig(
        name="m", endpoint="http://gpu-1:8000", api_key="k", timeout_seconds=7, custom_headers={"a": "b"}
    )
    adapter = Plain.from_config(model, connections=connections, http2=False)
    assert adapter.shared_connections() is connections
    assert (adapter.timeout, adapter.api_key, adapter.headers) == (7, "k", {"a": "b"})
    transport = connections.transport_for(adapter.root[0])
    await adapter.aclose()
    assert connections.transport_for(adapter.root[0]) is transport
    await connections.aclose()


async def test_own_connections_are_made_and_closed() -> None:
    """An adapter used alone makes its connections when first used, closes them, and may be used again."""
    async with engine(answering(whole(b"{}"))) as at:
        adapter = Plain(endpoint=at.url)
        for count in (1, 2):
            incoming = await adapter.exchange("POST", "/x", b"{}")
            assert await incoming.read_json() == {}
            assert len(at.wires) == count
            await adapter.close()
            await adapter.aclose()
            await at.wires[-1].gone.wait()


async def test_a_refusal_is_read_and_mapped() -> None:
    """A status outside 2xx is an error with the backend's words, and its connection is kept."""
    body = b'{"error":{"message":"bad","type":"t","param":"n","code":"c"}}'
    async with engine(answering(whole(body, status="400 Bad Request"))) as at:
        adapter = Plain(endpoint=at.url)
        for _ in range(2):
            with pytest.raises(BackendError) as raised:
                await adapter.exchange("POST", "/x", b"{}")
            assert (raised.value.kind, raised.value.status) == (Fault.BAD_REQUEST, 400)
            assert raised.value.body == {"message": "bad", "type": "t", "param": "n", "code": "c"}
        assert len(at.wires) == 1
        await adapter.aclose()


async def test_a_broken_refusal_is_still_one() -> None:
    """The status counts, even if the body behind it is cut off."""
    answer = b"HTTP/1.1 503 Busy\r\nretry-after: 3\r\ncontent-length: 100\r\n\r\n{"
    async with engine(answering(answer, close=True)) as at:
        adapter = Plain(endpoint=at.url)
        with pytest.raises(BackendError) as raised:
            await adapter.exchange("POST", "/x", b"{}")
        assert (raised.value.kind, raised.value.retry_after_s) == (Fault.OVERLOADED, 3.0)
        await adapter.aclose()


async def test_a_body_breaks_off() -> None:
    """A cut body is a disconnect amid the answer."""
    async with engine(answering(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", close=True)) as at:
        adapter = Plain(endpoint=at.url)
        incoming = await adapter.exchange("POST", "/x", b"{}")
        with pytest.raises(BackendError) as raised:
            await incoming.read_json()
        assert (raised.value.kind, raised.value.received) == (Fault.DISCONNECTED, True)
        await adapter.aclose()


async def test_a_body_has_a_limit() -> None:
    """An answer beyond the limit is refused, and its connection closed."""
    async with engine(answering(whole(b"x" * 5000))) as at:
        adapter = Plain(endpoint=at.url)
        incoming = await adapter.exchange("POST", "/x", b"{}")
        with pytest.raises(BackendError) as raised:
            await incoming.read(limit_bytes=1000)
        assert raised.value.kind is Fault.PROTOCOL
        await adapter.aclose()


async def test_limits_reach_the_wire() -> None:
    """First byte and silence have limits of their own, and their own faults."""

    async def script(wire: Wire, asked: Request) -> None:
        if asked.path == "/late":
            wire.send(STREAM_HEAD, chunk(b"x"))
        await wire.gone.wait()

    async with engine(script) as at:
        adapter = Plain(endpoint=at.url)
        limits = Limits(first_byte_s=0.05, idle_s=0.05)
        with pytest.raises(BackendError) as raised:
            await adapter.exchange("POST", "/never", b"{}", limits=limits)
        assert (raised.value.kind, raised.value.received) == (Fault.TIMEOUT, False)
        incoming = await adapter.exchange("POST", "/late", b"{}", limits=limits)
        assert await anext(incoming) == b"x"
        with pytest.raises(BackendError) as raised:
            await anext(incoming)
        assert (raised.value.kind, raised.value.received) == (Fault.IDLE_TIMEOUT, True)
        await adapter.aclose()


async def test_limits_hold_over_any_transport() -> None:
    """A transport that knows one limit for all reads is held to both from outside."""
    gate = asyncio.Event()

    class Slow(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path == "/never":
                await gate.wait()
            return httpx.Response(200, stream=Two())

    class Two(httpx.AsyncByteStream):
        async def __aiter__(self):  # type: ignore[no-untyped-def] # noqa: ANN204
            yield b"x"
            await gate.wait()

    adapter = Plain(endpoint="http://x", connections=Connections(transport=Slow()))
    limits = Limits(first_byte_s=0.03, idle_s=0.03)
    with pytest.raises(BackendError) as raised:
        await adapter.exchange("POST", "/never", b"{}", limits=limits)
    assert raised.value.kind is Fault.TIMEOUT
    incoming = await adapter.exchange("POST", "/two", b"{}", limits=limits)
    assert await anext(incoming) == b"x"
    with pytest.raises(BackendError) as raised:
        await anext(incoming)
    assert raised.value.kind is Fault.IDLE_TIMEOUT


async def test_a_call_that_was_ended_says_so() -> None:
    """Whoever waits for the next piece while another ends the call learns that it was ended, not that it broke."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD, chunk(b"x"))
        await wire.gone.wait()

    async with engine(script) as at:
        adapter = Plain(endpoint=at.url)
        incoming = await adapter.exchange("POST", "/x", b"{}")
        assert await anext(incoming) == b"x"
        waiting = asyncio.ensure_future(anext(incoming))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await incoming.aclose()
        with pytest.raises(BackendError) as raised:
            await waiting
        assert raised.value.kind is Fault.CANCELLED
        await adapter.aclose()


async def test_a_repeat_is_reported() -> None:
    """An exchange that met a stale connection says that it was sent twice."""

    async def script(wire: Wire, asked: Request) -> None:
        if len(at.requests) == 2:
            wire.reset()
        else:
            wire.send(whole(b"{}"))

    async with engine(script) as at:
        adapter = Plain(endpoint=at.url)
        repeats = []
        for _ in range(2):
            incoming = await adapter.exchange("POST", "/x", b"{}")
            await incoming.read()
            repeats.append(incoming.is_repeat)
        assert repeats == [False, True]
        await adapter.aclose()


async def test_probe_is_shared_for_a_while() -> None:
    """Models of one endpoint ask it once in five seconds, each under its own name for the endpoint."""
    asked = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        return httpx.Response(200)

    first = plain(handler)
    clock = first.connections.clock
    second = Plain(endpoint="http://gpu-1:8000/v1", model_id="n", connections=first.connections)
    found = await asyncio.gather(first.health_check(), second.health_check())
    assert [(each.endpoint, each.healthy, each.error) for each in found] == [
        ("http://gpu-1:8000", True, ""),
        ("http://gpu-1:8000/v1", True, ""),
    ]
    assert asked == 1
    clock.advance(5.1)
    await first.health_check()
    assert asked == 2


@pytest.mark.parametrize(
    ("statuses", "healthy", "asked"),
    [
        ({"/health": 200}, True, ["/health"]),
        ({"/health": 404, "/v1/models": 200}, True, ["/health", "/v1/models"]),
        ({"/health": 503}, False, ["/health"]),
        ({"/health": 404, "/v1/models": 401}, False, ["/health", "/v1/models"]),
    ],
)
async def test_probe_goes_on_where_a_path_is_refused(statuses: dict[str, int], healthy: bool, asked: list[str]) -> None:
    """The next path is asked only if the backend refuses the one before; a sick engine is sick at once."""
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        return httpx.Response(statuses[request.url.path])

    found = await plain(handler).probe("/health", "/v1/models")
    assert (found.healthy, seen) == (healthy, asked)
    assert bool(found.error) is not healthy


async def test_probe_never_raises() -> None:
    """An engine that is not there is unhealthy, and the reason names no address."""
    async with engine(answering(b"")) as at:
        url = at.url
    adapter = Plain(endpoint=url)
    found = await adapter.health_check()
    assert (found.healthy, found.error) == (False, "the backend cannot be reached")
    await adapter.aclose()


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (httpx.Response(200, text="<html>"), Fault.PROTOCOL),
        (httpx.Response(404, json={}), Fault.NOT_FOUND),
        (httpx.Response(500, text="boom"), Fault.SERVER_ERROR),
    ],
)
async def test_control_json_wants_json(response: httpx.Response, kind: Fault) -> None:
    """A control call that must be JSON raises for anything else."""
    with pytest.raises(BackendError) as raised:
        await plain(lambda _: response).control_json("GET", "/x")
    assert raised.value.kind is kind


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "was sent none"),
        ({"headers": {"x-kind": "a"}}, "was sent none"),
        ({"api_key": "sk-x"}, "refused kvfleet's"),
        ({"headers": {"X-Auth": "a"}}, "refused kvfleet's"),
    ],
)
async def test_a_refusal_says_whether_there_was_a_credential(options: dict[str, Any], says: str) -> None:
    """A key of the model's, or a header of the operator's that carries one."""
    async with engine(answering(whole(b"{}", status="401 Unauthorized"))) as at:
        adapter = Plain(endpoint=at.url, **options)
        with pytest.raises(BackendError, match=says):
            await adapter.exchange("POST", "/x", b"{}")
        found = await adapter.probe()
        assert says in found.error
        await adapter.aclose()


async def test_a_control_call_has_a_limit() -> None:
    """A page without end is left, and its connection closed; what is within the limit is read."""

    async def endless(wire: Wire, request: Request) -> None:
        del request
        wire.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not wire.gone.is_set():
            wire.send(chunk(b"a_metric 1\n" * 10_000))
            await asyncio.sleep(0)

    async with engine(endless) as at:
        adapter = Plain(endpoint=at.url)
        with pytest.raises(BackendError) as raised:
            await adapter.control("GET", "/metrics")
        assert (raised.value.kind, str(raised.value)) == (
            Fault.PROTOCOL,
            f"the backend's answer is longer than {MAX_CONTROL_BYTES} bytes",
        )
        assert not (await adapter.probe()).healthy
        await asyncio.gather(*(wire.gone.wait() for wire in at.wires))
        await adapter.aclose()
    async with engine(answering(whole(b"x" * 1_000_000))) as at:
        adapter = Plain(endpoint=at.url)
        for _ in range(2):
            assert len((await adapter.control("GET", "/metrics")).content) == 1_000_000
        assert len(at.wires) == 1
        await adapter.aclose()
