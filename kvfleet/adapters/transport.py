"""The data path's transport (under construction: httpx's own for now)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

__all__ = ["Payload", "PooledTransport"]


class Payload(httpx.AsyncByteStream):
    """A request body that is there as a whole."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.data


class PooledTransport(httpx.AsyncHTTPTransport):
    """Placeholder of the pooled transport."""

    def __init__(self, *, idle_s: float = 30.0) -> None:
        super().__init__(trust_env=False, limits=httpx.Limits(keepalive_expiry=idle_s))
