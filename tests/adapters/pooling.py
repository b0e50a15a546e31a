"""A pooled transport to test with, and one exchange over it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import httpx

from kvfleet.adapters.transport import PooledTransport
from tests.adapters.scripted import Engine, whole

HELLO = whole(b"hello")
LIMITS = {"connect": 5.0, "first_byte": 5.0, "read": 5.0}


@contextlib.asynccontextmanager
async def pooled(**options: object) -> AsyncIterator[PooledTransport]:
    """A transport that is closed at the end."""
    transport = PooledTransport(**options)  # type: ignore[arg-type]
    try:
        yield transport
    finally:
        await transport.aclose()


def request(at: Engine, *, body: bytes = b"", method: str = "POST", **limits: float) -> httpx.Request:
    """A request with generous limits."""
    extensions = {"timeout": {**LIMITS, **limits}}
    return httpx.Request(method, at.url + "/v1/x?y=1", content=body, extensions=extensions)


async def ask(transport: PooledTransport, at: Engine, **options: float) -> tuple[httpx.Response, bytes]:
    """One whole exchange."""
    response = await transport.handle_async_request(request(at, **options))
    return response, b"".join([piece async for piece in response.stream])  # type: ignore[union-attr]
