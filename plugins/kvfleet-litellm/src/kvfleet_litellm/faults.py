"""LiteLLM's exceptions in kvfleet's one taxonomy.

They are told by the names of their classes, so that nothing of LiteLLM is imported for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kvfleet.adapters.faults import error_object, retry_after_s
from kvfleet.errors import BackendError, Fault

__all__ = ["error_of"]

_KINDS = {
    "ContextWindowExceededError": Fault.CONTEXT_LENGTH,
    "ContentPolicyViolationError": Fault.CONTENT_POLICY,
    "RejectedRequestError": Fault.CONTENT_POLICY,
    "AuthenticationError": Fault.UNAUTHORIZED,
    "PermissionDeniedError": Fault.UNAUTHORIZED,
    "PaymentRequiredError": Fault.UNAUTHORIZED,
    "LiteLLMUnknownProvider": Fault.NOT_FOUND,
    "NotFoundError": Fault.NOT_FOUND,
    "RateLimitError": Fault.RATE_LIMITED,
    "Timeout": Fault.TIMEOUT,
    "APITimeoutError": Fault.TIMEOUT,
    "APIConnectionError": Fault.CONNECT,
    "ServiceUnavailableError": Fault.OVERLOADED,
    "APIResponseValidationError": Fault.PROTOCOL,
    "BadRequestError": Fault.BAD_REQUEST,
    "UnprocessableEntityError": Fault.BAD_REQUEST,
    "BadGatewayError": Fault.SERVER_ERROR,
    "InternalServerError": Fault.SERVER_ERROR,
    "ImportError": Fault.NOT_FOUND,
}
# LiteLLM makes a server's error of a connection that could not be made, and a connection's error of a package that is
# missing; the cause tells
_CONNECTION = frozenset({"ConnectError", "ConnectTimeout", "ConnectionError", "ClientConnectorError"})
_MISSING = frozenset({"ImportError"})
_WRAPPER = "MidStreamFallbackError"
_STATUSES = {
    401: Fault.UNAUTHORIZED,
    403: Fault.UNAUTHORIZED,
    404: Fault.NOT_FOUND,
    429: Fault.RATE_LIMITED,
    503: Fault.OVERLOADED,
    529: Fault.OVERLOADED,
}
_SAYS = {
    Fault.UNAUTHORIZED: "the provider refused kvfleet's credential",
    Fault.NOT_FOUND: "the provider or its model is not known, or a package it needs is not installed",
    Fault.RATE_LIMITED: "the provider limits the rate of requests",
    Fault.OVERLOADED: "the provider is overloaded",
    Fault.TIMEOUT: "the provider sent no answer in time",
    Fault.CONNECT: "the provider cannot be reached",
    Fault.DISCONNECTED: "the provider's stream ended before it was finished",
    Fault.BAD_REQUEST: "the provider refused the request",
    Fault.CONTEXT_LENGTH: "the prompt is longer than the model's context window",
    Fault.CONTENT_POLICY: "the provider refused the request for its content",
    Fault.SERVER_ERROR: "the provider failed",
}


def error_of(error: Exception, *, received: bool) -> BackendError:
    """The error that an exception of LiteLLM's stands for.

    The provider's own words are kept only where they concern the caller.

    Args:
        error: Whatever LiteLLM raised.
        received: True if parts of an answer had arrived before.
    """
    error = _unwrapped(error)
    status = getattr(error, "status_code", None)
    status = status if isinstance(status, int) else None
    kind = _kind(error, status)
    if received and kind is Fault.CONNECT:  # it was connected: it said something
        kind, status = Fault.DISCONNECTED, None
    says = _SAYS.get(kind, f"LiteLLM failed ({type(error).__name__})")
    headers = _headers(error)
    return BackendError(
        kind,
        says if status is None else f"{says} (status {status})",
        status=status,
        body=_body(error, kind) if kind.is_callers else None,
        retry_after_s=retry_after_s(headers),
        headers=headers,
        received=received,
    )


def _unwrapped(error: Exception) -> Exception:
    """What went wrong with the provider, where LiteLLM has put its own router's invitation to fall back around it."""
    inner = getattr(error, "original_exception", None)
    return inner if type(error).__name__ == _WRAPPER and isinstance(inner, Exception) else error


def _kind(error: Exception, status: int | None) -> Fault:
    names = [cls.__name__ for cls in type(error).__mro__]
    # a class of LiteLLM's is usually the kind of one of the `openai` package's: the nearest name is the most telling
    kind = next((_KINDS[name] for name in names if name in _KINDS), None)
    if kind in (None, Fault.SERVER_ERROR, Fault.BAD_REQUEST) and status in _STATUSES:
        return _STATUSES[status]
    if kind is Fault.SERVER_ERROR and _was_caused(error, _CONNECTION):
        return Fault.CONNECT
    is_unknown = kind is Fault.BAD_REQUEST and "LLM Provider NOT provided" in str(error)
    if is_unknown or (kind is Fault.CONNECT and _was_caused(error, _MISSING)):
        return Fault.NOT_FOUND
    if kind is None:
        return Fault.SERVER_ERROR if status is not None and status >= 500 else Fault.PROTOCOL
    return kind


def _was_caused(error: BaseException, names: Collection[str]) -> bool:
    cause: BaseException | None = error
    for _ in range(10):  # a chain of causes can be a ring
        if cause is None:
            return False
        if any(cls.__name__ in names for cls in type(cause).__mro__):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _body(error: Exception, kind: Fault) -> dict[str, Any] | None:
    code = {Fault.CONTEXT_LENGTH: "context_length_exceeded", Fault.CONTENT_POLICY: "content_filter"}.get(kind)
    message = str(getattr(error, "message", "") or error)
    return error_object({"error": {"message": message, "type": "invalid_request_error", "code": code}})


def _headers(error: Exception) -> dict[str, str]:
    found: dict[str, str] = {}
    for holder in (getattr(error, "response", None), error):
        headers = getattr(holder, "headers", None) or getattr(holder, "litellm_response_headers", None)
        if isinstance(headers, Mapping):
            found |= {str(name).lower(): str(value) for name, value in headers.items()}
    more = getattr(error, "litellm_response_headers", None)
    return found | ({str(k).lower(): str(v) for k, v in more.items()} if isinstance(more, Mapping) else {})
