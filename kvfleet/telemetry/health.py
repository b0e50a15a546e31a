"""Which endpoints may be used: what health checks found, and a circuit breaker that also counts live calls.

Checks and live calls are counted apart. An engine can be wedged and still answer its health check, so a passing check
does not forgive failed calls; it closes a breaker that failed checks opened, and lets one call try if the engine was
seen down meanwhile.

A breaker opens for one of three causes: failed checks, failed calls in a row, or an answer worse than that of the
model's other replicas (`kvfleet.telemetry.outliers`). It always ends in the same way: one call may try, and what comes
of it decides. An endpoint that has come back gets its usual share bit by bit (`HealthManager.share`).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Self

import attrs

from kvfleet.adapters.base import EndpointHealth
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import number
from kvfleet.config.health import HealthConfig
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import Fault
from kvfleet.telemetry.endpoint import BreakerNews, Endpoint
from kvfleet.telemetry.pools import Pools

__all__ = ["HealthManager"]

_MOST_ENDPOINTS = 16_384
_SOON_S = 1.0
_NO_EVIDENCE = frozenset({Fault.CANCELLED, Fault.DEADLINE})
_UNREACHABLE = frozenset({Fault.CONNECT, Fault.CONNECT_TIMEOUT})
_LEAST_SHARE = 0.1
"""Of its usual share, for an endpoint that has just come back."""
_TICK_S = 1e-6
"""Between two changes, so that the later one is known by its time."""
_PROBE_UNDER_WAY = "circuit half-open, its probe is under way"


@attrs.define(kw_only=True)
class HealthManager:
    """Health of every endpoint, and a circuit breaker for each.

    A breaker opens after `failure_threshold` failures in a row. After `recovery_timeout_seconds` it is half-open: one
    request may try the endpoint, and its outcome closes the breaker or opens it again. An endpoint nobody has heard
    of is available; knowledge that is too old counts as no knowledge.

    Attributes:
        pools: Which endpoints serve the same model.
        ejections: How often a breaker was opened, by (endpoint, cause); `overflow` for one that would have been if
            not too many of its model's replicas were out already.
        calls: By endpoint, of those of a model with several: calls that were answered, and failed calls.
        unserved: By replica: what its engine serves instead of its model, at the last check.

    Args:
        check_interval_seconds: Time between health checks.
        failure_threshold: Failures in a row that open the breaker.
        recovery_timeout_seconds: Time an open breaker waits before it lets one request try.
        stale_threshold_seconds: Age after which a check's finding is no longer believed.
        slow_start_seconds: Time in which the share of an endpoint that has come back grows to the usual one.
        clock: Read when something is recorded, and where a method is not given the time.
    """

    check_interval_seconds: float = number(30, gt=0, unit="s", doc="Time between health checks.")
    failure_threshold: int = number(3, ge=1, doc="Failures in a row that open the breaker.")
    recovery_timeout_seconds: float = number(60, gt=0, unit="s", doc="Time until an open breaker lets one request try.")
    stale_threshold_seconds: float = number(120, gt=0, unit="s", doc="Age after which a finding is not believed.")
    slow_start_seconds: float = number(0, ge=0, unit="s", doc="Time in which an endpoint's share grows again.")
    clock: Clock = attrs.field(factory=SystemClock)
    pools: Pools = attrs.field(factory=Pools)
    ejections: dict[tuple[str, ...], float] = attrs.field(init=False, factory=dict, repr=False)
    calls: dict[str, list[int]] = attrs.field(init=False, factory=dict, repr=False)
    unserved: dict[str, str] = attrs.field(init=False, factory=dict, repr=False)
    _known: dict[str, Endpoint] = attrs.field(init=False, factory=dict, repr=False)
    _open: set[str] = attrs.field(init=False, factory=set, repr=False)
    _unavailable: Mapping[str, str] = attrs.field(init=False, factory=lambda: MappingProxyType({}), repr=False)
    _panicking: Mapping[str, float] = attrs.field(init=False, factory=lambda: MappingProxyType({}), repr=False)
    _returned_s: dict[str, float] = attrs.field(init=False, factory=dict, repr=False)
    _recompute_at_s: float = attrs.field(init=False, default=float("inf"), repr=False)

    @classmethod
    def of(cls, config: HealthConfig, models: Iterable[ModelConfig], clock: Clock) -> Self:
        """The health of a fleet as configured."""
        made = cls(
            failure_threshold=config.failure_threshold,
            recovery_timeout_seconds=config.recovery_timeout_seconds,
            slow_start_seconds=config.slow_start_seconds,
            clock=clock,
            pools=Pools(config.max_ejection_percent, config.panic_threshold_percent),
        )
        made.register(models)
        return made

    def change(self, config: HealthConfig, models: Iterable[ModelConfig]) -> None:
        """Be configured otherwise from now on, for these replicas; what is known stays."""
        self.failure_threshold = config.failure_threshold
        self.recovery_timeout_seconds = config.recovery_timeout_seconds
        self.slow_start_seconds = config.slow_start_seconds
        self.pools = Pools(config.max_ejection_percent, config.panic_threshold_percent)
        self.register(models)

    def register(self, models: Iterable[ModelConfig]) -> None:
        """Know which endpoints serve the same model; what is known of those that stay is kept."""
        models = tuple(models)
        self.pools.register(models)
        self.unserved = {one.id: self.unserved[one.id] for one in models if one.id in self.unserved}
        peers = {one for pool in self.pools.endpoints.values() if len(pool) > 1 for one in pool}
        self.calls = {endpoint: self.calls.get(endpoint, [0, 0]) for endpoint in peers}

    # What happened

    def update_health(self, health: EndpointHealth) -> None:
        """Take in what a health check found."""
        known = self._of(health.endpoint)
        known.health, known.checked_s = health, self.clock.now_s()
        if not health.healthy:
            known.failed_checks += 1
            if known.failed_checks >= self.failure_threshold:
                self._trip(health.endpoint, known, "checks", f"{known.failed_checks} failed health checks")
            known.is_bounded = False
            return
        was_down, known.failed_checks = known.failed_checks > 0, 0
        if known.opened_by == "checks":
            self._close(health.endpoint, known)
        elif known.opened_by == "calls" and was_down:
            # It was down and is up again, as after a restart: that is no answered call, but a reason to try one.
            known.wait_s = 0.0
            self._changed(known)

    def update_served(self, replica: str, why_not: str) -> None:
        """Take in what an engine serves instead of a replica's model; empty if it serves that."""
        if why_not:
            self.unserved[replica] = why_not
        else:
            self.unserved.pop(replica, None)

    def begin(self, endpoint: str) -> bool:
        """A call to the endpoint starts; if its breaker is half-open, the call takes the one probe slot.

        A probe whose outcome never comes gives its slot back after `recovery_timeout_seconds`.

        Returns:
            False if the breaker is half-open and another call has the slot: then this one must not be made.
        """
        if endpoint not in self._open:
            return True
        known, now_s = self._known[endpoint], self.clock.now_s()
        if self._is_half_open(known, now_s):
            known.probe_until_s = now_s + self.recovery_timeout_seconds
            self._changed(known)
            return True
        return not self._waited(known, now_s) or endpoint not in self.unavailable(now_s)

    def record_success(self, endpoint: str) -> None:
        """A live call was answered."""
        calls = self.calls.get(endpoint)
        if calls is not None:
            calls[0] += 1
        known = self._known.get(endpoint)
        if known is None:
            return
        known.failed_calls = 0
        if known.opened_by:
            self._close(endpoint, known)

    def record_failure(self, endpoint: str, fault: Fault) -> None:
        """A live call failed.

        Only faults of the replica's own count (see `Fault.counts_against_replica`). Any other answer shows that the
        endpoint is alive and ends a probe well; a call that was given up shows nothing and only frees the slot.
        """
        if fault is Fault.CIRCUIT_OPEN:
            return
        if fault.counts_against_replica:
            known = self._of(endpoint)
            known.failed_calls += 1
            if endpoint in self.calls:
                self.calls[endpoint][1] += 1
            if known.opened_by or known.failed_calls >= self.failure_threshold:
                self._failed_too_often(endpoint, known, fault)
            return
        known_or_none = self._known.get(endpoint)
        if known_or_none is None or not known_or_none.opened_by:
            return
        if fault in _NO_EVIDENCE:
            known_or_none.probe_until_s = 0.0
            self._changed(known_or_none)
        elif self._waited(known_or_none, self.clock.now_s()):
            self._close(endpoint, known_or_none)

    def eject(self, endpoint: str, cause: str, reason: str, for_s: float) -> bool:
        """Leave an endpoint alone for so many seconds, for how it answers; False if too many of its pool are out."""
        if endpoint in self._open or not self._may_eject(endpoint):
            return False
        self._trip(endpoint, self._of(endpoint), cause, reason, for_s)
        return True

    def news(self, since_s: float) -> list[BreakerNews]:
        """How the breakers stand that are open, or came to stand otherwise since then."""
        known = self._known.items()
        return [one.news(endpoint) for endpoint, one in known if one.opened_by or one.changed_s >= since_s]

    def hear(self, news: BreakerNews) -> None:
        """Have a breaker stand as it does at another worker, if that is later than what is known here."""
        endpoint, known = news.endpoint, self._of(news.endpoint)
        if news.changed_s <= known.changed_s:
            return
        if not news.opened_by:
            if known.opened_by:
                self._close(endpoint, known)
        elif known.opened_by or not news.is_bounded or self.pools.may_eject(endpoint, self._open):
            known.take(news)
            self._returned_s.pop(endpoint, None)
            self._open.add(endpoint)
        self._recompute_at_s = 0.0
        known.changed_s = news.changed_s

    def retain(self, endpoints: Iterable[str]) -> None:
        """Forget every endpoint that is not one of these."""
        keep = frozenset(endpoints)
        for endpoint in [e for e in self._known if e not in keep]:
            self._forget(endpoint)

    # What follows

    def unavailable(self, now_s: float) -> Mapping[str, str]:
        """The endpoints that must not be called now, each with a short reason.

        The mapping is kept until something changes or a wait ends, so asking costs nothing. Do not hold on to it.
        """
        if now_s >= self._recompute_at_s:
            self._recompute(now_s)
        return self._unavailable

    def is_available(self, endpoint: str) -> bool:
        """True unless the endpoint's breaker is open, or half-open with its probe under way."""
        return endpoint not in self.unavailable(self.clock.now_s())

    def unavailable_reason(self, endpoint: str) -> str:
        """Why the endpoint must not be called now; empty if it may."""
        return self.unavailable(self.clock.now_s()).get(endpoint, "")

    def wait_s(self, endpoint: str, now_s: float) -> float | None:
        """Seconds until the endpoint may be tried again; None if it may be now.

        While a probe is under way its outcome decides, and it may come at any moment: then that is a second.
        """
        if endpoint not in self.unavailable(now_s):
            return None
        known = self._known[endpoint]
        return _SOON_S if self._waited(known, now_s) else known.opened_s + known.wait_s - now_s

    def is_tried(self, endpoint: str, now_s: float) -> bool:
        """True while a probe of the endpoint is under way, whose outcome may come at any moment."""
        return self.unavailable(now_s).get(endpoint) is _PROBE_UNDER_WAY

    @property
    def ejected(self) -> Container[str]:
        """The endpoints whose breaker is not closed."""
        return self._open

    @property
    def has_ejected(self) -> bool:
        """True if any breaker is not closed; asking costs nothing."""
        return bool(self._open)

    @property
    def panicking(self) -> Mapping[str, float]:
        """The models of which too few replicas may be called, so that all are; each with the share that may, 0..1.

        As of the last question after who is `unavailable`.
        """
        return self._panicking

    @property
    def is_any_returning(self) -> bool:
        """True if the share of an endpoint may be smaller than usual; asking costs nothing."""
        return bool(self._returned_s)

    def share(self, endpoint: str, now_s: float) -> float:
        """What an endpoint is to get of its usual share: less than 1 for a while after its return."""
        since_s = self._returned_s.get(endpoint)
        if since_s is None:
            return 1.0
        grown = (now_s - since_s) / self.slow_start_seconds
        if grown < 1:
            return max(grown, _LEAST_SHARE)
        del self._returned_s[endpoint]
        return 1.0

    def share_now(self, endpoint: str) -> float:
        """What an endpoint gets of its usual share now: nothing while it must not be called."""
        now_s = self.clock.now_s()
        return 0.0 if endpoint in self.unavailable(now_s) else self.share(endpoint, now_s)

    def breaker_state(self, endpoint: str) -> str:
        """``closed``, ``open`` or ``half_open``."""
        if endpoint not in self._open:
            return "closed"
        return "half_open" if self._waited(self._known[endpoint], self.clock.now_s()) else "open"

    def is_healthy(self, endpoint: str) -> bool:
        """True unless the breaker is not closed, or the last check, if it is recent, found the endpoint down."""
        health = self._fresh(endpoint)
        return endpoint not in self._open and (health is None or health.healthy)

    def is_warm(self, endpoint: str) -> bool:
        """True if the endpoint was working on something at its last check."""
        health = self._fresh(endpoint)
        return health is not None and ((health.active_requests or 0) > 0 or (health.tokens_per_second or 0) > 0)

    def get_health(self, endpoint: str) -> EndpointHealth | None:
        """What the last check found, however old; None if there was none."""
        known = self._known.get(endpoint)
        return None if known is None else known.health

    def get_healthy_endpoints(self) -> list[str]:
        """The endpoints that were ever heard of and are healthy."""
        return [endpoint for endpoint in self._known if self.is_healthy(endpoint)]

    def get_load_scores(self) -> dict[str, float]:
        """For each endpoint ever heard of: 0 (idle) to 1 (full), 0.5 if that is not known."""
        found = {endpoint: self._fresh(endpoint) for endpoint in self._known}
        return {endpoint: 0.5 if health is None else health.load_score for endpoint, health in found.items()}

    def summary(self) -> dict[str, int]:
        """Counts of endpoints: tracked, healthy, unhealthy, and with a breaker that is not closed."""
        healthy = len(self.get_healthy_endpoints())
        return {
            "tracked_endpoints": len(self._known),
            "healthy": healthy,
            "unhealthy": len(self._known) - healthy,
            "circuit_breakers_open": len(self._open),
        }

    # How

    def _of(self, endpoint: str) -> Endpoint:
        known = self._known.get(endpoint)
        if known is None:
            if len(self._known) >= _MOST_ENDPOINTS:
                self._forget(next(iter(self._known)))
            known = self._known[endpoint] = Endpoint()
        return known

    def _forget(self, endpoint: str) -> None:
        del self._known[endpoint]
        self._returned_s.pop(endpoint, None)
        if endpoint in self._open:
            self._open.discard(endpoint)
            self._recompute_at_s = 0.0

    def _fresh(self, endpoint: str) -> EndpointHealth | None:
        known = self._known.get(endpoint)
        if known is None or self.clock.now_s() - known.checked_s > self.stale_threshold_seconds:
            return None
        return known.health

    def _failed_too_often(self, endpoint: str, known: Endpoint, fault: Fault) -> None:
        reason = f"{known.failed_calls} failed calls, last {fault.value}"
        if known.opened_by or fault in _UNREACHABLE or self._may_eject(endpoint):
            self._trip(endpoint, known, "calls", reason, self.recovery_timeout_seconds)
            known.is_bounded = fault not in _UNREACHABLE

    def _may_eject(self, endpoint: str) -> bool:
        may = self.pools.may_eject(endpoint, self._open)
        if not may:
            self._count(endpoint, "overflow")
        return may

    def _count(self, endpoint: str, cause: str) -> None:
        self.ejections[endpoint, cause] = self.ejections.get((endpoint, cause), 0) + 1

    def _trip(self, endpoint: str, known: Endpoint, by: str, reason: str, wait_s: float | None = None) -> None:
        if not known.opened_by:
            self._count(endpoint, by)
        # Failed calls outweigh failed checks: once they are the cause, a passing check must not close the breaker.
        known.opened_by = by if not known.opened_by or known.opened_by == "checks" else known.opened_by
        known.opened_s = self.clock.now_s()
        known.wait_s = self.recovery_timeout_seconds if wait_s is None else wait_s
        known.reason = f"circuit open after {reason}"
        known.probe_until_s = 0.0
        known.is_bounded = True
        self._returned_s.pop(endpoint, None)
        self._open.add(endpoint)
        self._changed(known)

    def _close(self, endpoint: str, known: Endpoint) -> None:
        if self.slow_start_seconds:
            self._returned_s[endpoint] = self.clock.now_s()
        known.opened_by = known.reason = ""
        known.failed_calls = known.failed_checks = 0
        known.probe_until_s = 0.0
        self._open.discard(endpoint)
        self._changed(known)

    def _changed(self, known: Endpoint) -> None:
        self._recompute_at_s = 0.0
        known.changed_s = max(self.clock.now_s(), known.changed_s + _TICK_S)

    def _waited(self, known: Endpoint, now_s: float) -> bool:
        return now_s >= known.opened_s + known.wait_s

    def _is_half_open(self, known: Endpoint, now_s: float) -> bool:
        """True if the wait is over and the probe slot is free."""
        return self._waited(known, now_s) and now_s >= known.probe_until_s

    def _recompute(self, now_s: float) -> None:
        found: dict[str, str] = {}
        next_s = float("inf")
        for endpoint in self._open:
            known = self._known[endpoint]
            if self._is_half_open(known, now_s):
                continue
            waited = self._waited(known, now_s)
            found[endpoint] = _PROBE_UNDER_WAY if waited else known.reason
            next_s = min(next_s, known.probe_until_s if waited else known.opened_s + known.wait_s)
        panic = self.pools.in_panic(found)
        self._panicking = MappingProxyType({name: _share_left(pool, found) for name, pool in panic.items()})
        for endpoint in {one for pool in panic.values() for one in pool}:
            found.pop(endpoint, None)
        self._unavailable = MappingProxyType(found)
        self._recompute_at_s = next_s


def _share_left(pool: Sequence[str], out: Container[str]) -> float:
    return sum(one not in out for one in pool) / len(pool)
