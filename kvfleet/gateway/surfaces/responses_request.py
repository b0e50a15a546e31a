"""A body of OpenAI's Responses API as a chat body.

Source of the native shapes: the types of the `openai` package, 3.57.0 (`ResponseCreateParams`). The gateway keeps no
conversation: what would need one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from kvfleet.errors import BadRequestError
from kvfleet.gateway.surfaces.messages_request import Reading
from kvfleet.gateway.surfaces.surface import Body, an_object, kind_of, objects, refused

__all__ = ["chat_of"]

_STATE = {
    "previous_response_id": "send the whole conversation in `input`",
    "conversation": "send the whole conversation in `input`",
    "background": "ask for a stream, or wait for the answer",
    "prompt": "write the prompt in `instructions` and `input`",
    "store": "leave it out, or say false",
}
_FLAGS = ("background", "store")
_SAME = (
    *("model", "temperature", "top_p", "stream", "parallel_tool_calls", "metadata", "user", "service_tier"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
)
_NATIVE_FIELDS = ("max_tool_calls", "context_management")
_SAID = frozenset(
    {
        *_SAME,
        *_STATE,
        *_NATIVE_FIELDS,
        *("input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning", "include"),
        *("top_logprobs", "truncation", "stream_options"),
    }
)
_LOGPROBS = "message.output_text.logprobs"
_NOT_TOLD = frozenset({_LOGPROBS, "reasoning.encrypted_content"})


def chat_of(body: Body, reading: Reading) -> dict[str, Any]:
    """The chat body.

    Raises:
        BadRequestError: naming the field at fault.
    """
    for field, remedy in _STATE.items():
        value = body.get(field)
        if value is not None and not (value is False and field in _FLAGS):
            message = f"{field} needs a conversation kept by the server, and the gateway keeps none; {remedy}"
            raise BadRequestError(message, param=field, code="unsupported_parameter")
    if "messages" in body:  # what is looked at must be what an engine reads
        raise refused("messages are for /v1/chat/completions; a response takes its conversation as input", "messages")
    messages = [*_instructions(body), *_input(body.get("input"), reading)]
    chat: dict[str, Any] = {"messages": messages}
    for key in (*_SAME, *_NATIVE_FIELDS, *(key for key in body if key not in _SAID)):
        if body.get(key) is not None:
            chat[key] = body[key]
    for key in _NATIVE_FIELDS:
        if body.get(key) is not None:
            reading.note(key)
    if body.get("truncation") == "auto":
        reading.note("truncation")
    optional = {
        "max_tokens": body.get("max_output_tokens"),
        "reasoning_effort": _section(body, "reasoning").get("effort"),
        "verbosity": _section(body, "text").get("verbosity"),
        "response_format": _format(_section(body, "text").get("format")),
        **_logprobs(body, reading),
        **_tools(body, reading),
    }
    return chat | {key: value for key, value in optional.items() if value is not None}


def _section(body: Body, key: str) -> Mapping[str, Any]:
    return {} if body.get(key) is None else an_object(body[key], key)


def _instructions(body: Body) -> Iterator[dict[str, Any]]:
    given = body.get("instructions")
    if given is None or given == "":
        return
    if not isinstance(given, str):
        raise refused(f"instructions must be text, not {kind_of(given)}", "instructions")
    yield {"role": "system", "content": given}


def _input(given: Any, reading: Reading) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if given is None or given == []:
        raise refused("input is missing", "input")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(objects(given, "input")):
        place = f"input[{index}]"
        kind = item.get("type") or "message"
        if kind == "message":
            messages.append(_message(item, place, reading))
        elif kind == "function_call":
            _call(item, place, messages)
        elif kind == "function_call_output":
            messages += _result(item, place, reading)
        elif kind == "item_reference":
            raise refused("an item_reference needs what the server keeps, and the gateway keeps nothing", place)
        elif kind == "reasoning":
            messages.append({"role": "assistant", "content": "", "reasoning_content": _thought(item)})
        else:
            reading.note(str(kind)[:64])
            messages.append({"role": "user", "content": orjson.dumps(item).decode()})
    return messages


def _thought(item: Mapping[str, Any]) -> str:
    """What can be read of an earlier thought; policy reads it, and an engine only in the API's own words."""
    parts = [part for key in ("summary", "content") for part in item.get(key) or () if isinstance(part, Mapping)]
    return "\n".join([part["text"] for part in parts if isinstance(part.get("text"), str)])


