"""OpenAI's request bodies in the words of Ollama's native API.

Source of the native shapes: ``docs/api.md`` and ``api/types.go`` of ollama/ollama (August 2026). What Ollama has no
word for is refused; what neither side knows is forwarded, and Ollama ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from kvfleet.adapters.refusals import data_url, number_of_choices, one_prompt, refuse

__all__ = ["chat_body", "completion_body", "embedding_body"]

_ENGINE = "Ollama"

# OpenAI's name of a sampling parameter, and Ollama's under `options`; the later of two names wins.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repeat_penalty",
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
}
# Names that Ollama reads under `options`, and OpenAI clients put beside the messages.
_NATIVE_OPTIONS = frozenset(
    {
        *("num_keep", "num_predict", "top_k", "min_p", "typical_p", "repeat_last_n", "repeat_penalty"),
        *("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread"),
        *("mirostat", "mirostat_tau", "mirostat_eta", "tfs_z"),
    }
)
# Fields that have been said in Ollama's words, or that are kvfleet's and the transport's business.
_SAID = frozenset(
    {
        *_OPTIONS,
        *_NATIVE_OPTIONS,
        *("model", "messages", "prompt", "input", "stream", "stream_options", "stop", "options", "n", "best_of"),
        *("tools", "tool_choice", "response_format", "reasoning_effort", "logprobs", "top_logprobs", "echo"),
        *("encoding_format",),
    }
)
_THINK = {"none": False, "minimal": "low", "xhigh": "max"}


def chat_body(body: Mapping[str, Any], *, model: str, is_stream: bool, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The body of ``/api/chat`` for an OpenAI chat body.

    Args:
        body: The OpenAI body.
        model: Ollama's name of the model.
        is_stream: True to have it streamed.
        defaults: Fields for what the body leaves open (`keep_alive`, `truncate`).

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for what Ollama cannot do.
    """
    number_of_choices(body, _ENGINE)
    out = {**defaults, **_rest(body), "model": model, "stream": is_stream, "messages": _messages(body)}
    tools = _tools(body)
    if tools:
        out["tools"] = tools
    if body.get("logprobs"):
        out["logprobs"] = True
        out |= {key: body[key] for key in ("top_logprobs",) if body.get(key)}
    return _with_options(out, body)


def completion_body(
    body: Mapping[str, Any], *, model: str, is_stream: bool, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The body of ``/api/generate`` for an OpenAI text completion.

    The prompt goes to the model as it is (`raw`), as it does on other engines, unless it has a `suffix`: filling in the
    middle needs the model's template.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for what Ollama cannot do.
    """
    number_of_choices(body, _ENGINE)
    for key in ("echo", "logprobs"):
        if body.get(key):
            raise refuse(f"{_ENGINE} cannot give {key} with text completions", key)
    is_raw = not body.get("suffix")
    out = {**defaults, "raw": is_raw, **_rest(body), "model": model, "stream": is_stream}
    out["prompt"] = one_prompt(body, _ENGINE)
    return _with_options(out, body)


def embedding_body(body: Mapping[str, Any], *, model: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The body of ``/api/embed`` for an OpenAI embedding body.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for input that is not text.
    """
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise refuse(f"{_ENGINE} embeds a text or a list of texts", "input")
    out = {**defaults, **_rest(body), "model": model, "input": given}
    return {**out, "options": body["options"]} if isinstance(body.get("options"), Mapping) else out


def _rest(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that need no translation, Ollama's own and unknown ones."""
    return {key: value for key, value in body.items() if key not in _SAID}


def _with_options(out: dict[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    options = {theirs: body[ours] for ours, theirs in _OPTIONS.items() if body.get(ours) is not None}
    options |= {key: body[key] for key in body.keys() & _NATIVE_OPTIONS}
    stop = body.get("stop")
    if stop:
        options["stop"] = [stop] if isinstance(stop, str) else list(stop)
    options |= body.get("options") or {}
    if options:
        out["options"] = options
    if "format" not in out and (wanted := _format(body.get("response_format"))) is not None:
        out["format"] = wanted
    effort = body.get("reasoning_effort")
    if "think" not in out and effort is not None:
        out["think"] = _THINK.get(effort, effort)
    return out


def _format(wanted: Any) -> Any:
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return "json"
    if kind == "json_schema" and isinstance(wanted.get("json_schema"), Mapping):
        return wanted["json_schema"].get("schema") or "json"
    raise refuse(f"{_ENGINE} has no response_format of type {kind}", "response_format")


def _tools(body: Mapping[str, Any]) -> Any:
    """The tools to offer. Ollama leaves the choice to the model; only offering none can be enforced."""
    choice = body.get("tool_choice")
    if choice == "none":
        return None
    if choice not in (None, "auto"):
        raise refuse(f"{_ENGINE} cannot be made to call a tool: tool_choice may be auto or none", "tool_choice")
    return body.get("tools")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = body.get("messages")
    if not isinstance(given, Sequence) or not all(isinstance(message, Mapping) for message in given):
        raise refuse("messages must be a list of messages", "messages")
    names: dict[str, str] = {}
    return [_message(message, names) for message in given]


def _message(message: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """One message; `names` collects the tools called so far, because Ollama wants a tool result to name its tool."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    known = ("role", "content", "tool_calls", "name", "reasoning_content", "reasoning", "refusal")
    out = {key: value for key, value in message.items() if key not in known}
    out |= {"role": role, **_content(message.get("content"))}
    thinking = message.get("reasoning_content") or message.get("reasoning")
    if thinking:
        out["thinking"] = thinking
    if message.get("tool_calls"):
        out["tool_calls"] = [_called(call, index, names) for index, call in enumerate(message["tool_calls"])]
    if role == "tool":
        out["tool_name"] = message.get("name") or names.get(str(message.get("tool_call_id")), "")
    return out


def _content(content: Any) -> dict[str, Any]:
    if content is None or isinstance(content, str):
        return {"content": content or ""}
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(part["text"])
        elif kind == "image_url":
            image = part["image_url"]
            images.append(data_url(image.get("url") if isinstance(image, Mapping) else image, _ENGINE))
        elif kind == "input_audio":  # Ollama's own OpenAI route hands audio over like this too
            images.append(part["input_audio"]["data"])
        else:
            raise refuse(f"{_ENGINE} takes text, images and audio, and a message has a part of type {kind}", "messages")
    return {"content": "\n".join(texts), **({"images": images} if images else {})}


def _called(call: Mapping[str, Any], index: int, names: dict[str, str]) -> dict[str, Any]:
    """A tool call of an earlier answer: Ollama has the arguments as an object."""
    function = call.get("function") or {}
    arguments = function.get("arguments") or "{}"
    try:
        parsed = orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, Mapping):
        raise refuse("the arguments of a tool call must be a JSON object", "messages")
    names[str(call.get("id"))] = function.get("name", "")
    out = {"function": {"index": index, "name": function.get("name", ""), "arguments": parsed}}
    return {"id": call["id"], **out} if call.get("id") else out
