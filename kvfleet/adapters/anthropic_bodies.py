"""OpenAI's chat bodies in the words of Anthropic's Messages API.

Source of the native shapes: the types of the `anthropic` package, 2.12.0. What Anthropic has no word for is refused;
what neither side knows is forwarded, and so Anthropic's own fields (`thinking`, `top_k`, `cache_control`, ...) can be
used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvfleet.adapters.anthropic_messages import conversation
from kvfleet.adapters.refusals import number_of_choices, refuse

__all__ = ["chat_body"]

_ENGINE = "Anthropic"

# Said in Anthropic's words below, or hints about caching, storage and speed that do not change an answer.
_SAID = frozenset(
    {
        *("model", "messages", "max_tokens", "max_completion_tokens", "stop", "stop_sequences", "system", "tools"),
        *("tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort", "output_config", "user"),
        *("metadata", "safety_identifier", "service_tier", "n", "best_of", "stream_options", "modalities"),
        *("store", "prediction", "prompt_cache_key", "prompt_cache_retention"),
    }
)
# What OpenAI has and Anthropic has not: refused, unless it is the value that changes nothing.
_LACKING: Mapping[str, Collection[Any]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "seed": (),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_TIERS = {"auto": "auto", "default": "standard_only", "standard_only": "standard_only"}
_EFFORTS = {"minimal": "low"}
_CHOICES = {"auto": "auto", "none": "none", "required": "any"}
_JSON_ONLY = "Answer with one valid JSON object and nothing else: no words before or after it, no code fence."


def chat_body(
    body: Mapping[str, Any],
    *,
    model: str,
    is_stream: bool,
    max_tokens: int,
    ignored: Collection[str] = (),
    may_instruct: bool = False,
) -> dict[str, Any]:
    """The body of ``/v1/messages`` for an OpenAI chat body.

    Args:
        body: The OpenAI body.
        model: Anthropic's name of the model.
        is_stream: True to have it streamed.
        max_tokens: The limit for a request that has none; Anthropic needs one.
        ignored: Fields to leave out instead of refusing the request.
        may_instruct: True to make JSON mode an instruction; else it is refused.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for what Anthropic cannot do.
    """
    number_of_choices(body, _ENGINE)
    _refuse_lacking(body, ignored)
    system, messages = conversation(body)
    config, instruction = _output(body, may_instruct=may_instruct)
    out = {
        **_rest(body, ignored),
        "model": model,
        "max_tokens": _limit(body, max_tokens),
        "messages": messages,
    }
    if instruction:
        system = [*system, {"type": "text", "text": instruction}]
    optional = {
        "system": _system(system),
        "stop_sequences": _stops(body),
        "metadata": _metadata(body),
        "service_tier": _tier(body),
        "output_config": config,
        "stream": is_stream,
        **_tools(body),
    }
    if body.get("reasoning_effort") == "none" and "thinking" not in body:
        optional["thinking"] = {"type": "disabled"}
    return {**out, **{key: value for key, value in optional.items() if value}}


def _limit(body: Mapping[str, Any], otherwise: int) -> Any:
    """The longest answer; nought is a limit too, with which Anthropic only fills its cache."""
    given = (body.get(key) for key in ("max_completion_tokens", "max_tokens"))
    return next((limit for limit in given if limit is not None), otherwise)


def _rest(body: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """The fields that need no translation: those that mean the same, Anthropic's own, and unknown ones."""
    skipped = {*_SAID, *_LACKING, *ignored, "stream"}
    return {key: value for key, value in body.items() if key not in skipped and value is not None}


def _refuse_lacking(body: Mapping[str, Any], ignored: Collection[str]) -> None:
    for key, harmless in _LACKING.items():
        value = body.get(key)
        if value is not None and value not in harmless and key not in ignored:
            raise refuse(f"{_ENGINE} has nothing like {key}", key)
    if body.get("modalities") not in (None, ["text"]):
        raise refuse(f"{_ENGINE} answers with text only", "modalities")


def _system(blocks: Sequence[Mapping[str, Any]]) -> Any:
    """A system prompt as the plain text it is, or as blocks where there are several or one is marked for the cache."""
    is_plain = len(blocks) == 1 and blocks[0].keys() == {"type", "text"}
    return blocks[0]["text"] if is_plain else list(blocks)


def _stops(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop_sequences") or body.get("stop") or []
    return [stop] if isinstance(stop, str) else list(stop)


def _metadata(body: Mapping[str, Any]) -> dict[str, Any]:
    """Anthropic's metadata has one field, an opaque name of the user."""
    given = body.get("metadata")
    native = given.get("user_id") if isinstance(given, Mapping) else None
    user = native or body.get("user") or body.get("safety_identifier")
    return {"user_id": user} if user else {}


def _tier(body: Mapping[str, Any]) -> str:
    tier = body.get("service_tier")
    if tier is not None and tier not in _TIERS:
        raise refuse(f"{_ENGINE} has no service tier {tier}", "service_tier")
    return _TIERS.get(str(tier), "")


def _output(body: Mapping[str, Any], *, may_instruct: bool) -> tuple[dict[str, Any], str]:
    """The `output_config` (schema and effort), and an instruction for JSON mode if that is what it becomes."""
    config = dict(body.get("output_config") or {})
    effort = body.get("reasoning_effort")
    if effort not in (None, "none"):
        config.setdefault("effort", _EFFORTS.get(effort, effort))
    wanted = body.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind in (None, "text"):
        return config, ""
    if kind == "json_object" and may_instruct:
        return config, _JSON_ONLY
    schema = (wanted.get("json_schema") or {}).get("schema") if isinstance(wanted, Mapping) else None
    if kind == "json_schema" and isinstance(schema, Mapping):
        config.setdefault("format", {"type": "json_schema", "schema": schema})
        return config, ""
    remedy = "; give a json_schema, or set the option json_object: instruct" if kind == "json_object" else ""
    raise refuse(f"{_ENGINE} has no response_format of type {kind}{remedy}", "response_format")


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `tools` and `tool_choice`; no choice is named where there is nothing to choose from."""
    tools = [_tool(tool) for tool in body.get("tools") or ()]
    if not tools:
        return {}
    choice = _choice(body.get("tool_choice"))
    if body.get("parallel_tool_calls") is False and (choice is None or choice["type"] != "none"):
        choice = {**(choice or {"type": "auto"}), "disable_parallel_tool_use": True}
    return {"tools": tools, "tool_choice": choice}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function in Anthropic's shape; a tool of Anthropic's own (``web_search_20250305``) stays what it is."""
    kind = tool.get("type", "function")
    if kind == "custom" and "custom" in tool:
        raise refuse(f"{_ENGINE} takes tools whose input is JSON, not free text", "tools")
    if kind != "function" or "function" not in tool:
        return dict(tool)
    function = tool["function"]
    out = {key: value for key, value in tool.items() if key not in ("type", "function")}
    out |= {key: value for key, value in function.items() if key != "parameters" and value is not None}
    out["input_schema"] = function.get("parameters") or {"type": "object", "properties": {}}
    return out


def _choice(choice: Any) -> dict[str, Any] | None:
    if choice is None:
        return None
    if isinstance(choice, str) and choice in _CHOICES:
        return {"type": _CHOICES[choice]}
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "tool", "name": choice["function"]["name"]}
    if isinstance(choice, Mapping) and choice.get("type") in ("auto", "any", "tool", "none"):
        return dict(choice)
    raise refuse(f"{_ENGINE} has no such tool_choice", "tool_choice")
