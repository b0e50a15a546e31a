"""Execution that takes personal data out of what leaves the house."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import anyio.to_thread
import attrs

from kvfleet.adapters.call import Reply
from kvfleet.builtin.execute import Fallback
from kvfleet.config.fields import listing
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Answer, Attempt, Kind, Rewrite, RouteRequest, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.policy.pii import PIIDetector
from kvfleet.policy.redaction import Redaction
from kvfleet.router.scoring import Ranking

__all__ = ["Redacted", "Redacting"]

_MOST_IN_LOOP_BYTES = 4096  # 64 KB of nothing but finds take 60 to 150 ms; a thread lets other requests go on meanwhile


@attrs.define(kw_only=True)
class Redacting(Fallback):
    """As `execute.fallback`, but models that are not private get the request without personal data.

    Each value is replaced by a placeholder such as ``[EMAIL_1]``, and put back where the answer speaks of it, also in
    streams. Private models get the request as it is. What no pattern finds (names, places) leaves as it is.
    """

    types: tuple[str, ...] = listing((), doc="Types to take out; all there are if empty.", example=["email", "ssn"])
    reads_answers: ClassVar[bool] = True
    judges_texts: ClassVar[bool] = True
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
        return await Fallback.execute(self, ctx, ranking, Redacted(ctx.request, attempt, self._detector))


@attrs.frozen
class _Both:
    """A redaction of what another rewrite sends; the answer goes back through both."""

    redaction: Redaction
    other: Rewrite

    @property
    def body(self) -> Mapping[str, Any]:
        return self.redaction.body

    @property
    def types(self) -> Sequence[str]:
        return (*self.redaction.types, *self.other.types)

    def restore(self, reply: Reply) -> Reply:
        return self.other.restore(self.redaction.restore(reply))


@attrs.define
class Redacted:
    """Makes attempts of one request; models that are not private get it redacted.

    The redaction is made for the first backend that needs it, and kept.
    """

    request: RouteRequest
    attempt: Attempt
    detector: PIIDetector
    _redaction: Redaction | None = attrs.field(init=False, default=None)
    _is_made: bool = attrs.field(init=False, default=False)

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
            rewrite = await self._own() if rewrite is None else await self._both(rewrite)
        return await self.attempt(candidate, timeout_s=timeout_s, reason=reason, rewrite=rewrite)

    async def _own(self) -> Redaction | None:
        if not self._is_made:
            self._redaction = await self._redact(self.request.body, len(self.request.raw))
            self._is_made = True
        return self._redaction

    async def _both(self, rewrite: Rewrite) -> Rewrite:
        redaction = await self._redact(rewrite.body, 0)
        return rewrite if redaction is None else _Both(redaction, rewrite)

    async def _redact(self, body: Mapping[str, Any], size: int) -> Redaction | None:
        """Redact a body of so many bytes; 0 if nobody counted them."""
        if 0 < size <= _MOST_IN_LOOP_BYTES:
            return Redaction.of(body, self.detector)
        return await anyio.to_thread.run_sync(Redaction.of, body, self.detector)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The execute component that redacts."""
    yield Component(Kind.EXECUTE, "redacting", Redacting)