def _message(item: Mapping[str, Any], place: str, reading: Reading) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise refused(f"{place}.role must be user, assistant, system or developer", f"{place}.role")
    role = "system" if role == "developer" else role
    if isinstance(content, str):
        return {"role": role, "content": content}
    parts = [_part(one, f"{place}.content[{i}]", reading) for i, one in enumerate(objects(content, f"{place}.content"))]
    if role == "assistant" or (all(part.keys() == {"type", "text"} for part in parts) and len(parts) == 1):
        return {"role": role, "content": "".join(part.get("text") or "" for part in parts)}
    return {"role": role, "content": parts}


def _part(part: Mapping[str, Any], place: str, reading: Reading) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text", "refusal"):
        text = part.get("refusal") if kind == "refusal" else part.get("text")
        if not isinstance(text, str):
            raise refused(f"{place}.text must be text, not {kind_of(text)}", f"{place}.text")
        return {"type": "text", "text": text}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        image = {"url": part["image_url"]} | ({"detail": part["detail"]} if part.get("detail") else {})
        return {"type": "image_url", "image_url": image}
    if kind == "input_file" and isinstance(part.get("file_data"), str):
        named = {"filename": part["filename"]} if isinstance(part.get("filename"), str) else {}
        return {"type": "file", "file": {"file_data": part["file_data"], **named}}
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part.get("input_audio")}
    if not isinstance(kind, str):
        raise refused(f"{place}.type must be text", f"{place}.type")
    reading.note(f"{kind[:64]} by its id" if kind in ("input_image", "input_file") else kind[:64])
    return {"type": "text", "text": orjson.dumps(part).decode()}


def _call(item: Mapping[str, Any], place: str, messages: list[dict[str, Any]]) -> None:
    """A call of a tool belongs to the assistant's turn before it."""
    name, identifier, arguments = item.get("name"), item.get("call_id"), item.get("arguments")
    if not (isinstance(name, str) and isinstance(identifier, str) and isinstance(arguments, str)):
        raise refused(f"{place} needs call_id, name and arguments, as text", place)
    call = {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _result(item: Mapping[str, Any], place: str, reading: Reading) -> list[dict[str, Any]]:
    identifier, output = item.get("call_id"), item.get("output")
    if not isinstance(identifier, str):
        raise refused(f"{place}.call_id must be text", f"{place}.call_id")
    if isinstance(output, str):
        return [{"role": "tool", "tool_call_id": identifier, "content": output}]
    parts = [_part(one, f"{place}.output[{i}]", reading) for i, one in enumerate(objects(output, f"{place}.output"))]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    others = [part for part in parts if part["type"] != "text"]
    said = {"role": "tool", "tool_call_id": identifier, "content": "\n".join(texts)}
    return [said, {"role": "user", "content": others}] if others else [said]


def _format(form: Any) -> dict[str, Any] | None:
    if form is None:
        return None
    kind = an_object(form, "text.format").get("type")
    if kind in (None, "text"):
        return None
    if kind != "json_schema":
        return {"type": kind}
    schema = {key: form[key] for key in ("name", "description", "schema", "strict") if form.get(key) is not None}
    return {"type": "json_schema", "json_schema": schema}


def _logprobs(body: Body, reading: Reading) -> dict[str, Any]:
    wanted = body.get("include") or ()
    if not isinstance(wanted, Sequence) or isinstance(wanted, str):
        raise refused("include must be a list", "include")
    for one in wanted:
        if one not in _NOT_TOLD:
            reading.note(f"include {str(one)[:64]}")
    top = body.get("top_logprobs")
    is_wanted = _LOGPROBS in wanted or bool(top)
    return {"logprobs": True, "top_logprobs": top or None} if is_wanted else {}


def _tools(body: Body, reading: Reading) -> dict[str, Any]:
    given = body.get("tools")
    if given is None:
        return {}
    tools = [_tool(tool, f"tools[{index}]", reading) for index, tool in enumerate(objects(given, "tools"))]
    if not tools:
        return {}
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping):
        if choice.get("type") == "function":
            choice = {"type": "function", "function": {"name": str(choice.get("name"))}}
        else:
            reading.note(f"tool_choice {str(choice.get('type'))[:64]}")
    return {"tools": tools, "tool_choice": choice}


def _tool(tool: Mapping[str, Any], place: str, reading: Reading) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        if not isinstance(kind, str):
            raise refused(f"{place}.type must be text", f"{place}.type")
        reading.note(kind[:64])
        return dict(tool)
    if not isinstance(tool.get("name"), str):
        raise refused(f"{place}.name must be text", f"{place}.name")
    keys = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: tool[key] for key in keys if tool.get(key) is not None}}
