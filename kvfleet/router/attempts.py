"""Which attempts are made for a request: who is next after a failed call, for how long, and at what price."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import attrs

from kvfleet.config.fields import flag, listing, number
from kvfleet.config.schema import FallbackConfig, ModelConfig
from kvfleet.errors import BackendError, Fault

__all__ = ["FallbackRules"]

_USUAL_S = attrs.fields(ModelConfig).timeout_seconds.default
_TIMEOUTS = (Fault.TIMEOUT, Fault.CONNECT_TIMEOUT)
_NO_TIME = (Fault.DEADLINE, Fault.CANCELLED)


@attrs.define(kw_only=True)
class FallbackRules:
    """Which attempts are made, in which order, and how long each may take; the same with and without a pipeline."""

    max_attempts: int = number(3, ge=1, le=20, doc="Most backend calls for one request.")
    timeout_ms: float | None = number(
        None,
        gt=0,
        unit="ms",
        doc="Longest wait for a stream's first token in one attempt; the model's `timeout_seconds` if that is absent, "
        "or given and shorter. A whole answer, whose first byte is its last, may always take the model's "
        "`timeout_seconds`.",
    )
    promote_on_timeout: bool = flag(True, doc="A timeout also moves on to the next candidate.")
    fallback_order: tuple[str, ...] = listing(
        (), doc="Models to try after the first choice, in this order; the ranking's order if empty.", refers_to="model"
    )
    backoff_ms: float = number(
        100,
        gt=0,
        unit="ms",
        doc="Wait before a replica is asked again, once nobody else is left; doubled each time, less up to half of it "
        "by chance. A backend's `Retry-After` counts instead.",
    )
    longest_wait_ms: float = number(
        5000,
        ge=0,
        unit="ms",
        doc="Longest such wait; a longer `Retry-After` is passed on to the client.",
    )

    @classmethod
    def of(cls, config: FallbackConfig) -> Self:
        """The rules of a section `fallback:`; switched off, only one attempt is made."""
        return cls(
            max_attempts=config.max_attempts if config.enabled else 1,
            timeout_ms=config.timeout_ms,
            promote_on_timeout=config.promote_on_timeout,
            fallback_order=config.fallback_order,
            backoff_ms=config.backoff_ms,
            longest_wait_ms=config.longest_wait_ms,
        )

    def order(self, ranked: Sequence[ModelConfig]) -> Iterable[ModelConfig]:
        """The first choice, then its model's other replicas and the models of `fallback_order`; else as ranked."""
        if not self.fallback_order:
            return ranked
        first = ranked[0].name
        wanted = (first, *(name for name in self.fallback_order if name != first))
        return [model for name in wanted for model in ranked if model.name == name]

    def timeout_s(self, candidate: ModelConfig, *, is_stream: bool) -> float | None:
        """Seconds to the first byte of this attempt; None for the model's own limit.

        That one counts too where it was given and is shorter: who says of a model that it has five seconds means it.
        """
        if self.timeout_ms is None:
            return None
        limit_s, own_s = self.timeout_ms / 1000, candidate.timeout_seconds
        if own_s < limit_s and own_s != _USUAL_S:
            return own_s
        return limit_s if is_stream else max(limit_s, own_s)

    def worth_trying(self, queue: list[ModelConfig], failed: ModelConfig, error: BackendError) -> list[ModelConfig]:
        """Who may still answer after this failure."""
        kind = error.kind
        if kind in _TIMEOUTS and not self.promote_on_timeout:
            return []
        if kind is Fault.CONTEXT_LENGTH:
            return [model for model in queue if _window(model) > _window(failed)]
        if kind.is_callers or kind in _NO_TIME:
            return []
        if kind in (Fault.NOT_FOUND, Fault.UNAUTHORIZED):
            return [model for model in queue if model.endpoint != failed.endpoint or model.name != failed.name]
        return queue

    def may_repeat(self, failed: ModelConfig) -> bool:
        """True if a replica that failed may be asked again; how often is the model's `max_retries`."""
        return failed.max_retries > 0


def _window(model: ModelConfig) -> int:
    return model.capabilities.max_context_window or 0
