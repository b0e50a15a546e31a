"""Errors as OpenAI's clients know them: an object, a status, and whether trying again can help."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from kvfleet.errors import BackendError, RouteError
from kvfleet.gateway.replicas import ReplicaNames

__all__ = ["error_event", "error_headers", "error_object", "event_object", "shutting_down"]

Pairs = list[tuple[bytes, bytes]]


def error_object(error: RouteError, names: ReplicaNames, request_id: str) -> dict[str, Any]:
    """The answer's JSON: what the backend said if the caller is at fault, else our own words; no backend's address.

    What is said of the decision (who was excluded by what, which attempts were made) stands under ``error.kvfleet``.
    """
    details = dict(error.details)
    backend = details.pop("backend_error", None)
    own: dict[str, Any] = {"message": error.message, "type": _type(error), "param": error.param, "code": error.code}
    if isinstance(backend, Mapping) and _may_show(error):
        own |= _backends_own(backend)
    more: dict[str, Any] = {"request_id": request_id, **details}
    if error.trace is not None:
        more["trace"] = error.trace.trace_id
    shown: dict[str, Any] = names.hide_in({"error": {**own, "kvfleet": more}})
    return shown


def _type(error: RouteError) -> str:
    """OpenAI's type; an error class that is usually the server's may carry a backend's verdict on the request."""
    if error.status < 500 and error.type == RouteError.type:
        return _TYPES.get(error.status, "invalid_request_error")
    return error.type


_TYPES = {403: "permission_error", 429: "rate_limit_error"}


def _may_show(error: RouteError) -> bool:
    """True if what the backend said is about the caller's request, not about the backend or the operator's account."""
    return 400 <= error.status < 500 and error.status != 429


def _backends_own(backend: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a backend's OpenAI error object, with or without its wrapper."""
    inner = backend.get("error", backend)
    if isinstance(inner, str):
        return {"message": inner}
    if not isinstance(inner, Mapping):
        return {}
    found = {key: value for key, value in inner.items() if key != "kvfleet" and value is not None}
    if not isinstance(found.get("message", ""), str):
        del found["message"]
    # Some engines give the HTTP status as `code`; clients expect a word there.
    if "code" in found and not isinstance(found["code"], str):
        del found["code"]
    return found


def error_headers(error: RouteError) -> Pairs:
    """When to come back, and whether it can help at all.

    OpenAI's clients try 408, 409, 429 and 5xx again by themselves unless ``x-should-retry`` says no. The gateway has
    tried already where it could, so it says no unless it knows when trying again will help. If it stopped because too
    much is being tried again as it is, it says no in any case.
    """
    found: Pairs = []
    if error.status == 401:
        found.append((b"www-authenticate", b"Bearer"))
    wait_s = error.retry_after_s
    if wait_s is not None:
        found.append((b"retry-after", b"%d" % max(1, math.ceil(wait_s))))
        found.append((b"retry-after-ms", b"%d" % max(0, math.ceil(wait_s * 1000))))
    is_storm = error.details.get("stopped") in _STORMS
    if is_storm or error.code == "insufficient_quota" or (wait_s is None and not _may_pass(error)):
        found.append((b"x-should-retry", b"false"))
    return found


def _may_pass(error: RouteError) -> bool:
    """True if nobody could serve just now, and a moment later somebody may: a breaker closes, a limit is free."""
    if error.code == "rate_limit_exceeded":
        return True
    if error.code != "no_candidates":
        return False
    excluded = error.details.get("excluded", {}).values()
    return any(one["by"] in _PASSING for one in excluded)


def shutting_down() -> RouteError:
    """What a request is told whose answer would take longer than a stopping gateway waits."""
    return RouteError("the gateway is shutting down", status=503, code="shutting_down", retry_after_s=1.0)


_STORMS = frozenset({"model_budget", "fleet_budget"})
_PASSING = frozenset({"filter.health"})  # what excludes for the moment; the others exclude the request as it is


def event_object(error: BackendError | RouteError, names: ReplicaNames, request_id: str) -> dict[str, Any]:
    """What ends a broken stream, as `error_object` has it."""
    if isinstance(error, RouteError):
        return error_object(error, names, request_id)
    broken = RouteError(
        f"the answer broke off: {error.message}",
        code="stream_interrupted",
        details={"fault": error.kind.value},
    )
    return error_object(broken, names, request_id)


def error_event(error: BackendError | RouteError, names: ReplicaNames, request_id: str) -> bytes:
    """The server-sent event that ends a broken stream; OpenAI's clients raise it as an ``APIError``."""
    return b"data: " + orjson.dumps(event_object(error, names, request_id)) + b"\n\n"
