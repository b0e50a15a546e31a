"""LiteLLM's answers as the JSON and the events that kvfleet hands on."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from kvfleet.adapters.call import Tally, Usage

__all__ = ["chat_answer", "embedding_answer", "events_of"]

DONE = b"data: [DONE]\n\n"


def chat_answer(answer: Any, tally: Tally) -> bytes:
    """A whole chat completion."""
    out = _plain(answer)
    for choice in out["choices"]:
        choice["message"].setdefault("content", None)  # OpenAI's clients expect it, null or not
    _note(out, tally)
    tally.usage, tally.is_complete = Usage.from_openai(out.get("usage")), True
    return orjson.dumps(out)


def embedding_answer(answer: Any, tally: Tally, *, is_base64: bool) -> bytes:
    """A list of embeddings, packed if that was asked for: few providers can, and all of OpenAI's clients ask for it."""
    out = _plain(answer)
    if is_base64:
        for item in out["data"]:
            item["embedding"] = _packed(item["embedding"])
    tally.model = str(out.get("model") or "")
    tally.usage, tally.is_complete = Usage.from_openai(out.get("usage")), True
    return orjson.dumps(out)


def events_of(piece: Any, tally: Tally, *, tells_usage: bool) -> list[bytes]:
    """The events for one piece of a stream. The usage comes apart, in an event without choices, as OpenAI has it."""
    out = _plain(piece)
    usage = out.pop("usage", None)
    _note(out, tally)
    events = []
    if any(choice.get("finish_reason") or choice.get("delta") for choice in out["choices"]):
        events.append(_event({**out, "usage": None} if tells_usage else out))
    if usage:
        tally.usage = Usage.from_openai(usage)
        if tells_usage:
            events.append(_event({**out, "choices": [], "usage": usage}))
    return events


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def _plain(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_dump(mode="json", exclude_none=True)
    return found


def _note(out: Mapping[str, Any], tally: Tally) -> None:
    tally.model, tally.response_id = str(out.get("model") or ""), str(out.get("id") or "")
    for choice in out["choices"][:1]:
        tally.finish_reason = choice.get("finish_reason") or tally.finish_reason


def _packed(vector: Sequence[float]) -> str:
    """Floats as OpenAI packs them: base64 of little-endian 32-bit floats."""
    packed = array.array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")
