"""Which attempts are made for a request: who is next after a failed call, for how long, and what is said at the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Self, TypeVar

import attrs

from kvfleet.config.fields import flag, listing, number
from kvfleet.config.schema import FallbackConfig, ModelConfig
from kvfleet.errors import AttemptsExhaustedError, BackendError, Fault

__all__ = ["FallbackRules", "Try", "exhausted"]

T = TypeVar("T")

_TIMEOUTS = (Fault.TIMEOUT, Fault.CONNECT_TIMEOUT)

Try = Callable[[ModelConfig, float | None, str], Awaitable[T]]
"""Makes one attempt: whom to call, seconds to the first byte (None for the model's own), and why."""


@attrs.define(kw_only=True)
class FallbackRules:
    """Which attempts are made, in which order, and how long each may take; the same with and without a pipeline."""

    max_attempts: int = number(3, ge=1, le=20, doc="Most backend calls for one request.")
    timeout_ms: float | None = number(
        None,
        gt=0,
        unit="ms",
        doc="Longest wait for a stream's first token in one attempt; the model's `timeout_seconds` if absent. "
        "A whole answer, whose first byte is its last, may always take the model's `timeout_seconds`.",
    )
    promote_on_timeout: bool = flag(True, doc="A timeout also moves on to the next candidate.")
    fallback_order: tuple[str, ...] = listing(
        (), doc="Models to try after the first choice, in this order; the ranking's order if empty.", refers_to="model"
    )

    @classmethod
    def of(cls, config: FallbackConfig) -> Self:
        """The rules of a section `fallback:`; switched off, only one attempt is made."""
        return cls(
            max_attempts=config.max_attempts if config.enabled else 1,
            timeout_ms=config.timeout_ms,
            promote_on_timeout=config.promote_on_timeout,
            fallback_order=config.fallback_order,
        )

    async def first_answer(self, ranked: Sequence[ModelConfig], attempt: Try[T], *, is_stream: bool) -> T:
        """What the first attempt that works gives.

        Raises:
            AttemptsExhaustedError: if none does.
        """
        faults: list[tuple[ModelConfig, BackendError]] = []
        reason = "first"
        queue = list(self.order(ranked))
        while queue and len(faults) < self.max_attempts:
            candidate = queue.pop(0)
            try:
                return await attempt(candidate, self.timeout_s(candidate, is_stream=is_stream), reason)
            except BackendError as error:
                faults.append((candidate, error))
                reason = error.kind.value
                queue = self.worth_trying(queue, candidate, error)
        raise exhausted(faults)

    def order(self, ranked: Sequence[ModelConfig]) -> Iterable[ModelConfig]:
        """The first choice, then its model's other replicas and the models of `fallback_order`; else as ranked."""
        if not self.fallback_order:
            return ranked
        first = ranked[0].name
        wanted = (first, *(name for name in self.fallback_order if name != first))
        return [model for name in wanted for model in ranked if model.name == name]

    def timeout_s(self, candidate: ModelConfig, *, is_stream: bool) -> float | None:
        """Seconds to the first byte of this attempt; None for the model's own limit."""
        if self.timeout_ms is None:
            return None
        limit_s = self.timeout_ms / 1000
        return limit_s if is_stream else max(limit_s, candidate.timeout_seconds)

    def worth_trying(self, queue: list[ModelConfig], failed: ModelConfig, error: BackendError) -> list[ModelConfig]:
        """Who may still answer after this failure."""
        kind = error.kind
        if kind in _TIMEOUTS and not self.promote_on_timeout:
            return []
        if kind is Fault.CONTEXT_LENGTH:
            return [model for model in queue if _window(model) > _window(failed)]
        if kind.is_callers:
            return []
        if kind in (Fault.NOT_FOUND, Fault.UNAUTHORIZED):
            return [model for model in queue if model.endpoint != failed.endpoint or model.name != failed.name]
        return queue


def _window(model: ModelConfig) -> int:
    return model.capabilities.max_context_window or 0


def exhausted(faults: Sequence[tuple[ModelConfig, BackendError]]) -> AttemptsExhaustedError:
    """The error for attempts that all failed: the caller's own fault as it is, else the most telling status."""
    model, last = faults[-1]
    attempts = [{"model": m.name, "fault": e.kind.value} for m, e in faults]
    details: dict[str, object] = {"attempts": attempts}
    if last.body is not None:
        details["backend_error"] = last.body
    status, code = _verdict(model, last, [e.kind for _, e in faults])
    tried = f" after {len(faults)} attempts" if len(faults) > 1 else ""
    waits = [e.retry_after_s for _, e in faults if e.retry_after_s is not None]
    return AttemptsExhaustedError(
        f"{model.name} did not answer{tried}: {last.message}",
        status=status,
        code=code,
        retry_after_s=min(waits) if waits else None,
        details=details,
    )


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
    (frozenset({*_TIMEOUTS, Fault.IDLE_TIMEOUT}), 504, "backend_timeout"),
)
