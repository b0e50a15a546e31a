"""Control calls (health, metrics, lists): one answer, read whole, within a size and a time."""

from __future__ import annotations

import asyncio

import httpx

from kvfleet.adapters import faults
from kvfleet.errors import BackendError, Fault

__all__ = ["MAX_CONTROL_BYTES", "answer_within"]

MAX_CONTROL_BYTES = 8 * 1024 * 1024
_LONGEST_S = 20.0
_OF_THE_WIRE = frozenset({"content-encoding", "content-length", "transfer-encoding"})


async def answer_within(
    client: httpx.AsyncClient, request: httpx.Request, limit_bytes: int = MAX_CONTROL_BYTES
) -> httpx.Response:
    """The answer to a request, its body read, whatever its status.

    Args:
        client: Sends it.
        request: With the time limits of each step; the whole may take 20 s, so that one that trickles ends too.
        limit_bytes: Longest body.

    Raises:
        BackendError: if there is none, or it is longer or takes longer than that.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(_LONGEST_S):
            response = await client.send(request, stream=True)
            try:
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > limit_bytes:
                        raise BackendError(Fault.PROTOCOL, f"the backend's answer is longer than {limit_bytes} bytes")
            finally:
                await response.aclose()
    except (httpx.HTTPError, TimeoutError) as error:
        raise faults.from_exception(error) from error
    headers = [(name, value) for name, value in response.headers.items() if name not in _OF_THE_WIRE]
    return httpx.Response(response.status_code, headers=headers, content=bytes(body), request=request)
