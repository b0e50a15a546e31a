"""What the tests of translated engines share: making calls, reading what came out, playing an engine's bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from kvfleet.adapters.call import Call, Limits, Operation, Reply
from kvfleet.errors import BackendError

USER = {"role": "user", "content": "Hi"}
LIMITS = Limits(connect_s=5, first_byte_s=5, idle_s=5)


def call(
    body: Mapping[str, Any] | None = None,
    *,
    operation: Operation = Operation.CHAT,
    stream: bool = False,
    ask_usage: bool = False,
    headers: tuple[tuple[str, str], ...] = (),
) -> Call:
    """A call with a body; a greeting if none is given."""
    given = {"model": "m", "messages": [USER]} if body is None else body
    return Call(operation=operation, body=given, stream=stream, limits=LIMITS, ask_usage=ask_usage, headers=headers)


def events(said: bytes) -> list[Any]:
    """The data of OpenAI events; ``[DONE]`` as that text."""
    pieces = [piece.removeprefix(b"data: ") for piece in said.split(b"\n\n") if piece]
    return [piece.decode() if piece == b"[DONE]" else orjson.loads(piece) for piece in pieces]


def deltas(said: bytes) -> list[Any]:
    """What the choices of OpenAI events hold: delta or text, and the finish reason where there is one."""
    found: list[Any] = []
    for event in events(said):
        if isinstance(event, str):
            found.append(event)
        elif not event["choices"]:
            found.append({"usage": event["usage"]})
        for choice in () if isinstance(event, str) else event["choices"]:
            inner = choice.get("delta", choice.get("text"))
            found.append((inner, choice["finish_reason"]) if choice["finish_reason"] else inner)
    return found


async def drained(reply: Reply) -> bytes:
    """All of a streamed reply."""
    assert reply.events is not None
    return b"".join([piece async for piece in reply.events])


async def drained_until_it_fails(reply: Reply) -> tuple[bytes, BackendError | None]:
    """All of a streamed reply that came, and the error that ended it."""
    assert reply.events is not None
    out = b""
    try:
        async for piece in reply.events:
            out += piece
    except BackendError as error:
        return out, error
    return out, None


def lines(*objects: Mapping[str, Any]) -> list[bytes]:
    """Newline-delimited JSON, a piece for each line."""
    return [orjson.dumps(item) + b"\n" for item in objects]


def sse(*objects: Mapping[str, Any] | str) -> list[bytes]:
    """Server-sent events, a piece for each."""
    return [b"data:" + (item.encode() if isinstance(item, str) else orjson.dumps(item)) + b"\n\n" for item in objects]


def told(translation: Any, pieces: Sequence[Any], *, is_whole: bool = True) -> bytes:
    """What a translation makes of an engine's events, to the end."""
    out = b""
    for piece in pieces:
        out += translation.done() if piece == "[DONE]" else translation.read_event(orjson.dumps(piece))
        if translation.chunks.tally.is_complete:
            return out
    translation.is_whole = is_whole
    return out + bytes(translation.end())
