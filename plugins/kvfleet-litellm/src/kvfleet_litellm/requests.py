"""A client's request as arguments for LiteLLM.

Many arguments of LiteLLM say where to send a request and with whose key, and it fetches what a message points at. A
client must be able to do neither. So only fields that are known to be about the answer become arguments; others go into
`extra_body`, which LiteLLM puts into the body of OpenAI-compatible calls and does not read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from kvfleet.adapters.refusals import refuse

__all__ = ["chat_arguments", "embedding_arguments"]

_CHAT = frozenset(
    {
        *("messages", "temperature", "top_p", "n", "stop", "max_tokens", "max_completion_tokens", "seed", "user"),
        *("presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "response_format"),
        *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "reasoning_effort", "thinking"),
        *("modalities", "audio", "prediction", "service_tier", "web_search_options", "verbosity"),
        *("top_k", "min_p", "repetition_penalty", "safety_settings"),
    }
)
_EMBEDDING = frozenset({"input", "dimensions", "user"})
# kvfleet's and the transport's business
_OURS = frozenset({"model", "stream", "stream_options", "encoding_format"})
_CONTROL = re.compile(
    r"(?:api|aws|azure|vertex|litellm|watsonx|oci|gigachat|databricks)_.*|base_url|headers|extra_.*|mock_.*|callbacks?"
    r"|fallbacks|custom_llm_provider|provider|organization|.*(?:credentials?|password|secret|_key|_token|_url)",
    re.IGNORECASE,
)
_POINTERS = frozenset({"url", "image_url", "file_id", "file_data", "file_url", "audio_url", "video_url", "server_url"})


def chat_arguments(body: Mapping[str, Any], further: Collection[str], *, may_fetch: bool) -> dict[str, Any]:
    """The arguments of `acompletion` that a chat body stands for.

    Args:
        body: The OpenAI body.
        further: Names of fields that are arguments too.
        may_fetch: True to let messages point at addresses, which LiteLLM or the provider then fetches.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for a field that would direct LiteLLM, or a message that points somewhere.
    """
    if not may_fetch:
        _refuse_pointers(body.get("messages"))
    if any(isinstance(tool, Mapping) and tool.get("type") == "mcp" for tool in body.get("tools") or ()):
        raise refuse("tools on servers that a client names are not called", "tools")
    return _arguments(body, _CHAT | set(further))


def embedding_arguments(body: Mapping[str, Any], further: Collection[str]) -> dict[str, Any]:
    """The arguments of `aembedding` that an embedding body stands for.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for a field that would direct LiteLLM.
    """
    return _arguments(body, _EMBEDDING | set(further))


def _arguments(body: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    out = {key: value for key, value in body.items() if key in known and value is not None}
    rest = {key: value for key, value in body.items() if key not in known and key not in _OURS and value is not None}
    for key in rest:
        if _CONTROL.fullmatch(key):
            raise refuse(f"{key} is for the operator to set, not for a request", key)
    return {**out, "extra_body": rest} if rest else out


def _refuse_pointers(messages: Any) -> None:
    for value in _pointers(messages):
        if not value.startswith("data:"):
            raise refuse("pictures and files must be data: URLs; what is elsewhere is not fetched", "messages")


def _pointers(value: Any, key: str = "") -> Iterator[str]:
    """Every text that could be an address, wherever it stands in the messages; texts for the model are none."""
    if isinstance(value, str):
        if key in _POINTERS and not (key == "file_data" and "://" not in value):
            yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _pointers(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _pointers(inner, key)
