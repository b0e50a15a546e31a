"""A chat request as Python programs write it, made into what the pipeline takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.base import ChatMessage, ChatRequest
from kvfleet.config.schema import AUTO_MODEL
from kvfleet.errors import BadRequestError
from kvfleet.plugin.contract import RouteRequest

__all__ = ["request_from"]


def request_from(
    messages: Sequence[ChatMessage | Mapping[str, Any]] | None = None,
    prompt: str | None = None,
    *,
    request: ChatRequest | None = None,
    model: str = AUTO_MODEL,
    data_class: str = "",
    tenant_id: str = "",
    region: str = "",
    session: str = "",
    tags: Mapping[str, str] | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    stream: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Mapping[str, Any] | None = None,
    request_id: str = "",
    strategy_override: str = "",
    model_allowlist: Sequence[str] | None = None,
    timeout_s: float | None = None,
    seed: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> RouteRequest:
    """A chat request as Python programs write it, as the pipeline takes it.

    Args:
        messages: The conversation, as `ChatMessage` or OpenAI objects.
        prompt: A single user message instead.
        request: A `ChatRequest` instead; its ``model`` counts if `model` is left at ``auto``.
        model: A model, an alias, or ``auto``.
        data_class: What the prompt may show to whom.
        tenant_id: Who asks.
        region: Where the request comes from.
        session: The conversation's key.
        tags: Labels for rules and strategies.
        temperature: Sent to the engine, as are the next three and `extra`.
        max_tokens: Longest answer.
        tools: Tools the model may call.
        response_format: JSON mode or a JSON schema.
        stream: True for a stream.
        extra: More fields of the body.
        request_id: Made if empty.
        strategy_override: A strategy for this request alone.
        model_allowlist: The only models allowed.
        timeout_s: The request's own deadline.
        seed: Makes the decision repeatable.

    Raises:
        BadRequestError: if there is neither messages nor prompt nor request.
    """
    if request is None:
        request = ChatRequest(
            _conversation(messages, prompt),
            temperature=temperature,
            max_tokens=max_tokens,
            tools=tools,
            response_format=response_format,
            extra=extra or {},
        )
    name = request.model if model == AUTO_MODEL and request.model else model
    body = attrs.evolve(request, model=name, stream=stream or request.stream).to_openai()
    return RouteRequest(
        body=body,
        model=name,
        models=None if model_allowlist is None else frozenset(model_allowlist),
        strategy=strategy_override,
        is_override=bool(strategy_override),
        stream=bool(body.get("stream")),
        request_id=request_id,
        tenant=tenant_id,
        data_class=data_class,
        region=region,
        session=session,
        tags=tags or {},
        timeout_s=timeout_s,
        seed=seed,
    )


def _conversation(messages: Sequence[ChatMessage | Mapping[str, Any]] | None, prompt: str | None) -> list[ChatMessage]:
    if messages is not None:
        return [_message(one) for one in messages]
    if prompt is None:
        raise BadRequestError("give messages, a prompt or a request", param="messages")
    return [ChatMessage("user", prompt)]


def _message(message: ChatMessage | Mapping[str, Any]) -> ChatMessage:
    return message if isinstance(message, ChatMessage) else ChatMessage.from_openai(message)
