"""Inference calls of a mock engine: a body in, an answer or a stream out, and faults where one was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from kvfleet.adapters.call import Call, Limits, Operation, Reply
from kvfleet.errors import BadRequestError
from kvfleet.gateway.http_exchange import HTTPExchange
from kvfleet.mock.engine import MockEngine
from kvfleet.mock.faults import FaultKind, FaultRule
from kvfleet.mock.misbehaviour import spoil_stream, spoil_whole

__all__ = ["infer", "read_body"]

_MOST_BYTES = 64 * 1024 * 1024
_PATIENT = Limits(first_byte_s=86_400.0)  # a mock engine waits as long as its client does
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
_JSON = [(b"content-type", b"application/json")]


async def read_body(exchange: HTTPExchange) -> dict[str, Any]:
    """The request's JSON.

    Raises:
        BadRequestError: if it is none.
        ClientLeftError: if the client left.
    """
    raw = await exchange.body(_MOST_BYTES)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object", code="invalid_json")
    return body


async def infer(engine: MockEngine, operation: Operation, exchange: HTTPExchange, rule: FaultRule | None) -> None:
    """Answer one call.

    Raises:
        BackendError: if the engine refuses it.
        BadRequestError: if the body makes no sense.
    """
    body = await read_body(exchange)
    _check_model(engine, body)
    is_stream = body.get("stream") is True
    exchange.watch()
    if is_stream and rule is not None and rule.kind is FaultKind.SLOW_FIRST_TOKEN:
        await exchange.start(200, _SSE)  # the head alone, before anything is known
    reply = await engine.adapter.send(Call(operation=operation, body=body, stream=is_stream, limits=_PATIENT))
    try:
        if reply.events is None:
            await _whole(exchange, reply, rule)
        else:
            await _stream(exchange, reply, rule, 1 if operation is Operation.CHAT else 0)
    finally:
        await reply.close()


def _check_model(engine: MockEngine, body: Mapping[str, Any]) -> None:
    known = engine.adapter.model_id
    if body.get("model") not in (None, "", known):
        raise BadRequestError(f"The model `{body['model']}` does not exist.", status=404, param="model")


async def _whole(exchange: HTTPExchange, reply: Reply, rule: FaultRule | None) -> None:
    exchange.unwatch()
    if rule is None or not await spoil_whole(exchange, rule, reply.body):
        await exchange.whole(200, reply.body, _JSON)


async def _stream(exchange: HTTPExchange, reply: Reply, rule: FaultRule | None, openings: int) -> None:
    assert reply.events is not None  # noqa: S101 - seen by the caller
    if not exchange.status:
        await exchange.start(200, _SSE)
    if rule is None:
        async for event in reply.events:
            await exchange.piece(event)
    elif not await spoil_stream(exchange, rule, reply.events, openings + rule.after_tokens):
        return
    exchange.unwatch()
    await exchange.end()
