"""A canary: a new model gets a small share of the traffic, more of it while it does well, and none once it does not.

The canary is compared with all other models by what the routes say: its error rate, and the 95th percentile of its
answers' times. Nothing is decided before both sides have enough answers. Where it stands is kept over a restart.
"""

from __future__ import annotations

import enum
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import attrs
import xxhash

from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import choice, listing, number, section, text
from kvfleet.config.schema import ModelConfig, ScoringWeights
from kvfleet.errors import ComponentError
from kvfleet.router.arms import ArmStore
from kvfleet.router.learning import result_of
from kvfleet.router.scoring import Ranking, ScoringContext, ScoringEngine, arranged
from kvfleet.telemetry.metrics import MetricsExporter

if TYPE_CHECKING:
    from kvfleet.plugin.component import Services
    from kvfleet.plugin.contract import Outcome

__all__ = ["Arm", "CanaryStatus", "CanaryStrategy"]

log = logging.getLogger(__name__)

_NEUTRAL = ScoringContext()
_WINDOW = 500
_SAVE_EVERY_S = 10.0
_Z = 1.645  # one-sided, 95 in 100


class CanaryStatus(enum.StrEnum):
    """Where a canary stands."""

    RUNNING = "running"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"


@attrs.define
class Arm:
    """What is known of one side since the last step: answers, failures, and the times of the last answers."""

    requests: int = 0
    failures: int = 0
    times_ms: deque[float] = attrs.field(factory=lambda: deque(maxlen=_WINDOW), repr=False)

    def add(self, latency_ms: float | None) -> None:
        """Learn of one answer by its time, or of a failure by None."""
        self.requests += 1
        if latency_ms is None:
            self.failures += 1
        else:
            self.times_ms.append(latency_ms)

    @property
    def error_rate(self) -> float:
        """Failures in all."""
        return self.failures / self.requests if self.requests else 0.0

    @property
    def least_error_rate(self) -> float:
        """The error rate that is at least likely: the lower end of Wilson's interval (1927)."""
        n, p = self.requests, self.error_rate
        if not n:
            return 0.0
        middle = p + _Z * _Z / (2 * n)
        return max(0.0, (middle - _Z * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))) / (1 + _Z * _Z / n))

    @property
    def p95_ms(self) -> float | None:
        """The time that 95 of 100 answers stay below; None without answers."""
        times = sorted(self.times_ms)
        return times[min(len(times) - 1, int(0.95 * len(times)))] if times else None


