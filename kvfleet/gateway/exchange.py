"""One HTTP request and its answer, over ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import attrs
import orjson

from kvfleet.errors import BadRequestError
from kvfleet.gateway.headers import Headers

__all__ = ["ClientLeftError", "Exchange", "Pairs", "Presence", "Receive", "Send"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Pairs = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")


class ClientLeftError(Exception):
    """The client closed its connection before its request was whole."""


@attrs.define
class Exchange:
    """What a handler gets.

    Attributes:
        path: The requested path, percent-decoded.
        headers: The headers that are looked at.
        request_id: The request's identifier; it stands on every answer.
        receive, send: ASGI's.
        common: Headers of every answer to this request.
        caller: The name of the key the request came with.
        status: Of the answer, once it has begun; 0 before.
    """

    path: str
    headers: Headers
    request_id: str
    receive: Receive
    send: Send
    common: Pairs
    caller: str = ""
    status: int = 0

    async def start(self, status: int, headers: Pairs) -> None:
        """Send the status and the headers."""
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": [*headers, *self.common]})

    async def whole(self, status: int, body: bytes, headers: Pairs) -> None:
        """Send a whole answer; `headers` say its type."""
        await self.start(status, [(b"content-length", b"%d" % len(body)), *headers])
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def json(self, status: int, data: Any, headers: Pairs | None = None) -> None:
        """Send data as JSON."""
        await self.whole(status, orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS), [JSON, *(headers or [])])

    async def piece(self, body: bytes) -> None:
        """Send a piece of a streamed answer; waits while the client does not read."""
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        """End a streamed answer."""
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def body(self, limit: int) -> bytes:
        """The request's body.

        Args:
            limit: Most bytes; what is announced as longer is not read at all.

        Raises:
            BadRequestError: 413 if it is longer, 415 if it is compressed.
            ClientLeftError: if the client left.
        """
        headers = self.headers
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise BadRequestError(
                "compressed request bodies are not accepted", status=415, code="unsupported_content_encoding"
            )
        announced = headers.get(b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            body = await self._rest(body, limit)
        if len(body) > limit:
            raise _too_large(limit)
        return body

    async def _rest(self, first: bytes, limit: int) -> bytes:
        parts, size, more = [first], len(first), True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            more = message.get("more_body", False)
            if size > limit:
                raise _too_large(limit)
        return b"".join(parts)


def _too_large(limit: int) -> BadRequestError:
    return BadRequestError(f"the request body is larger than {limit} bytes", status=413, code="body_too_large")


@attrs.define
class Presence:
    """Cancels the task that serves a client as soon as the client has left.

    A server tells an ASGI application of a departure only while something awaits ``receive()``; so something does, from
    the end of the request's body to the end of the answer. Without it every engine would finish what nobody reads.
    asyncio's own task is used: it costs 4 µs, an anyio task group 24.
    """

    has_left: bool = attrs.field(init=False, default=False)
    _served: asyncio.Task[Any] = attrs.field(init=False, repr=False)
    _watcher: asyncio.Task[None] = attrs.field(init=False, repr=False)

    def watch(self, receive: Receive) -> None:
        """Watch over the current task."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - called from a coroutine
        self._served = task
        self._watcher = asyncio.get_running_loop().create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.has_left = True
        self._served.cancel()

    def forgive(self) -> None:
        """Take the cancellation back, once it has been dealt with."""
        self._served.uncancel()

    def stop(self) -> None:
        """Stop watching; safe twice. Needed before an answer's end, which ASGI reports like a departure."""
        self._watcher.cancel()
