"""Change a request's body without reading it again: replace a value, add a key, leave every other byte as it was."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import orjson

from kvfleet.adapters.call import Call, Operation

__all__ = ["body_for", "hides_usage"]

# The value after the key; JSON strings hold no bare quote, so the first one that is not escaped ends it.
_MODEL = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.)*")')
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
    return _spliced(call, model, add_usage=add_usage) or _encoded(call, model, add_usage=add_usage)


def _spliced(call: Call, model: str, *, add_usage: bool) -> bytes | None:
    raw, body = call.raw, call.body
    # Within valid JSON these seven bytes are a key, a value, or the end of a text with an escaped quote. If they stand
    # there once, the body has that key, and no letter of it is escaped anywhere (d, e, l, m and o are U+006x), they are
    # that key. The same holds for the prompt's keys, whose other letters are U+007x.
    if not raw or raw.count(b'"model"') != 1 or not isinstance(body.get("model"), str):
        return None
    if b"\\u00" in raw and (b"\\u006" in raw or b"\\u007" in raw):
        return None
    if any(raw.count(key) > 1 for key in _PROMPTS[call.operation]):
        return None
    if bool(body.get("stream")) != call.stream or (add_usage and "stream_options" in body):
        return None
    found = _MODEL.search(raw)
    start = raw.find(b"{") + 1
    if found is None or not start:
        return None
    begin, end = found.span(1)
    return b"".join((raw[:start], _ASK_USAGE if add_usage else b"", raw[start:begin], _quoted(model), raw[end:]))


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
