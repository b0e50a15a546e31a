"""One taxonomy for everything a backend call can end in: HTTP statuses, engines' error texts, broken connections."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from typing import Any

import httpx
import orjson

from kvfleet.adapters.places import without_places
from kvfleet.errors import BackendError, Fault

__all__ = ["error_object", "from_answer", "from_exception", "retry_after_s"]

# Engines say "too long" in many ways; the code is the sure sign, the texts are those of vLLM, SGLang, TGI, llama.cpp,
# Ollama, Anthropic, Mistral and Bedrock.
_TOO_LONG = re.compile(
    r"(?:maximum|available|model's|maximum model|exceeds? the) (?:allowed )?(?:context|model) (?:length|size|window)"
    r"|context[_ ]length[_ ]exceeded|exceed_context_size|max_model_len"
    r"|longer than the context length|prompt is too long|input is too long|too many (?:input )?tokens"
    r"|inputs` (?:tokens|must have less than)|maximum number of tokens allowed",
    re.IGNORECASE,
)
_CONTENT_POLICY = re.compile(
    r"content[_ ](?:filter|policy|management)|responsible\s?ai|moderation_blocked", re.IGNORECASE
)
_MAX_MESSAGE = 2000
_LONGEST_WAIT_S = 3600.0
_STATUS_DIGITS = 3

# What a status means where the body does not say more. 402, 405 and 501 are no fault of the caller or of the replica's
# health: an unpaid account, a path that is not there, a feature that is not built in.
_STATUS = {
    401: Fault.UNAUTHORIZED,
    402: Fault.UNAUTHORIZED,
    403: Fault.UNAUTHORIZED,
    404: Fault.NOT_FOUND,
    405: Fault.NOT_FOUND,
    408: Fault.TIMEOUT,
    410: Fault.NOT_FOUND,
    429: Fault.RATE_LIMITED,
    501: Fault.NOT_FOUND,
    503: Fault.OVERLOADED,
    529: Fault.OVERLOADED,
}

_SAYS = {
    Fault.UNAUTHORIZED: "the backend refused kvfleet's credential",
    Fault.NOT_FOUND: "the backend does not know the model or the path",
    Fault.RATE_LIMITED: "the backend limits the rate of requests",
    Fault.OVERLOADED: "the backend is overloaded",
    Fault.TIMEOUT: "the backend gave up waiting",
    Fault.SERVER_ERROR: "the backend failed",
    Fault.BAD_REQUEST: "the backend refused the request",
    Fault.CONTEXT_LENGTH: "the prompt is longer than the model's context window",
    Fault.CONTENT_POLICY: "the backend refused the request for its content",
    Fault.PROTOCOL: "the backend's answer makes no sense",
}
_WANTS_CREDENTIAL = "the backend wants a credential and was sent none: give its model an `api_key`"


def error_object(data: Any) -> dict[str, Any] | None:
    """The OpenAI error object in an answer, whatever shape its engine gave it; None if there is no error in it.

    Known shapes: ``{"error": {...}}``, ``{"error": "text"}``, ``{"object": "error", "message": ...}``, FastAPI's
    ``{"detail": ...}`` and a bare ``{"message": ...}``.

    >>> error_object({"error": "model overloaded", "error_type": "overloaded"})
    {'message': 'model overloaded', 'type': 'overloaded', 'param': None, 'code': None}
    """
    if not isinstance(data, dict):
        return None
    found = data.get("error")
    if isinstance(found, str):
        found = {"message": found, "type": data.get("error_type")}
    elif not isinstance(found, dict):
        found = _error_at_top(data)
    return None if found is None else _openai_error(found)


def _error_at_top(data: dict[str, Any]) -> dict[str, Any] | None:
    if "detail" in data:
        return {"message": _detail(data["detail"])}
    says_error = "error" in (data.get("object"), data.get("type"))
    is_message = "choices" not in data and isinstance(data.get("message"), str)
    return data if says_error or is_message else None


def _detail(detail: Any) -> str:
    """FastAPI's ``detail``: a text, or a list of what failed where (the offending input itself is left out)."""
    if isinstance(detail, list):
        parts = [_failed_field(item) for item in detail[:5] if isinstance(item, dict)]
        return "; ".join(part for part in parts if part) or "the request is not valid"
    return str(detail)


def _failed_field(item: Mapping[str, Any]) -> str:
    loc = item.get("loc")
    where = ".".join(str(step) for step in loc if step != "body") if isinstance(loc, list | tuple) else ""
    return f"{where}: {item.get('msg', '')}" if where else str(item.get("msg", ""))


