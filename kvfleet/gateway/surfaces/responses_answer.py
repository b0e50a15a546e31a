"""A chat's answer as an object of OpenAI's Responses API.

Source of the native shapes: the types of the `openai` package, 3.57.0 (`Response`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvfleet.adapters.call import Usage
from kvfleet.errors import BackendError, Fault
from kvfleet.gateway.surfaces.messages_answer import thought_in
from kvfleet.gateway.surfaces.surface import Body

__all__ = ["call_item", "logprobs_in", "message_item", "outline", "response_of", "thought_item", "usage_object"]

_WHY = {"length": "max_output_tokens", "content_filter": "content_filter"}
_ECHOED = (
    *("instructions", "max_output_tokens", "temperature", "top_p", "reasoning", "text", "truncation", "user"),
    *("service_tier", "prompt_cache_key", "safety_identifier", "top_logprobs", "max_tool_calls"),
)


def usage_object(usage: Usage | None) -> dict[str, Any] | None:
    """Usage as the Responses API counts: its input tokens include the cached ones, as a chat's do."""
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens or 0,
            "cache_write_tokens": usage.cache_creation_tokens or 0,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def outline(body: Body, identifier: str, created: int, model: str) -> dict[str, Any]:
    """A response that has only begun; of the request it says again what clients read back."""
    return {
        "id": identifier,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": model or str(body.get("model") or ""),
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "store": False,
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "metadata": body.get("metadata") or {},
        "usage": None,
        **{key: body.get(key) for key in _ECHOED},
    }


def ended(response: dict[str, Any], reason: str | None, usage: Usage | None) -> dict[str, Any]:
    """The same, once the answer has ended for a reason of a chat's."""
    why = _WHY.get(str(reason))
    response["status"] = "incomplete" if why else "completed"
    response["incomplete_details"] = {"reason": why} if why else None
    response["usage"] = usage_object(usage)
    return response


def thought_item(identifier: str, text: str, status: str = "completed") -> dict[str, Any]:
    """What the model thought."""
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": identifier, "type": "reasoning", "summary": [], "content": content, "status": status}


def message_item(identifier: str, content: list[dict[str, Any]], status: str = "completed") -> dict[str, Any]:
    """What the model said."""
    return {"id": identifier, "type": "message", "role": "assistant", "status": status, "content": content}


def call_item(identifier: str, call: Body, arguments: str, status: str = "completed") -> dict[str, Any]:
    """A call of a tool."""
    name = (call.get("function") or {}).get("name") or ""
    head = {"id": identifier, "type": "function_call", "status": status}
    return {**head, "call_id": call.get("id") or "", "name": name, "arguments": arguments}


def text_part(text: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
    """A piece of what the model said."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def logprobs_in(choice: Body) -> list[Any]:
    """How sure the engine was of each token, if it told."""
    told = choice.get("logprobs")
    content = told.get("content") if isinstance(told, Mapping) else None
    return content if isinstance(content, list) else []


def response_of(answer: Body, body: Body, identifier: str, usage: Usage | None) -> dict[str, Any]:
    """A whole answer.

    Raises:
        BackendError: (`Fault.PROTOCOL`) if it is no chat's.
    """
    try:
        choice = answer["choices"][0]
        response = outline(body, identifier, int(answer.get("created") or 0), str(answer.get("model") or ""))
        reason = choice.get("finish_reason")
        status = "incomplete" if reason in _WHY else "completed"
        response["output"] = list(_items(choice, identifier, status))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BackendError(Fault.PROTOCOL, "the backend's answer cannot be told as a response") from error
    return ended(response, reason, usage)


def _items(choice: Body, identifier: str, status: str) -> Iterator[dict[str, Any]]:
    message = choice["message"]
    if thought := thought_in(message):
        yield thought_item(f"rs_{identifier}", thought)
    content = []
    if message.get("content"):
        content.append(text_part(message["content"], logprobs_in(choice)))
    if message.get("refusal"):
        content.append({"type": "refusal", "refusal": message["refusal"]})
    calls = message.get("tool_calls") or ()
    if content or not calls:
        yield message_item(f"msg_{identifier}", content or [text_part("")], status)
    for index, call in enumerate(calls):
        arguments = call["function"].get("arguments") or "{}"
        yield call_item(f"fc_{index}_{identifier}", call, arguments, status)
