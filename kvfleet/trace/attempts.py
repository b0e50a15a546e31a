"""What an attempt's span says: who was called and why, what came of it, what went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from kvfleet.adapters.call import Operation, Tally
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError
from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue, Span

__all__ = ["attempt_attributes", "describe_error", "describe_tally", "server_attributes"]

_GEN_AI = {
    Operation.CHAT: "chat",
    Operation.COMPLETION: "text_completion",
    Operation.EMBEDDING: "embeddings",
    Operation.RERANK: "rerank",
}
_SERVERS: dict[str, dict[str, str | int]] = {}
_MOST_SERVERS = 10_000


def attempt_attributes(
    model: ModelConfig, operation: Operation, *, number: int, reason: str
) -> dict[str, AttributeValue]:
    """What the span says from the start."""
    return {
        names.ATTEMPT: number,
        names.ATTEMPT_REASON: reason,
        names.REPLICA: model.id,
        names.MODEL: model.name,
        names.GEN_AI_OPERATION: _GEN_AI[operation],
        names.GEN_AI_PROVIDER: model.provider,
        names.GEN_AI_REQUEST_MODEL: model.get_model_id(),
        **server_attributes(model.endpoint),
    }


def server_attributes(endpoint: str) -> Mapping[str, str | int]:
    """``server.address`` and ``server.port`` of an endpoint; remembered, since endpoints are few."""
    found = _SERVERS.get(endpoint)
    if found is None:
        parts = urlsplit(endpoint)
        found = {}
        if parts.hostname:
            port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
            found = {names.SERVER_ADDRESS: parts.hostname, **({names.SERVER_PORT: port} if port else {})}
        if len(_SERVERS) < _MOST_SERVERS:
            _SERVERS[endpoint] = found
    return found


def describe_tally(span: Span, tally: Tally) -> None:
    """Note what was learned of the answer."""
    attributes = span.attributes
    if tally.model:
        attributes[names.GEN_AI_RESPONSE_MODEL] = tally.model
    if tally.response_id:
        attributes[names.GEN_AI_RESPONSE_ID] = tally.response_id
    if tally.finish_reason:
        attributes[names.GEN_AI_FINISH_REASONS] = (tally.finish_reason,)
    usage = tally.usage
    if usage is None:
        return
    attributes[names.GEN_AI_INPUT_TOKENS] = usage.prompt_tokens
    attributes[names.GEN_AI_OUTPUT_TOKENS] = usage.completion_tokens
    if usage.cached_tokens is not None:
        attributes[names.GEN_AI_CACHED_TOKENS] = usage.cached_tokens
    if usage.cache_creation_tokens is not None:
        attributes[names.GEN_AI_CACHE_WRITTEN_TOKENS] = usage.cache_creation_tokens


def describe_error(span: Span, error: BackendError) -> None:
    """Note what went wrong."""
    span.fail(error.message)
    span.attributes[names.ERROR_TYPE] = error.kind.value
    if error.status is not None:
        span.attributes[names.STATUS_CODE] = error.status
    if error.retry_after_s is not None:
        span.attributes[names.RETRY_AFTER_S] = error.retry_after_s
    if error.limit:
        span.attributes[names.LIMIT] = error.limit
