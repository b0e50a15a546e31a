"""Change a request's body without reading it again: replace a value, add a key, leave every other byte as it was."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Mapping
from typing import Any

import anyio.to_thread
import orjson

from kvfleet.adapters.call import Call, Operation

__all__ = ["body_for", "body_in_turns", "hides_usage"]

# The value after the key; JSON strings hold no bare quote, so the first one that is not escaped ends it.
_MODEL = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.)*")')
_KEY = b'"model"'
_LONGEST_ESCAPE = len(b"\\u006")
_STRIDE = 1024 * 1024
_ASK_USAGE = b'"stream_options":{"include_usage":true},'
_PROMPTS = {
    Operation.CHAT: (b'"messages"',),
    Operation.COMPLETION: (b'"prompt"',),
    Operation.EMBEDDING: (b'"input"',),
    Operation.RERANK: (b'"query"', b'"documents"'),
}
"""Where a request's text stands. Its bytes must not read otherwise at the backend than they did for the policy."""


def hides_usage(call: Call) -> bool:
    """True if usage at the end of the stream is asked for on our account alone: the client must not see it."""
    if not (call.ask_usage and call.stream):
        return False
    options = call.body.get("stream_options")
    return not (isinstance(options, Mapping) and options.get("include_usage") is True)


def body_for(call: Call, model: str) -> bytes:
    """The call's body for a backend that knows the model as `model`.

    The client's bytes are kept and patched where that is safe: ``model`` and the keys of the prompt stand in them once,
    and not written with escapes. Else the parsed body is encoded anew, which keeps all fields too: of a key that stands
    twice the last one counts, and a backend that would take the first never sees it.
    """
    add_usage = hides_usage(call)
    if _may_be_spliced(call, add_usage=add_usage) and _has_plain_keys(call.raw, call.operation):
        return _spliced(call.raw, model, add_usage=add_usage) or _encoded(call, model, add_usage=add_usage)
    return _encoded(call, model, add_usage=add_usage)


async def body_in_turns(call: Call, model: str) -> bytes:
    """The same for a large body: one turn of the event loop for each megabyte that is searched, and one to put it down.

    It takes 1.5 ms to search a megabyte (`benchmarks/loop_lag.py`), and as long to copy four: that a thread does, piece
    by piece, since Python joins more than a megabyte without holding others up.
    """
    add_usage, made = hides_usage(call), None
    if _may_be_spliced(call, add_usage=add_usage) and await _are_keys_plain(call.raw, call.operation):
        made = await anyio.to_thread.run_sync(
            functools.partial(_spliced, call.raw, model, add_usage=add_usage, stride=_STRIDE)
        )
    await asyncio.sleep(0)
    if made is not None:
        return made
    made = _encoded(call, model, add_usage=add_usage)
    await asyncio.sleep(0)
    return made


def _may_be_spliced(call: Call, *, add_usage: bool) -> bool:
    """True if what is to be changed in the bytes is there already, and nothing but that."""
    raw, body = call.raw, call.body
    if not raw or not isinstance(body.get("model"), str):
        return False
    return bool(body.get("stream")) == call.stream and not (add_usage and "stream_options" in body)


def _has_plain_keys(raw: bytes, operation: Operation) -> bool:
    """True if the model's key and those of the prompt stand there once, and not written with escapes.

    Within valid JSON the seven bytes of ``"model"`` are a key, a value, or the end of a text with an escaped quote. If
    they stand there once, the body has that key, and no letter of it is escaped anywhere (d, e, l, m and o are U+006x),
    they are that key. The same holds for the prompt's keys, whose other letters are U+007x.
    """
    if raw.count(_KEY) != 1 or _has_escaped_letters(raw, 0, len(raw)):
        return False
    return not any(raw.count(key) > 1 for key in _PROMPTS[operation])


async def _are_keys_plain(raw: bytes, operation: Operation) -> bool:
    """The same, megabyte by megabyte."""
    counts = dict.fromkeys((_KEY, *_PROMPTS[operation]), 0)
    for start in range(0, len(raw), _STRIDE):
        await asyncio.sleep(0)
        end = start + _STRIDE
        for key in counts:
            counts[key] += raw.count(key, start, end + len(key) - 1)
        if max(counts.values()) > 1 or _has_escaped_letters(raw, start, end + _LONGEST_ESCAPE - 1):
            return False
    return counts[_KEY] == 1


def _has_escaped_letters(raw: bytes, start: int, end: int) -> bool:
    if raw.find(b"\\u00", start, end) < 0:
        return False
    return raw.find(b"\\u006", start, end) >= 0 or raw.find(b"\\u007", start, end) >= 0


def _spliced(raw: bytes, model: str, *, add_usage: bool, stride: int = 0) -> bytes | None:
    found, start = _MODEL.match(raw, raw.find(_KEY)), raw.find(b"{") + 1
    if found is None or not start:
        return None
    begin, end = found.span(1)
    head = raw[:start], _ASK_USAGE if add_usage else b"", raw[start:begin], _quoted(model)
    if not stride:
        return b"".join((*head, raw[end:]))
    return b"".join((*head, *[raw[at : at + stride] for at in range(end, len(raw), stride)]))


@functools.lru_cache(maxsize=1024)
def _quoted(model: str) -> bytes:
    return orjson.dumps(model)


def _encoded(call: Call, model: str, *, add_usage: bool) -> bytes:
    body: dict[str, Any] = {**call.body, "model": model}
    if bool(body.get("stream")) != call.stream:
        body["stream"] = call.stream
        if not call.stream:
            body.pop("stream_options", None)  # engines refuse it without `stream`
    if add_usage:
        options = body.get("stream_options")
        body["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    return orjson.dumps(body)
