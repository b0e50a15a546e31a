"""How a mock engine's answer goes wrong on the wire."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping

import orjson

from kvfleet.gateway.exchange import Pairs
from kvfleet.gateway.http_exchange import HTTPExchange
from kvfleet.mock.faults import FaultKind, FaultRule

__all__ = ["error_of", "instead", "spoil_stream", "spoil_whole"]

_JSON = (b"content-type", b"application/json")
_PAGE = b"<!doctype html><html><body><h1>502 Bad Gateway</h1></body></html>\n"
_JUNK = b"event\nid 17\ndata: {not JSON at all\n\n\x00\xff\n"
_TYPES: Mapping[int, str] = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}


def error_of(status: int, message: str = "injected fault", param: str | None = None) -> dict[str, object]:
    """An error object as vLLM's."""
    kind = _TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


async def instead(exchange: HTTPExchange, rule: FaultRule) -> bool:
    """What a fault does in place of an answer; False if the answer is to be made all the same."""
    if rule.kind is FaultKind.STATUS:
        headers: Pairs = []
        if rule.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % math.ceil(rule.retry_after_s)))
        await exchange.json(rule.status, error_of(rule.status), headers)
    elif rule.kind is FaultKind.WRONG_TYPE:
        await exchange.whole(200, _PAGE, [(b"content-type", b"text/html; charset=utf-8")])
    elif rule.kind is FaultKind.EMPTY_BODY:
        await exchange.whole(200, b"", [_JSON])
    elif rule.kind is FaultKind.NOT_HTTP:
        exchange.connection.write(b"SSH-2.0-nothing-you-know\r\n")
    elif rule.kind is FaultKind.RESET:
        exchange.connection.reset()
    elif rule.kind is FaultKind.SLOW_HEADERS:
        await asyncio.sleep(rule.wait_s)
        return False
    else:
        return rule.kind is FaultKind.HANG_UP
    return True


async def spoil_whole(exchange: HTTPExchange, rule: FaultRule, body: bytes) -> bool:
    """What a fault does to a whole answer; False if it does nothing to one."""
    half = body[: len(body) // 2]
    if rule.kind is FaultKind.TRUNCATED_JSON:
        await exchange.whole(200, half, [_JSON])
    elif rule.kind is FaultKind.ERROR_BODY:
        await exchange.json(200, error_of(rule.status))
    elif rule.kind is FaultKind.CUT:
        await exchange.start(200, [_JSON])
        await exchange.piece(half)
        _cut(exchange, rule)
    else:
        return False
    return True


async def spoil_stream(exchange: HTTPExchange, rule: FaultRule, events: AsyncIterator[bytes], spared: int) -> bool:
    """Relay a stream and let it go wrong; False if it is not to be ended.

    Args:
        exchange: Whose stream it is; its head has been sent.
        rule: The fault.
        events: The stream.
        spared: Events that come through before the fault.
    """
    if rule.kind is FaultKind.SLOW_FIRST_TOKEN:
        await exchange.piece(b": about to begin\n\n")
        await asyncio.sleep(rule.wait_s)
    count = 0
    async for event in events:
        if rule.kind is FaultKind.SLOW_TOKENS:
            await asyncio.sleep(rule.wait_s)
        if count == spared and not await _amid(exchange, rule, event):
            return rule.kind is not FaultKind.CUT
        count += 1
        await exchange.piece(event)
    return True


async def _amid(exchange: HTTPExchange, rule: FaultRule, event: bytes) -> bool:
    """What happens before one event of a stream; False if the stream ends with it."""
    if rule.kind is FaultKind.STALL:
        await asyncio.sleep(rule.wait_s)
    elif rule.kind is FaultKind.MALFORMED_SSE:
        await exchange.piece(_JUNK)
    elif rule.kind is FaultKind.CUT:
        _cut(exchange, rule)
        return False
    elif rule.kind is FaultKind.TRUNCATED_JSON:
        await exchange.piece(event[: len(event) // 2])
        return False
    elif rule.kind is FaultKind.ERROR_BODY:
        await exchange.piece(b"data: " + orjson.dumps(error_of(rule.status)) + b"\n\ndata: [DONE]\n\n")
        return False
    return rule.kind is not FaultKind.END_EARLY


def _cut(exchange: HTTPExchange, rule: FaultRule) -> None:
    """End the connection; the handler's return does, unless it is to be reset."""
    if rule.resets:
        exchange.connection.reset()
