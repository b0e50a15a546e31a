"""The attempts of one request: who is next after a failed call, after how long, and why nobody is any more."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import attrs

from kvfleet.clock import Clock, SystemClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault, RouteError
from kvfleet.router.retry_budget import RetryBudget
from kvfleet.router.verdicts import exhausted

__all__ = ["Rules", "Tries", "Try"]

T = TypeVar("T")

Try = Callable[[ModelConfig, float | None, str], Awaitable[T]]
"""Makes one attempt: whom to call, seconds to the first byte (None for the model's own), and why."""

# Where a moment later all may be well. Who kept silent is not asked again: its silence has cost enough.
_PASSING = frozenset(
    {
        *(Fault.CONNECT, Fault.DISCONNECTED, Fault.PROTOCOL),
        *(Fault.RATE_LIMITED, Fault.OVERLOADED, Fault.SERVER_ERROR),
    }
)
# Nobody can help: the request itself is at fault, or its time is up.
_FINAL = frozenset({Fault.BAD_REQUEST, Fault.CONTENT_POLICY, Fault.CONTEXT_LENGTH, Fault.DEADLINE, Fault.CANCELLED})

_MOST_JITTER_S = 1.0


class Rules(Protocol):
    """What a request's tries go by; see `kvfleet.router.attempts.FallbackRules`."""

    @property
    def max_attempts(self) -> int:
        """Most backend calls."""

    @property
    def promote_on_timeout(self) -> bool:
        """False if a timeout ends the search."""

    @property
    def backoff_ms(self) -> float:
        """First wait before a replica is asked again."""

    @property
    def longest_wait_ms(self) -> float:
        """Longest such wait."""

    def order(self, ranked: Sequence[ModelConfig]) -> Iterable[ModelConfig]:
        """Whom to ask, one after the other."""

    def worth_trying(self, queue: list[ModelConfig], failed: ModelConfig, error: BackendError) -> list[ModelConfig]:
        """Who of those not asked yet may still answer after a failure."""

    def may_repeat(self, failed: ModelConfig) -> bool:
        """True if a replica may be asked again."""

    def timeout_s(self, candidate: ModelConfig, *, is_stream: bool) -> float | None:
        """Seconds to the first byte; None for the model's own."""


@attrs.frozen
class _Again:
    """A replica that may be asked again, from a moment on."""

    from_s: float
    model: ModelConfig


@attrs.define(kw_only=True)
class Tries:
    """One request's tries.

    Attributes:
        rules: What they go by.
        ranked: The candidates, best first.
        budget: What retries are paid from; None if they cost nothing.
        by_s: When the request's first byte must be there, by the clock; nothing is begun later.
        reserves: Asked once, when nobody else is left: others who would rather be left alone for now.
        clock, chance: The time, and randomness for the waits.
        sleep: Waits.
        faults: What has failed so far; who was not called, because of its breaker, uses up no attempt.
        stopped: Why no more is tried: ``final``, ``timeout``, ``nobody_left``, ``max_attempts``, ``deadline``,
            ``retry_after`` (a wait that is too long), ``model_budget`` or ``fleet_budget``; empty before.
    """

    rules: Rules
    ranked: Sequence[ModelConfig]
    budget: RetryBudget | None = None
    by_s: float = math.inf
    reserves: Callable[[], Sequence[ModelConfig]] | None = None
    clock: Clock = attrs.field(factory=SystemClock)
    chance: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    faults: list[tuple[ModelConfig, BackendError]] = attrs.field(init=False, factory=list)
    stopped: str = attrs.field(init=False, default="")
    _queue: list[ModelConfig] = attrs.field(init=False)
    _again: list[_Again] = attrs.field(init=False, factory=list)

    @_queue.default
    def _in_order(self) -> list[ModelConfig]:
        return list(self.rules.order(self.ranked))

    async def first_answer(self, attempt: Try[T], *, is_stream: bool) -> T:
        """What the first attempt that works gives.

        Raises:
            RouteError: if none does.
        """
        first = self._queue[0]
        if self.budget is not None:
            self.budget.asked(first.name)
        try:
            return await attempt(first, self.rules.timeout_s(first, is_stream=is_stream), "first")
        except BackendError as error:
            return await self.next_answer(attempt, first, error, is_stream=is_stream)

    async def next_answer(self, attempt: Try[T], first: ModelConfig, error: BackendError, *, is_stream: bool) -> T:
        """The same, after the first attempt has failed.

        Raises:
            RouteError: if none works.
        """
        self._queue.remove(first)
        reason, candidate = error.kind.value, await self.after(first, error)
        while candidate is not None:
            try:
                return await attempt(candidate, self.rules.timeout_s(candidate, is_stream=is_stream), reason)
            except BackendError as failed:
                reason, candidate = failed.kind.value, await self.after(candidate, failed)
        raise self.error()

    async def after(self, failed: ModelConfig, error: BackendError) -> ModelConfig | None:
        """Whom to ask after a failure, once it is time to; None for nobody, and `stopped` says why."""
        self.faults.append((failed, error))
        self._queue = self.rules.worth_trying(self._queue, failed, error)
        if error.kind in _FINAL and not self._queue:
            return self._stop("final")
        if error.kind in (Fault.TIMEOUT, Fault.CONNECT_TIMEOUT) and not self.rules.promote_on_timeout:
            return self._stop("timeout")
        self._note(failed, error)
        is_called = error.kind is not Fault.CIRCUIT_OPEN
        if is_called and sum(one.kind is not Fault.CIRCUIT_OPEN for _, one in self.faults) >= self.rules.max_attempts:
            return self._stop("max_attempts")
        now_s = self.clock.now_s()
        if now_s >= self.by_s:
            return self._stop("deadline")
        wait_s, chosen = self._next(now_s)
        if chosen is None or (is_called and not self._is_granted()):
            return None  # who was not called has not used up what was granted for it
        if wait_s > 0:
            await self.sleep(wait_s)
        return chosen

    def error(self) -> RouteError:
        """The error for tries that all failed."""
        return exhausted(self.faults, stopped=self.stopped)

    # How

    def _note(self, failed: ModelConfig, error: BackendError) -> None:
        """Remember a replica that may answer a moment later."""
        if error.kind not in _PASSING:
            return
        times = sum(model.id == failed.id for model, _ in self.faults)
        if times <= failed.max_retries:
            self._again.append(_Again(self.clock.now_s() + self._wait_s(times, error), failed))

    def _wait_s(self, times: int, error: BackendError) -> float:
        """Backoff that doubles, with jitter; or what the backend asked for, and a little more, but never less."""
        if error.retry_after_s is not None:
            return error.retry_after_s + self.chance() * min(error.retry_after_s / 4, _MOST_JITTER_S)
        return float(self.rules.backoff_ms / 1000 * 2 ** (times - 1) * (0.5 + self.chance() / 2))

    def _next(self, now_s: float) -> tuple[float, ModelConfig | None]:
        """Another replica at once, or else the one that may be asked again first, and how long that is."""
        if not self._queue and self.reserves is not None:
            self._queue, self.reserves = list(self.reserves()), None
        if self._queue:
            return 0.0, self._queue.pop(0)
        able = [one for one in self._again if self.rules.may_repeat(one.model)]
        if not able:
            return 0.0, self._stop("nobody_left")
        first = min(able, key=lambda one: one.from_s)
        wait_s = max(first.from_s - now_s, 0.0)
        if wait_s > self.rules.longest_wait_ms / 1000:
            return 0.0, self._stop("retry_after")
        if now_s + wait_s >= self.by_s:
            return 0.0, self._stop("deadline")
        self._again.remove(first)
        return wait_s, first.model

    def _is_granted(self) -> bool:
        whose = "" if self.budget is None else self.budget.take(self.faults[0][0].name)
        if whose:
            self._stop(f"{whose}_budget")
        return not whose

    def _stop(self, why: str) -> ModelConfig | None:
        """Nobody, and why."""
        self.stopped = why
        return None
