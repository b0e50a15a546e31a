"""Execution that takes personal data out of what leaves the house."""

from __future__ import annotations

from collections.abc import Iterable

import anyio.to_thread
import attrs

from kvfleet.builtin.execute import Fallback
from kvfleet.config.fields import listing
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Answer, Attempt, Kind, Rewrite, RouteRequest, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.policy.pii import PIIDetector
from kvfleet.policy.redaction import Redaction
from kvfleet.router.scoring import Ranking

__all__ = ["Redacting"]

_MOST_IN_LOOP_BYTES = 4096  # 64 KB of nothing but finds take 60 to 150 ms; a thread lets other requests go on meanwhile


@attrs.define(kw_only=True)
class Redacting(Fallback):
    """As `execute.fallback`, but models that are not private get the request without personal data.

    Each value is replaced by a placeholder such as ``[EMAIL_1]``, and put back where the answer speaks of it, also in
    streams. Private models get the request as it is. What no pattern finds (names, places) leaves as it is.
    """

    types: tuple[str, ...] = listing((), doc="Types to take out; all there are if empty.", example=["email", "ssn"])
    _detector: PIIDetector = attrs.field(init=False, repr=False, eq=False)

    @_detector.default
    def _make_detector(self) -> PIIDetector:
        """A detector of the wanted types.

        Raises:
            ValueError: for a type there is no pattern for; the build makes a finding of it.
        """
        return PIIDetector.of_types(self.types)

    async def execute(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt) -> Answer:
        """The first answer, its placeholders replaced.

        Raises:
            AttemptsExhaustedError: if there is none.
        """
        return await Fallback.execute(self, ctx, ranking, _Redacted(ctx.request, attempt, self._detector))


@attrs.define
class _Redacted:
    """Makes attempts of one request; the redaction is made for the first backend that needs it, and kept."""

    request: RouteRequest
    attempt: Attempt
    detector: PIIDetector
    redaction: Redaction | None = None
    is_made: bool = False

    async def __call__(
        self,
        candidate: ModelConfig,
        *,
        timeout_s: float | None = None,
        reason: str = "first",
        rewrite: Rewrite | None = None,
    ) -> Answer:
        """See `kvfleet.plugin.contract.Attempt`."""
        if not candidate.is_private:
            rewrite = await self._made()
        return await self.attempt(candidate, timeout_s=timeout_s, reason=reason, rewrite=rewrite)

    async def _made(self) -> Redaction | None:
        if not self.is_made:
            body, detector = self.request.body, self.detector
            if 0 < len(self.request.raw) <= _MOST_IN_LOOP_BYTES:
                self.redaction = Redaction.of(body, detector)
            else:
                self.redaction = await anyio.to_thread.run_sync(Redaction.of, body, detector)
            self.is_made = True
        return self.redaction


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The execute component that redacts."""
    yield Component(Kind.EXECUTE, "redacting", Redacting)
