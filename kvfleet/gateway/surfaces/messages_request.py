"""A body of Anthropic's Messages API as an OpenAI chat body.

Source of the native shapes: the types of the `anthropic` package, 2.14.0 (`MessageCreateParams`). Fields of Anthropic's
own (`thinking`, `cache_control`, ...) stay in the chat body under their names: the Anthropic adapter reads them there,
and `kvfleet.adapters.native.portable` takes them out for everybody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.gateway.surfaces.surface import Body, an_object, kind_of, objects, refused

__all__ = ["Reading", "chat_of"]

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TIERS = {"standard_only": "default", "auto": "auto"}
_SAME = ("temperature", "top_p", "top_k", "thinking", "stream")
# What only an engine that speaks Anthropic's API can do.
_NATIVE_FIELDS = ("mcp_servers", "container", "context_management", "fallbacks")
_KNOWN = frozenset(
    {
        *_SAME,
        *_NATIVE_FIELDS,
        *("model", "messages", "max_tokens", "system", "stop_sequences", "tools", "tool_choice", "metadata"),
        *("service_tier", "output_config", "cache_control", "output_format"),
    }
)


@attrs.define
class Reading:
    """What was found on the way that no chat body can say; the first of it is told to whoever cannot take it."""

    only: str = ""

    def note(self, what: str) -> None:
        self.only = self.only or what


def chat_of(body: Body, reading: Reading) -> dict[str, Any]:
    """The chat body.

    Raises:
        BadRequestError: naming the field at fault.
    """
    limit = body.get("max_tokens")
    if isinstance(limit, float) and limit.is_integer():
        limit = int(limit)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or not 0 <= limit < 2**31):
        raise refused("max_tokens must be a whole number below 2^31", "max_tokens")
    chat: dict[str, Any] = {"messages": [*_system(body.get("system"), reading), *_messages(body, reading)]}
    for key in ("model", *_SAME, *_NATIVE_FIELDS, *(key for key in body if key not in _KNOWN)):
        if body.get(key) is not None:
            chat[key] = body[key]
    for key in _NATIVE_FIELDS:
        if body.get(key):
            reading.note(key)
    optional = {
        "max_tokens": limit,
        "stop": body.get("stop_sequences"),
        "user": _user(body.get("metadata")),
        "service_tier": _TIERS.get(str(body.get("service_tier"))),
        **_tools(body, reading),
        **_output(body),
    }
    return chat | {key: value for key, value in optional.items() if value is not None}


def _user(metadata: Any) -> str | None:
    user = an_object(metadata, "metadata").get("user_id") if metadata is not None else None
    return user if isinstance(user, str) else None


def _system(given: Any, reading: Reading) -> Iterator[dict[str, Any]]:
    if given is None or given == "":
        return
    if isinstance(given, str):
        yield {"role": "system", "content": given}
        return
    parts = [part for block in objects(given, "system") for part in _parts(block, "system", reading)]
    if parts:
        yield {"role": "system", "content": parts}


def _messages(body: Body, reading: Reading) -> Iterator[dict[str, Any]]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise refused("messages must be a list that is not empty", "messages")
    for index, message in enumerate(objects(given, "messages")):
        place = f"messages[{index}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise refused(f"{place}.role must be user or assistant", f"{place}.role")
        if isinstance(content, str):
            yield {"role": role, "content": content}
        elif role == "assistant":
            yield _said(objects(content, f"{place}.content"), place, reading)
        else:
            yield from _asked(str(role), objects(content, f"{place}.content"), place, reading)


def _asked(role: str, blocks: Sequence[Mapping[str, Any]], place: str, reading: Reading) -> Iterator[dict[str, Any]]:
    """A turn of the user's: results of tools are messages of their own, and come first, as Anthropic wants them."""
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        where = f"{place}.content[{index}]"
        if block.get("type") == "tool_result":
            result, pictures = _result(block, where, reading)
            yield result
            parts += pictures
        else:
            parts += _parts(block, where, reading)
    if parts or not blocks:
        yield {"role": role, "content": parts}


def _result(block: Mapping[str, Any], place: str, reading: Reading) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a tool said; its pictures apart, because a chat's tool says text alone."""
    content = block.get("content")
    name = block.get("tool_use_id")
    if not isinstance(name, str):
        raise refused(f"{place}.tool_use_id must be text", f"{place}.tool_use_id")
    pictures: list[dict[str, Any]] = []
    if content is not None and not isinstance(content, str):
        parts = [part for one in objects(content, f"{place}.content") for part in _parts(one, place, reading)]
        pictures = [part for part in parts if part["type"] != "text"]
        content = "\n".join(part["text"] for part in parts if part["type"] == "text")
    out = {"role": "tool", "tool_call_id": name, "content": content or ""}
    return out | {key: block[key] for key in ("is_error", "cache_control") if block.get(key)}, pictures


def _said(blocks: Sequence[Mapping[str, Any]], place: str, reading: Reading) -> dict[str, Any]:
    """A turn of the assistant's."""
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[Mapping[str, Any]] = []
    for index, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_call(block, f"{place}.content[{index}]"))
        elif kind in ("thinking", "redacted_thinking"):
            if block.get("signature") or block.get("data"):  # Anthropic takes back only thoughts that it signed
                thoughts.append(block)
        else:
            parts += _parts(block, f"{place}.content[{index}]", reading)
    is_plain = all(part.keys() == {"type", "text"} for part in parts)
    content: Any = "".join(part["text"] for part in parts) if is_plain else parts
    out: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    return out | ({"tool_calls": calls} if calls else {}) | ({"thinking_blocks": thoughts} if thoughts else {})


