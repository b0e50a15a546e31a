"""The base of every adapter that speaks HTTP: exchanges on the data path, control calls, health.

An adapter for an engine with a tongue of its own subclasses `HTTPAdapter` and translates::

    async def send(self, call):
        incoming = await self.exchange("POST", "/api/chat", orjson.dumps(theirs(call)), headers=call.headers,
                                       limits=call.limits)
        answer = await incoming.read_json()
        return Reply(body=orjson.dumps(ours(answer)), headers=incoming.headers)

For a stream it iterates ``incoming`` (pieces of bytes as they arrive) and gives ``close=incoming.aclose``. Whatever
goes wrong is already a `BackendError`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import attrs
import httpx
import orjson

from kvfleet.adapters import faults
from kvfleet.adapters.base import EndpointHealth, InferenceAdapter
from kvfleet.adapters.call import Limits
from kvfleet.adapters.connections import Connections, Route
from kvfleet.adapters.control import MAX_CONTROL_BYTES, answer_within
from kvfleet.adapters.incoming import MAX_BODY_BYTES, Incoming, Source, parsed, send_timed
from kvfleet.adapters.transport import Origin, Payload, PooledTransport
from kvfleet.config.fields import flag, secret
from kvfleet.errors import BackendError, ComponentError

__all__ = ["HTTPAdapter"]

MAX_ERROR_BYTES = 64 * 1024
HEALTH_TTL_S = 5.0
_CREDENTIAL = re.compile(r"auth|key|token|secret|cookie", re.IGNORECASE)

# What a caller's header may never set: the credential, the framing, and what belongs to one hop (RFC 9110, 7.6.1).
_NOT_PASSED = frozenset(
    {
        *("authorization", "api-key", "x-api-key", "cookie", "proxy-authenticate", "proxy-authorization"),
        *("host", "content-length", "content-type", "content-encoding", "accept", "accept-encoding", "expect"),
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)


@attrs.define(kw_only=True)
class HTTPAdapter(InferenceAdapter):
    """Speaks HTTP to one model on one endpoint."""

    http2: bool = flag(doc="Speak HTTP/2 to the engine; needs kvfleet[http2].")
    proxy: str = secret(doc="URL of a proxy on the way to the engine; the environment's (`HTTPS_PROXY`) if empty.")
    _own: Connections | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _route: Route = attrs.field(init=False, repr=False, eq=False)
    _base: httpx.URL = attrs.field(init=False, repr=False, eq=False)
    _origin: Origin = attrs.field(init=False, repr=False, eq=False)
    _urls: dict[str, httpx.URL] = attrs.field(init=False, factory=dict, repr=False, eq=False)
    _heads: dict[tuple[str, str], bytes] = attrs.field(init=False, factory=dict, repr=False, eq=False)
    _fixed: tuple[tuple[bytes, bytes], ...] = attrs.field(init=False, repr=False, eq=False)
    _fixed_names: frozenset[str] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Prepare what is the same for every call.

        Raises:
            ComponentError: if the endpoint is no URL, or holds a credential.
        """
        self._base = _base_of(self.endpoint)
        origin = f"{self._base.scheme}://{self._base.netloc.decode('ascii')}"
        self._origin = (self._base.raw_scheme, self._base.raw_host, self._base.port)
        self._route = Route(origin, self.api_key, self.http2, self.proxy)
        own = {"host": self._base.netloc.decode("ascii"), "content-type": "application/json"}
        own |= {"accept-encoding": "identity", "user-agent": "kvfleet"}
        own |= {key.lower(): value for key, value in (*self.auth_headers().items(), *self.headers.items())}
        self._fixed_names = frozenset(own) | _NOT_PASSED
        self._fixed = tuple((key.encode("ascii"), value.encode("latin-1")) for key, value in own.items())

    # What a subclass may change

    def auth_headers(self) -> Mapping[str, str]:
        """Headers that carry the credential; ``Authorization: Bearer`` unless the engine wants it otherwise."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def error_of(self, status: int, headers: Mapping[str, str], body: bytes, *, received: bool = False) -> BackendError:
        """The error that a refusing answer stands for; engines with odd refusals add theirs."""
        has_credential = bool(self.api_key) or any(map(_CREDENTIAL.search, self.headers))
        return faults.from_answer(status, headers, body, received=received, has_credential=has_credential)

    # What a subclass uses

    @property
    def root(self) -> tuple[Route, str]:
        """What two adapters of one server have in common."""
        return self._route, self._base.path

    def shared_connections(self) -> Connections:
        """The connections given, or else the adapter's own, made now."""
        if self.connections is not None:
            shared: Connections = self.connections
            return shared
        if self._own is None:
            self._own = Connections()
        return self._own

    async def exchange(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: tuple[tuple[str, str], ...] = (),
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> Incoming:
        """One exchange on the data path, up to the answer's headers.

        Args:
            method: The HTTP method.
            path: The path under the endpoint; never a URL, so that the credential stays with its origin.
            body: The whole body, JSON unless `headers` of the adapter say otherwise.
            headers: The caller's headers; those that would replace ours, or belong to one hop, are left out.
            limits: Time limits; the one on the first byte holds up to the body's first byte.

        Raises:
            BackendError: if there is no answer, or a refusing one (its body is read and mapped by `error_of`).
        """
        connections = self.shared_connections()
        transport = connections.transport_for(self._route)
        sent = self._passed(headers)
        try:
            if isinstance(transport, PooledTransport):
                source: Source = await transport.send(
                    self._origin,
                    self._head(method, path, sent, len(body)),
                    body,
                    connect_s=limits.connect_s,
                    first_byte_s=limits.first_byte_s,
                    idle_s=limits.idle_s,
                )
            else:
                source = await send_timed(transport, self._request(method, path, sent, body), limits)
        except (httpx.HTTPError, TimeoutError) as error:
            raise faults.from_exception(error) from error
        incoming = Incoming(source, connections.event_bytes)
        if 200 <= incoming.status < 300:
            return incoming
        raise await self._refused(incoming)

    async def control(
        self,
        method: str,
        path: str,
        payload: Any = None,
        *,
        timeout_s: float = 5.0,
        limit_bytes: int = MAX_CONTROL_BYTES,
    ) -> httpx.Response:
        """One control call (health, metrics, lists), its body read, whatever its status.

        Raises:
            BackendError: if there is no answer, or one beyond the limit.
        """
        client = self.shared_connections().client_for(self._route)
        content = b"" if payload is None else orjson.dumps(payload)
        fixed = list(self._fixed)
        try:
            request = client.build_request(method, self._url(path), content=content, headers=fixed, timeout=timeout_s)
        except httpx.InvalidURL as error:
            raise faults.from_exception(error) from error
        return await answer_within(client, request, limit_bytes)

    async def control_json(self, method: str, path: str, payload: Any = None, *, timeout_s: float = 5.0) -> Any:
        """The same, for an answer that must be a JSON one of status 2xx.

        Raises:
            BackendError: if it is not.
        """
        response = await self.control(method, path, payload, timeout_s=timeout_s)
        if not response.is_success:
            raise self._refusal(response)
        return parsed(response.content, response.status_code)

    async def probe(self, *paths: str, timeout_s: float = 5.0) -> EndpointHealth:
        """Whether a control call is answered with 2xx; adapters of one endpoint share the finding for five seconds.

        Args:
            paths: Paths to ask, ``/health`` if none is given; the next one is asked if the backend refuses one (4xx).
            timeout_s: Longest wait for each.
        """
        asked = paths or ("/health",)
        key = ("probe", self.root, asked)
        found = await self.shared_connections().shared(key, HEALTH_TTL_S, lambda: self._probe(asked, timeout_s))
        return found if found.endpoint == self.endpoint else attrs.evolve(found, endpoint=self.endpoint)

    async def drain_kv_events(self) -> bytes:
        """See `InferenceAdapter.drain_kv_events`; at the path where TensorRT-LLM has them."""
        response = await self.control("POST", "/kv_cache_events", limit_bytes=MAX_BODY_BYTES)
        if not response.is_success:
            raise self._refusal(response)
        return response.content

    async def aclose(self) -> None:
        """Close the adapter's own connections; shared ones stay."""
        own, self._own = self._own, None
        if own is not None:
            await own.aclose()

    # Inner workings

    async def _probe(self, paths: tuple[str, ...], timeout_s: float) -> EndpointHealth:
        began_s = time.perf_counter()
        error = ""
        try:
            for path in paths:
                response = await self.control("GET", path, timeout_s=timeout_s)
                error = "" if response.is_success else self._refusal(response).message
                if not response.is_client_error:
                    break
        except BackendError as failed:
            error = failed.message
        took_ms = (time.perf_counter() - began_s) * 1000
        return EndpointHealth(endpoint=self.endpoint, healthy=not error, latency_ms=took_ms, error=error)

    def _refusal(self, response: httpx.Response) -> BackendError:
        return self.error_of(response.status_code, response.headers, response.content)

    def _url(self, path: str) -> httpx.URL:
        url = self._urls.get(path)
        if url is None:
            # raw_path cannot change the origin, whatever the path looks like
            url = self._urls[path] = self._base.copy_with(raw_path=(self._base.path.rstrip("/") + path).encode("ascii"))
        return url

    def _passed(self, headers: tuple[tuple[str, str], ...]) -> list[tuple[bytes, bytes]]:
        """The caller's headers that may go on."""
        ours = self._fixed_names
        return [
            (name.encode("ascii", "replace"), value.encode("latin-1", "replace"))
            for name, value in headers
            if name.lower() not in ours
        ]

    def _head(self, method: str, path: str, sent: list[tuple[bytes, bytes]], size: int) -> bytes:
        """The whole head as bytes; all of it but the caller's headers and the length is made once.

        Raises:
            httpx.LocalProtocolError: if one of the caller's headers would begin another line.
        """
        begin = self._heads.get((method, path))
        if begin is None:
            begin = self._heads[method, path] = self._beginning(method, path)
        lines = b"".join([b"%b: %b\r\n" % header for header in sent])
        if lines.count(b"\n") != len(sent) or lines.count(b"\r") != len(sent) or b"\0" in lines:
            raise httpx.LocalProtocolError("a request header holds a line break")
        return b"%b%bcontent-length: %d\r\n\r\n" % (begin, lines, size)

    def _beginning(self, method: str, path: str) -> bytes:
        lines = [b"%b %b HTTP/1.1" % (method.encode("ascii"), self._url(path).raw_path)]
        lines += [b"%b: %b" % header for header in self._fixed]
        if any(b"\n" in line or b"\r" in line or b"\0" in line for line in lines):
            raise httpx.LocalProtocolError("a request header holds a line break")
        return b"\r\n".join(lines) + b"\r\n"

    def _request(self, method: str, path: str, sent: list[tuple[bytes, bytes]], body: bytes) -> httpx.Request:
        """The same as httpx has it, for its transports."""
        headers = [*self._fixed, *sent, (b"content-length", b"%d" % len(body))]
        return httpx.Request(method, self._url(path), headers=headers, stream=Payload(body))

    async def _refused(self, incoming: Incoming) -> BackendError:
        """Read a refusal's body as far as it goes; a broken one does not hide the refusal itself."""
        try:
            body = await incoming.read(MAX_ERROR_BYTES)
        except BackendError:
            body = b""
        return self.error_of(incoming.status, incoming.headers, body)


def _base_of(endpoint: str) -> httpx.URL:
    try:
        base = httpx.URL(endpoint.partition("#")[0].rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise ComponentError(f"the endpoint is no URL: {error}") from error
    if base.scheme not in ("http", "https"):
        raise ComponentError("an http:// or https:// endpoint is needed")
    if base.userinfo:  # it would be in every trace and metric that names the replica
        raise ComponentError("an endpoint must not hold a user or a password; use api_key or custom_headers")
    return base