@attrs.define
class CanaryStrategy:
    """Try a new model on a share of the traffic that grows step by step, and take it out by itself if it does badly.

    All other models, and who comes after the canary, are ranked by the weighted score. A caller who got the canary at
    one step has it at every later one. After a rollback the canary is no fallback either; another `salt` begins anew.
    """

    canary: str = text(doc="The new model.", refers_to="model")
    steps: tuple[float, ...] = listing(
        (0.05, 0.25, 0.5, 1.0), doc="Its share of the requests, step by step, each 0 to 1.", ge=1
    )
    sticky: str = choice(
        "session", of=("session", "tenant", "none"), doc="What keeps to one side: a session, a tenant, or nothing."
    )
    salt: str = text("", doc="Draws other callers than another salt; a new one also begins anew.")
    min_requests: int = number(50, ge=1, doc="Nothing is decided before both sides have so many in a step.")
    hold_s: float = number(300.0, ge=0, unit="s", doc="Least time on a step before the next.")
    max_error_increase: float = number(
        0.02, ge=0, le=1, doc="How much greater its error rate may be than that of the others."
    )
    max_latency_ratio: float = number(
        1.5, gt=0, doc="How many times as long as the others' its answers may take, at the 95th percentile."
    )
    weights: ScoringWeights = section(ScoringWeights, doc="The weighted score of all others.")
    state_path: str = text("", doc="The SQLite file it is kept in; in the user's state directory if empty.")
    status: CanaryStatus = attrs.field(init=False, default=CanaryStatus.RUNNING)
    step: int = attrs.field(init=False, default=0)
    reason: str = attrs.field(init=False, default="")
    _own: Arm = attrs.field(init=False, factory=Arm, repr=False)
    _rest: Arm = attrs.field(init=False, factory=Arm, repr=False)
    _engine: ScoringEngine = attrs.field(init=False, repr=False, eq=False)
    _since_s: float = attrs.field(init=False, default=0.0, repr=False)
    _saved_s: float = attrs.field(init=False, default=0.0, repr=False)
    _is_dirty: bool = attrs.field(init=False, default=False, repr=False)
    _store: ArmStore | None = attrs.field(init=False, default=None, repr=False)
    _clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False, eq=False)
    _metrics: MetricsExporter = attrs.field(
        init=False, factory=lambda: MetricsExporter(enabled=False), repr=False, eq=False
    )

    @_engine.default
    def _make_engine(self) -> ScoringEngine:
        return ScoringEngine(self.weights)

    def __attrs_post_init__(self) -> None:
        """Check the steps.

        Raises:
            ValueError: if one is no share, or less than the one before.
        """
        if any(not 0 < share <= 1 for share in self.steps) or list(self.steps) != sorted(self.steps):
            raise ValueError("steps must be shares above 0 and at most 1, each greater than the one before")
        self._since_s = self._clock.now_s()

    @property
    def share(self) -> float:
        """The canary's share of the requests now."""
        if self.status is CanaryStatus.RUNNING:
            return self.steps[self.step]
        return 0.0 if self.status is CanaryStatus.ROLLED_BACK else self.steps[-1]

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the canary first or last, or leave it out after a rollback."""
        context = context or _NEUTRAL
        found = self._engine.score_candidates(models, context)
        ranked, totals, terms = found.models, found.totals, found.terms
        own = [i for i, model in enumerate(ranked) if model.name == self.canary]
        rest = [i for i, model in enumerate(ranked) if model.name != self.canary]
        if not own or not rest:
            return arranged(ranked, range(len(ranked)), totals, terms=terms, mode="no choice")
        if self.status is CanaryStatus.ROLLED_BACK:
            kept = {name: [values[i] for i in rest] for name, values in terms.items()}
            left = [ranked[i] for i in rest]
            return Ranking(left, [totals[i] for i in rest], terms=kept, mode="rolled back")
        is_first = self._draw(context) < self.share
        word = f"{'canary' if is_first else 'baseline'} at {self.share:.0%}"
        return arranged(ranked, own + rest if is_first else rest + own, totals, terms=terms, mode=word)

    def _draw(self, context: ScoringContext) -> float:
        """A number 0..1, always the same for one caller."""
        caller = {"session": context.session, "tenant": context.tenant_id}.get(self.sticky) or ""
        key = f"{self.sticky}:{caller}" if caller else f"request:{context.seed}"
        return xxhash.xxh3_64_intdigest(f"{self.salt}\0{key}".encode("utf-8", "surrogatepass")) / 2**64

    # Watching

    async def observe(self, outcome: Outcome) -> None:
        """Learn how a route went, and take or leave a step."""
        result = result_of(outcome)
        for name in result.failed:
            self._learn(name, None)
        if result.served:
            self._learn(result.served, result.latency_ms)
        if self.status is CanaryStatus.RUNNING:
            self._decide()
        if self._store is not None and self._is_dirty and self._clock.now_s() - self._saved_s >= _SAVE_EVERY_S:
            await self._save()

    def _learn(self, model: str, latency_ms: float | None) -> None:
        is_own = model == self.canary
        (self._own if is_own else self._rest).add(latency_ms)
        self._is_dirty = True
        word = "failed" if latency_ms is None else "answered"
        self._metrics.count("kvfleet_canary_requests_total", self.canary, "canary" if is_own else "baseline", word)

    def _decide(self) -> None:
        own, rest = self._own, self._rest
        if min(own.requests, rest.requests) < self.min_requests:
            return
        if wrong := self._wrong():
            self._turn(CanaryStatus.ROLLED_BACK, wrong)
        elif (
            self._clock.now_s() - self._since_s < self.hold_s
            or own.error_rate > rest.error_rate + self.max_error_increase
        ):
            return
        elif self.step + 1 < len(self.steps):
            self.step += 1
            self._turn(CanaryStatus.RUNNING, f"step {self.step + 1} of {len(self.steps)}")
        else:
            self._turn(CanaryStatus.PROMOTED, "every step went well")

    def _wrong(self) -> str:
        """What speaks against the canary; empty for nothing."""
        own, rest = self._own, self._rest
        if own.least_error_rate > rest.error_rate + self.max_error_increase:
            return f"{own.error_rate:.1%} of its calls fail, and {rest.error_rate:.1%} of the others'"
        mine, theirs = own.p95_ms, rest.p95_ms
        if mine is not None and theirs is not None and mine > theirs * self.max_latency_ratio:
            return f"its answers take {mine:.0f} ms (p95), and the others' {theirs:.0f} ms"
        return ""

    def _turn(self, status: CanaryStatus, reason: str) -> None:
        self.status, self.reason = status, reason
        self._since_s, self._own = self._clock.now_s(), Arm()
        if self.share < 1:  # else nobody is left to compare with, and what was known of the others counts on
            self._rest = Arm()
        self._is_dirty, self._saved_s = True, -math.inf
        self._metrics.count("kvfleet_canary_changes_total", self.canary, str(status))
        level = logging.WARNING if status is CanaryStatus.ROLLED_BACK else logging.INFO
        log.log(level, "canary model=%s status=%s share=%g reason=%s", self.canary, status, self.share, reason)

    def state(self) -> Mapping[str, Any]:
        """Where it stands, and what it is compared by."""
        told: dict[str, Any] = {"canary": self.canary, "status": str(self.status), "share": self.share}
        told |= {"step": self.step + 1, "steps": len(self.steps), "reason": self.reason}
        for name, arm in (("own", self._own), ("others", self._rest)):
            told[name] = {"requests": arm.requests, "error_rate": arm.error_rate, "p95_ms": arm.p95_ms}
        return told

    # Keeping

    def provision(self, services: Services) -> None:
        """Find the place of the state."""
        self._clock, self._metrics = services.clock, services.metrics
        self._since_s = self._clock.now_s()
        self._store = ArmStore.of(self.state_path, services)

    @property
    def _key(self) -> str:
        return f"canary {self.canary} {self.salt}"

    async def aopen(self) -> None:
        """Go on where the last run ended.

        Raises:
            ComponentError: if the state cannot be read.
        """
        self._since_s = self._clock.now_s()
        if self._store is None:
            return
        kept = (await anyio.to_thread.run_sync(self._store.load, self._key)).get(self.canary)
        if kept is None:
            return
        try:
            self.status, self.reason = CanaryStatus(kept["status"]), str(kept["reason"])
            self.step = min(int(kept["step"]), len(self.steps) - 1)
            self._own, self._rest = _arm(kept["own"]), _arm(kept["rest"])
        except (KeyError, TypeError, ValueError) as error:
            raise ComponentError(f"the canary's state at {self._store.path} is not from this version") from error

    def inherit(self, before: CanaryStrategy) -> None:
        """Go on where the same canary was before a reload, and see to its keeping instead."""
        if before._key != self._key:
            return
        self.status, self.reason = before.status, before.reason
        self.step = min(before.step, len(self.steps) - 1)
        self._own, self._rest, self._since_s = before._own, before._rest, before._since_s
        self._is_dirty, before._store = True, None

    async def aclose(self) -> None:
        """Keep where it stands."""
        if self._store is not None and self._is_dirty:
            await self._save()

    async def _save(self) -> None:
        """Write the state, in a thread; a disk that fails costs the state, never a request."""
        assert self._store is not None  # noqa: S101 - the callers looked
        kept = {
            "status": str(self.status),
            "reason": self.reason,
            "step": self.step,
            "own": [self._own.requests, self._own.failures, list(self._own.times_ms)],
            "rest": [self._rest.requests, self._rest.failures, list(self._rest.times_ms)],
        }
        self._is_dirty, self._saved_s = False, self._clock.now_s()
        try:
            await anyio.to_thread.run_sync(self._store.save, self._key, {self.canary: kept})
        except ComponentError as error:
            self._is_dirty = True
            log.warning("canary_not_kept error=%s", error)


def _arm(kept: Sequence[Any]) -> Arm:
    requests, failures, times = kept
    arm = Arm(int(requests), int(failures))
    arm.times_ms.extend(map(float, times))
    return arm
