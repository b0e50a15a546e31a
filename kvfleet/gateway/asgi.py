"""The gateway under a server of somebody else's: the same exchanges, over ASGI (https://asgi.readthedocs.io)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import attrs

from kvfleet.gateway.exchange import ClientLeftError, Exchange, Pairs, check_announced, too_large

__all__ = ["ASGIExchange", "Message", "Receive", "Send", "live"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@attrs.define(eq=False)
class ASGIExchange(Exchange):
    """One request of an ASGI server.

    A server tells an ASGI application of a departure only while something awaits ``receive()``; so something does, from
    the end of the request's body to the end of the answer, if the client is to be watched.
    """

    receive: Receive
    send: Send
    _watcher: asyncio.Task[None] | None = attrs.field(init=False, default=None, repr=False)

    @classmethod
    def of(cls, scope: Message, receive: Receive, send: Send) -> ASGIExchange:
        """The exchange of one call of the application."""
        return cls(scope["method"], scope["path"], scope["headers"], receive, send)

    async def body(self, limit: int) -> bytes:
        """See `Exchange.body`."""
        check_announced(self.headers, limit)
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            more = message.get("more_body", False)
            if size > limit:
                raise too_large(limit)
        return b"".join(parts)

    async def start(self, status: int, headers: Pairs) -> None:
        """See `Exchange.start`."""
        self.status = status
        ours = [*self.common, (b"connection", b"close")] if self.closes else self.common
        await self.send({"type": "http.response.start", "status": status, "headers": [*headers, *ours]})

    async def whole(self, status: int, body: bytes, headers: Pairs) -> None:
        """See `Exchange.whole`."""
        await self.start(status, [(b"content-length", b"%d" % len(body)), *headers])
        await self.end(body)

    async def piece(self, body: bytes) -> None:
        """See `Exchange.piece`."""
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        """See `Exchange.end`."""
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def watch(self) -> None:
        """See `Exchange.watch`."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - called from a coroutine
        self._watcher = asyncio.get_running_loop().create_task(self._watch(task))

    async def _watch(self, served: asyncio.Task[Any]) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.has_left = True
        served.cancel()

    def unwatch(self) -> None:
        """See `Exchange.unwatch`."""
        if self._watcher is not None:
            self._watcher.cancel()

    def finish(self) -> None:
        """See `Exchange.finish`; an ASGI server does that by itself."""
        self.unwatch()


async def live(
    receive: Receive, send: Send, start: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]
) -> None:
    """Take part in a server's start and stop, by ASGI's lifespan protocol."""
    await receive()
    try:
        await start()
    except Exception as error:  # noqa: BLE001 - the server must learn of any failure, and why
        await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
        return
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await stop()
    await send({"type": "lifespan.shutdown.complete"})
