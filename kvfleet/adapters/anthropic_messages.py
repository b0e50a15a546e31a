"""OpenAI's messages as Anthropic has a conversation: a system prompt apart, and turns made of blocks.

Source of the native shapes: the types of the `anthropic` package, 2.12.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from kvfleet.adapters.refusals import refuse

__all__ = ["conversation"]

_ENGINE = "Anthropic"
_NATIVE = frozenset({"image", "document", "search_result", "tool_result", "tool_use", "container_upload"})
_KEPT = ("cache_control", "citations")


def conversation(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The blocks of the system prompt, and the turns.

    Every system (or developer) message goes to the system prompt, in order, as Anthropic's own OpenAI route does it.
    Results of tools called together become one turn.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for a part or a role that Anthropic has not.
    """
    given = body.get("messages")
    if not isinstance(given, Sequence) or not all(isinstance(message, Mapping) for message in given):
        raise refuse("messages must be a list of messages", "messages")
    system: list[dict[str, Any]] = _blocks(body.get("system"))
    turns: list[dict[str, Any]] = []
    is_after_result = False
    for message in given:
        role = message.get("role")
        if role in ("system", "developer"):
            system += _marked(message, _blocks(message.get("content")))
            continue
        if role == "tool" and is_after_result:
            turns[-1]["content"].append(_result(message))
        else:
            turns.append(_turn(message))
        is_after_result = role == "tool"
    return system, turns


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role == "tool":
        return {"role": "user", "content": [_result(message)]}
    if role == "assistant":
        return {"role": "assistant", "content": _answer(message)}
    if role != "user":
        raise refuse(f"{_ENGINE} has no role {role}", "messages")
    content = message.get("content")
    if isinstance(content, str) and "cache_control" not in message:
        return {"role": "user", "content": content}
    return {"role": "user", "content": _marked(message, _blocks(content))}


def _result(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a tool said, as a block of the user's turn."""
    content = message.get("content")
    out = {
        "type": "tool_result",
        "tool_use_id": message["tool_call_id"],
        "content": content if isinstance(content, str) else _blocks(content),
    }
    return out | {key: message[key] for key in ("is_error", "cache_control") if key in message}


def _answer(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An earlier answer: signed thoughts first (Anthropic takes no others back), then text, then calls of tools."""
    thoughts = [_without_index(block) for block in message.get("thinking_blocks") or ()]
    if message.get("function_call"):
        raise refuse(f"{_ENGINE} takes tool_calls, not function_call", "messages")
    said = _blocks(message.get("content") or message.get("refusal"))
    return thoughts + _marked(message, said + [_called(call) for call in message.get("tool_calls") or ()])


def _without_index(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "index"}


def _called(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    try:
        parsed = orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, Mapping):
        raise refuse("the arguments of a tool call must be a JSON object", "messages")
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": parsed}


def _marked(message: Mapping[str, Any], blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A cache mark on a whole message stands on its last block; Anthropic caches up to there."""
    if "cache_control" in message and blocks:
        blocks[-1] = {**blocks[-1], "cache_control": message["cache_control"]}
    return blocks


def _blocks(content: Any) -> list[dict[str, Any]]:
    """Content as blocks; empty texts, which Anthropic refuses, are left out."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [block for part in content or () if (block := _block(part)) is not None]


def _block(part: Any) -> dict[str, Any] | None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "refusal"):
        said = part.get("text") or part.get("refusal")
        return {"type": "text", "text": said, **_kept(part)} if said else None
    if kind == "image_url":
        image = part["image_url"]
        return {"type": "image", "source": _image(image.get("url") if isinstance(image, Mapping) else image)} | _kept(
            part
        )
    if kind == "file":
        return _document(part["file"]) | _kept(part)
    if kind in _NATIVE:
        return dict(part)
    raise refuse(f"{_ENGINE} takes text, images and documents, and a message has a part of type {kind}", "messages")


def _kept(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: part[key] for key in _KEPT if part.get(key) is not None}


def _image(url: Any) -> dict[str, Any]:
    """The source of an image: what a ``data:`` URL holds, or a URL that Anthropic fetches; kvfleet fetches none."""
    if not isinstance(url, str):
        raise refuse("an image needs a URL", "messages")
    if url.startswith(("https://", "http://")):
        return {"type": "url", "url": url}
    return _inline(url)


def _inline(url: str) -> dict[str, Any]:
    head, found, data = url.partition(";base64,")
    if not found or not head.startswith("data:"):
        raise refuse(f"{_ENGINE} takes https: URLs, and data: URLs in base64", "messages")
    return {"type": "base64", "media_type": head.removeprefix("data:").partition(";")[0], "data": data}


def _document(file: Mapping[str, Any]) -> dict[str, Any]:
    if file.get("file_id"):
        source: dict[str, Any] = {"type": "file", "file_id": file["file_id"]}
    else:
        source = _inline(file["file_data"])
    title = {"title": file["filename"]} if file.get("filename") else {}
    return {"type": "document", "source": source, **title}