def _openai_error(found: Mapping[str, Any]) -> dict[str, Any]:
    message = found.get("message")
    text = message if isinstance(message, str) else orjson.dumps(message).decode() if message else ""
    out: dict[str, Any] = {
        "message": without_places(text[: 2 * _MAX_MESSAGE])[:_MAX_MESSAGE],
        "type": _word(found.get("type")),
        "param": _word(found.get("param")),
        "code": found.get("code") if isinstance(found.get("code"), int) else _word(found.get("code")),
    }
    return out


def _word(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds a backend asked to wait: ``retry-after-ms``, or ``Retry-After`` as seconds or as a date.

    An hour at most: who says more is asked again after that, and a slip of a backend's closes it for no hundred days.
    """
    found = _told_s(headers)
    return None if found is None else min(found, _LONGEST_WAIT_S)


def _told_s(headers: Mapping[str, str]) -> float | None:
    exact = _number(headers.get("retry-after-ms"))
    if exact is not None:
        return exact / 1000
    value = headers.get("retry-after")
    if value is None:
        return None
    seconds = _number(value)
    if seconds is not None:
        return seconds
    try:
        at = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, at - time.time())  # a date is of the wall clock, whatever clock the route runs on


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if 0 <= number < 1e7 else None


def from_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, received: bool = False, has_credential: bool = True
) -> BackendError:
    """The error that a refusing answer stands for.

    The backend's own error object is kept only where it concerns the caller; what an engine says of its own trouble, of
    our credential or of the names it knows stays here.

    Args:
        status: The HTTP status; for an error under a 200, or amid a stream, 200.
        headers: The answer's headers, lower-case.
        body: The answer's body, or its beginning.
        received: True if parts of an answer had arrived before.
        has_credential: False if the backend was sent none, because none is configured.
    """
    found = error_object(_json(body))
    if found is not None and status < 300:
        status = _status_within(found)
    kind = _kind(status, found)
    says = _SAYS[kind] if has_credential or status not in {401, 403} else _WANTS_CREDENTIAL
    message = f"{says} (status {status})"
    if found is not None and not found["message"]:
        found = {**found, "message": message}  # an error that says nothing helps nobody
    return BackendError(
        kind,
        message,
        status=status,
        body=found if kind.is_callers else None,
        retry_after_s=retry_after_s(headers),
        headers=headers,
        received=received,
    )


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _status_within(found: Mapping[str, Any]) -> int:
    """An error sent under a 200 may carry its true status as its code."""
    code = found.get("code")
    told = str(code) if isinstance(code, int | str) else ""
    number = int(told) if len(told) == _STATUS_DIGITS and told.isdecimal() else 0
    return number if 400 <= number < 600 else 500


def _kind(status: int, found: Mapping[str, Any] | None) -> Fault:
    if 300 <= status < 400:
        return Fault.PROTOCOL
    known = _STATUS.get(status)
    if known is not None:
        return known
    if found is not None and status != 500:
        return _kind_of_text(status, found)
    if found is not None and _says(_TOO_LONG, found):  # some engines answer 500 to a prompt that is too long
        return Fault.CONTEXT_LENGTH
    return Fault.BAD_REQUEST if 400 <= status < 500 else Fault.SERVER_ERROR


def _kind_of_text(status: int, found: Mapping[str, Any]) -> Fault:
    if status >= 500:
        return Fault.SERVER_ERROR
    if _says(_TOO_LONG, found):
        return Fault.CONTEXT_LENGTH
    if _says(_CONTENT_POLICY, found):
        return Fault.CONTENT_POLICY
    return Fault.BAD_REQUEST


def _says(pattern: re.Pattern[str], found: Mapping[str, Any]) -> bool:
    return any(isinstance(found[key], str) and pattern.search(found[key]) for key in ("code", "type", "message"))


def from_exception(error: Exception, *, received: bool = False) -> BackendError:
    """The error that a broken exchange stands for; `received` tells a silence before the answer from one amid it."""
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return BackendError(Fault.CONNECT_TIMEOUT, "the backend did not accept the connection in time")
    if isinstance(error, httpx.ConnectError | httpx.ProxyError | httpx.UnsupportedProtocol):
        return BackendError(Fault.CONNECT, "the backend cannot be reached")
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        if received:
            return BackendError(Fault.IDLE_TIMEOUT, "the backend fell silent amid its answer", received=True)
        return BackendError(Fault.TIMEOUT, "the backend sent no answer in time")
    if isinstance(error, httpx.ProtocolError | httpx.DecodingError) and not _is_disconnect(error):
        return BackendError(Fault.PROTOCOL, "the backend does not speak proper HTTP", received=received)
    where = "amid its answer" if received else "before it answered"
    return BackendError(Fault.DISCONNECTED, f"the backend closed the connection {where}", received=received)


def _is_disconnect(error: Exception) -> bool:
    """The httpx transports report a peer that went away as a protocol error; the text tells it."""
    text = str(error).lower()
    return "disconnected" in text or "closed connection" in text or "connectionterminated" in text