def _call(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    name, given = block.get("name"), block.get("input", {})
    if not isinstance(name, str) or not isinstance(block.get("id"), str):
        raise refused(f"{place} needs a name and an id", place)
    arguments = orjson.dumps(an_object(given, f"{place}.input")).decode()
    return {"id": block["id"], "type": "function", "function": {"name": name, "arguments": arguments}}


def _parts(block: Mapping[str, Any], place: str, reading: Reading) -> list[dict[str, Any]]:
    """One block as parts of a chat's content. Whatever text stands in it stands in them too: policy reads them."""
    kind = block.get("type")
    marks = {"cache_control": block["cache_control"]} if block.get("cache_control") else {}
    if kind == "text":
        text = block.get("text")
        if not isinstance(text, str):
            raise refused(f"{place}.text must be text, not {kind_of(text)}", f"{place}.text")
        return [{"type": "text", "text": text} | marks]
    if kind == "image":
        return _image(block, place, reading, marks)
    if kind == "document":
        return _document(block, place, reading, marks)
    if kind == "search_result":
        texts = [str(block.get(key) or "") for key in ("title", "source")]
        texts += [str(one.get("text") or "") for one in objects(block.get("content"), f"{place}.content")]
        return [{"type": "text", "text": "\n".join(filter(None, texts))} | marks]
    if not isinstance(kind, str):
        raise refused(f"{place}.type must be text", f"{place}.type")
    reading.note(kind[:64])
    return [{"type": "text", "text": orjson.dumps(block).decode()}]


def _image(block: Mapping[str, Any], place: str, reading: Reading, marks: Body) -> list[dict[str, Any]]:
    source = an_object(block.get("source"), f"{place}.source")
    if source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    elif source.get("type") == "url":
        url = str(source.get("url"))
    else:
        reading.note("a file of Anthropic's")
        return [{"type": "text", "text": orjson.dumps(source).decode()}]
    return [{"type": "image_url", "image_url": {"url": url}, **marks}]


def _document(block: Mapping[str, Any], place: str, reading: Reading, marks: Body) -> list[dict[str, Any]]:
    source = an_object(block.get("source"), f"{place}.source")
    title, kind = str(block.get("title") or ""), source.get("type")
    about = "\n".join(filter(None, (title, str(block.get("context") or ""))))
    before = [{"type": "text", "text": about}] if about else []
    if kind == "text":
        return [*before, {"type": "text", "text": str(source.get("data") or ""), **marks}]
    if kind == "content":
        content = source.get("content")
        inner = [{"type": "text", "text": content}] if isinstance(content, str) else objects(content, f"{place}.source")
        return [*before, *(part for one in inner for part in _parts(one, place, reading))]
    if kind == "base64":
        data = f"data:{source.get('media_type')};base64,{source.get('data')}"
        return [*before, {"type": "file", "file": {"filename": title or "document", "file_data": data}, **marks}]
    reading.note("a document by its address" if kind == "url" else "a file of Anthropic's")
    return [*before, {"type": "text", "text": orjson.dumps(source).decode()}]


def _tools(body: Body, reading: Reading) -> dict[str, Any]:
    given = body.get("tools")
    if given is None:
        return {}
    tools = [_tool(tool, f"tools[{index}]", reading) for index, tool in enumerate(objects(given, "tools"))]
    if not tools:
        return {}
    found: dict[str, Any] = {"tools": tools}
    choice = body.get("tool_choice")
    if choice is None:
        return found
    kind = an_object(choice, "tool_choice").get("type")
    if kind == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": str(choice.get("name"))}}
    elif kind in _CHOICES:
        found["tool_choice"] = _CHOICES[kind]
    else:
        raise refused("tool_choice.type must be auto, any, tool or none", "tool_choice.type")
    if choice.get("disable_parallel_tool_use") is True:
        found["parallel_tool_calls"] = False
    return found


def _tool(tool: Mapping[str, Any], place: str, reading: Reading) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):  # a tool that Anthropic itself has, such as web_search_20250305
        reading.note(str(kind)[:64])
        return dict(tool)
    name = tool.get("name")
    if not isinstance(name, str) or not name:
        raise refused(f"{place}.name must be text", f"{place}.name")
    function: dict[str, Any] = {
        "name": name,
        "parameters": an_object(tool.get("input_schema"), f"{place}.input_schema"),
    }
    if isinstance(tool.get("description"), str):
        function["description"] = tool["description"]
    if isinstance(tool.get("strict"), bool):
        function["strict"] = tool["strict"]
    marks = {"cache_control": tool["cache_control"]} if tool.get("cache_control") else {}
    return {"type": "function", "function": function, **marks}


def _output(body: Body) -> dict[str, Any]:
    """The form of the answer: effort, and a schema it must keep to."""
    config = body.get("output_config")
    config = {} if config is None else an_object(config, "output_config")
    form = config.get("format") or body.get("output_format")
    found: dict[str, Any] = {}
    if isinstance(config.get("effort"), str):
        found["reasoning_effort"] = config["effort"]
    if form is not None and an_object(form, "output_config.format").get("type") == "json_schema":
        schema = an_object(form.get("schema"), "output_config.format.schema")
        found["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return found
