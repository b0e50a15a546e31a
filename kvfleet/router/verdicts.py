"""What is said when every attempt failed: the caller's own fault as it is, else the most telling status."""

from __future__ import annotations

from collections.abc import Sequence

from kvfleet.config.schema import ModelConfig
from kvfleet.errors import AttemptsExhaustedError, BackendError, DeadlineExceededError, Fault, RouteError

__all__ = ["exhausted"]

_TIMEOUTS = (Fault.TIMEOUT, Fault.CONNECT_TIMEOUT, Fault.IDLE_TIMEOUT)
_AS_IT_IS = {
    Fault.BAD_REQUEST: "invalid_request",
    Fault.CONTEXT_LENGTH: "context_length_exceeded",
    Fault.CONTENT_POLICY: "content_policy_violation",
    Fault.NOT_FOUND: "model_not_found",
    Fault.UNAUTHORIZED: "unauthorized",
}
_TELLING = (
    (frozenset({Fault.CIRCUIT_OPEN}), 503, "no_candidates"),
    (frozenset({Fault.RATE_LIMITED}), 429, "rate_limit_exceeded"),
    (frozenset({Fault.OVERLOADED, Fault.RATE_LIMITED}), 503, "backend_overloaded"),
    (frozenset(_TIMEOUTS), 504, "backend_timeout"),
)


def exhausted(faults: Sequence[tuple[ModelConfig, BackendError]], *, stopped: str = "") -> RouteError:
    """The error for attempts that all failed.

    Args:
        faults: What failed, in order.
        stopped: Why no more was tried, as `kvfleet.router.tries.Tries` says it; programs find it in the details.
    """
    called = [one for one in faults if one[1].kind is not Fault.CIRCUIT_OPEN] or faults
    model, last = called[-1]
    details: dict[str, object] = {"attempts": [_told(model, error) for model, error in faults]}
    if stopped:
        details["stopped"] = stopped
    if last.body is not None:
        details["backend_error"] = last.body
    tried = f" after {len(called)} attempts" if len(called) > 1 else ""
    message = f"{model.name} did not answer{tried}: {last.message}"
    if last.kind is Fault.DEADLINE or stopped == "deadline":
        return DeadlineExceededError(message, details=details)
    status, code = _verdict(model, last, [error.kind for _, error in called])
    waits = [error.retry_after_s for _, error in faults if error.retry_after_s is not None]
    return AttemptsExhaustedError(
        message, status=status, code=code, retry_after_s=min(waits) if waits else None, details=details
    )


def _told(model: ModelConfig, error: BackendError) -> dict[str, str]:
    told = {"model": model.name, "fault": error.kind.value}
    return {**told, "limit": error.limit} if error.limit else told


def _verdict(model: ModelConfig, last: BackendError, kinds: Sequence[Fault]) -> tuple[int, str]:
    """HTTP status and code."""
    kind = last.kind
    if kind is Fault.UNAUTHORIZED and model.api_key:
        return 502, "backend_unauthorized"  # our credential is wrong, not the caller's
    if kind in _AS_IT_IS:
        return last.status or 400, _AS_IT_IS[kind]
    for telling, status, code in _TELLING:
        if all(one in telling for one in kinds):
            return status, code
    return 502, "backend_failed"
