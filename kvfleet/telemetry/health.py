"""Which endpoints may be used: what health checks found, and a circuit breaker that also counts live calls.

Checks and live calls are counted apart. An engine can be wedged and still answer its health check, so a passing check
does not forgive failed calls; it only closes a breaker that failed checks opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import attrs

from kvfleet.adapters.base import EndpointHealth
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import number
from kvfleet.errors import Fault

__all__ = ["HealthManager"]

_MOST_ENDPOINTS = 16_384
_SOON_S = 1.0
_NO_EVIDENCE = frozenset({Fault.CANCELLED, Fault.DEADLINE})


@attrs.define
class _Endpoint:
    """What is known of one endpoint."""

    health: EndpointHealth | None = None
    checked_s: float = 0.0
    failed_checks: int = 0
    failed_calls: int = 0
    opened_by: str = ""
    opened_s: float = 0.0
    reason: str = ""
    probe_until_s: float = 0.0


@attrs.define(kw_only=True)
class HealthManager:
    """Health of every endpoint, and a circuit breaker for each.

    A breaker opens after `failure_threshold` failures in a row. After `recovery_timeout_seconds` it is half-open: one
    request may try the endpoint, and its outcome closes the breaker or opens it again. An endpoint nobody has heard
    of is available; knowledge that is too old counts as no knowledge.

    Args:
        check_interval_seconds: Time between health checks.
        failure_threshold: Failures in a row that open the breaker.
        recovery_timeout_seconds: Time an open breaker waits before it lets one request try.
        stale_threshold_seconds: Age after which a check's finding is no longer believed.
        clock: Read when something is recorded, and where a method is not given the time.
    """

    check_interval_seconds: float = number(30, gt=0, unit="s", doc="Time between health checks.")
    failure_threshold: int = number(3, ge=1, doc="Failures in a row that open the breaker.")
    recovery_timeout_seconds: float = number(60, gt=0, unit="s", doc="Time until an open breaker lets one request try.")
    stale_threshold_seconds: float = number(120, gt=0, unit="s", doc="Age after which a finding is not believed.")
    clock: Clock = attrs.field(factory=SystemClock)
    _known: dict[str, _Endpoint] = attrs.field(init=False, factory=dict, repr=False)
    _open: set[str] = attrs.field(init=False, factory=set, repr=False)
    _unavailable: Mapping[str, str] = attrs.field(init=False, factory=lambda: MappingProxyType({}), repr=False)
    _recompute_at_s: float = attrs.field(init=False, default=float("inf"), repr=False)

    # What happened

    def update_health(self, health: EndpointHealth) -> None:
        """Take in what a health check found."""
        known = self._of(health.endpoint)
        known.health, known.checked_s = health, self.clock.now_s()
        if not health.healthy:
            known.failed_checks += 1
            if known.failed_checks >= self.failure_threshold:
                self._trip(health.endpoint, known, "checks", f"{known.failed_checks} failed health checks")
            return
        known.failed_checks = 0
        if known.opened_by == "checks":
            self._close(health.endpoint, known)

    def begin(self, endpoint: str) -> None:
        """A call to the endpoint starts; if its breaker is half-open, the call takes the one probe slot.

        A probe whose outcome never comes gives its slot back after `recovery_timeout_seconds`.
        """
        if endpoint in self._open and self._is_half_open(self._known[endpoint], now_s := self.clock.now_s()):
            self._known[endpoint].probe_until_s = now_s + self.recovery_timeout_seconds
            self._recompute_at_s = 0.0

    def record_success(self, endpoint: str) -> None:
        """A live call was answered."""
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
        if fault.counts_against_replica:
            known = self._of(endpoint)
            known.failed_calls += 1
            if known.opened_by or known.failed_calls >= self.failure_threshold:
                self._trip(endpoint, known, "calls", f"{known.failed_calls} failed calls, last {fault.value}")
            return
        known_or_none = self._known.get(endpoint)
        if known_or_none is None or not known_or_none.opened_by:
            return
        if fault in _NO_EVIDENCE:
            known_or_none.probe_until_s = 0.0
            self._recompute_at_s = 0.0
        elif self._waited(known_or_none, self.clock.now_s()):
            self._close(endpoint, known_or_none)

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
        return _SOON_S if self._waited(known, now_s) else known.opened_s + self.recovery_timeout_seconds - now_s

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

    def _of(self, endpoint: str) -> _Endpoint:
        known = self._known.get(endpoint)
        if known is None:
            if len(self._known) >= _MOST_ENDPOINTS:
                self._forget(next(iter(self._known)))
            known = self._known[endpoint] = _Endpoint()
        return known

    def _forget(self, endpoint: str) -> None:
        del self._known[endpoint]
        if endpoint in self._open:
            self._open.discard(endpoint)
            self._recompute_at_s = 0.0

    def _fresh(self, endpoint: str) -> EndpointHealth | None:
        known = self._known.get(endpoint)
        if known is None or self.clock.now_s() - known.checked_s > self.stale_threshold_seconds:
            return None
        return known.health

    def _trip(self, endpoint: str, known: _Endpoint, by: str, reason: str) -> None:
        # Failed calls outweigh failed checks: once they are the cause, a passing check must not close the breaker.
        known.opened_by = "calls" if "calls" in (by, known.opened_by) else by
        known.opened_s = self.clock.now_s()
        known.reason = f"circuit open after {reason}"
        known.probe_until_s = 0.0
        self._open.add(endpoint)
        self._recompute_at_s = 0.0

    def _close(self, endpoint: str, known: _Endpoint) -> None:
        known.opened_by = known.reason = ""
        known.failed_calls = known.failed_checks = 0
        known.probe_until_s = 0.0
        self._open.discard(endpoint)
        self._recompute_at_s = 0.0

    def _waited(self, known: _Endpoint, now_s: float) -> bool:
        return now_s >= known.opened_s + self.recovery_timeout_seconds

    def _is_half_open(self, known: _Endpoint, now_s: float) -> bool:
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
            found[endpoint] = "circuit half-open, its probe is under way" if waited else known.reason
            next_s = min(next_s, known.probe_until_s if waited else known.opened_s + self.recovery_timeout_seconds)
        self._unavailable = MappingProxyType(found)
        self._recompute_at_s = next_s
