"""A client that calls an ASGI application directly, and can leave at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import orjson


@attrs.define
class Answer:
    """What came back, as far as it came."""

    status: int = 0
    headers: list[tuple[str, str]] = attrs.field(factory=list)
    pieces: list[bytes] = attrs.field(factory=list)
    is_complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


@attrs.define
class Client:
    """One request to an application.

    Attributes:
        leave: Set it, and the client has left.
        answer: Grows as the application sends.
    """

    app: Any
    leave: asyncio.Event = attrs.field(factory=asyncio.Event)
    answer: Answer = attrs.field(factory=Answer)
    received: asyncio.Condition = attrs.field(factory=asyncio.Condition)
    _pieces: list[bytes] = attrs.field(factory=list)

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        pieces: Sequence[bytes] | None = None,
    ) -> Answer:
        """Make the request; returns when the application returns."""
        if pieces is None:
            pieces = [body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)]
        self._pieces = list(pieces)
        pairs = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in pairs],
        }
        await self.app(scope, self._receive, self._send)
        return self.answer

    async def _receive(self) -> dict[str, Any]:
        if self._pieces and not self.leave.is_set():
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
        if not self.answer.is_complete:
            await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        answer = self.answer
        assert not answer.is_complete, "sent something after the end"
        if message["type"] == "http.response.start":
            assert not answer.status, "two answers to one request"
            answer.status = message["status"]
            answer.headers = [(k.decode(), v.decode("latin-1")) for k, v in message["headers"]]
        else:
            answer.pieces.append(message.get("body", b""))
            answer.is_complete = not message.get("more_body", False)
        async with self.received:
            self.received.notify_all()

    async def until(self, pieces: int) -> None:
        """Wait until that many pieces have come."""
        async with self.received:
            await self.received.wait_for(lambda: len(self.answer.pieces) >= pieces)


async def call(app: Any, method: str, path: str, body: Any = None, **options: Any) -> Answer:
    """Make one request and wait for the answer."""
    return await Client(app).call(method, path, body, **options)
