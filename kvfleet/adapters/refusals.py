"""What an engine cannot do is refused as the caller's own mistake, never left out in silence.

Each function takes the engine's name for the sentence that the caller reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfleet.errors import BackendError, Fault

__all__ = ["data_url", "number_of_choices", "one_prompt", "refuse", "text_of", "text_only"]


def refuse(message: str, param: str) -> BackendError:
    """The error for what an engine cannot do: the caller's own (400), so that another model may be asked instead."""
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": "unsupported_parameter"}
    return BackendError(Fault.BAD_REQUEST, message, status=400, body=body)


def number_of_choices(body: Mapping[str, Any], engine: str) -> None:
    """Refuse `n` and `best_of` above one, for an engine that gives one answer.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`).
    """
    for key in ("n", "best_of"):
        if body.get(key) not in (None, 1):
            raise refuse(f"{engine} gives one answer for each call, so {key} must be 1", key)


def one_prompt(body: Mapping[str, Any], engine: str) -> str:
    """The prompt of a text completion, for an engine that takes one text.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for several prompts, or one given as token numbers.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise refuse(f"{engine} takes one prompt, as text", "prompt")
    return prompt


def text_of(content: Any, engine: str) -> str:
    """A message's content as one text.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for parts that are not text.
    """
    if isinstance(content, str):
        return content
    texts = []
    for part in content or ():
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise refuse(f"{engine} takes text only, and a message has a part of type {kind}", "messages")
        texts.append(part["text"])
    return "\n".join(texts)


def text_only(body: Mapping[str, Any], engine: str) -> None:
    """Refuse what an engine that takes a text and gives a text cannot do: tools, several answers, log probabilities.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`).
    """
    number_of_choices(body, engine)
    if body.get("tools") and body.get("tool_choice") != "none":
        raise refuse(f"{engine} takes no tools", "tools")
    for key in ("logprobs", "echo"):
        if body.get(key):
            raise refuse(f"{engine} cannot give {key}", key)


def data_url(url: Any, engine: str) -> str:
    """The base64 text inside a ``data:`` URL.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for any other URL: neither kvfleet nor the engine fetches it.
    """
    head, found, data = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    if not found or not head.startswith("data:"):
        raise refuse(f"{engine} takes images as data: URLs in base64 only; it fetches none", "messages")
    return data
