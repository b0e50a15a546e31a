"""Replicas that answer worse than the others of their model, found by comparing them every few seconds.

Nothing is done on a request's path: the counts are kept by `HealthManager`, the pace by `FleetLoad`. A replica is
compared with the others and not with a limit of its own, so that a model that is slow everywhere, or a request that
fails everywhere, ejects nobody.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence

import anyio
import attrs

from kvfleet.config.health import OutlierConfig
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad

__all__ = ["Outliers"]

_LEAST_GAP = 0.1
"""By how much a share of failed calls must be above that of the others, however sure the difference is."""
_LEAST_MEASURED = 10
"""Measured answers that make a pace."""


@attrs.define
class Outliers:
    """Compares the replicas of each model, and has those left alone that fall short.

    Args:
        health: Whose counts are read, and who leaves replicas alone.
        load: Whose learned paces are read.
        config: By which rules.
        sleep: Waits for some seconds; another one in tests.
    """

    health: HealthManager
    load: FleetLoad
    config: OutlierConfig = attrs.field(factory=OutlierConfig)
    sleep: Callable[[float], Awaitable[None]] = attrs.field(default=anyio.sleep, kw_only=True)
    _times: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)

    async def run(self) -> None:
        """Compare until cancelled. Start it in a task group that somebody owns."""
        while self.config.enabled:
            await self.sleep(self.config.interval_seconds)
            self.look()

    def look(self) -> Mapping[str, str]:
        """Compare once; who was ejected, and why."""
        found: dict[str, str] = {}
        for name, pool in self.health.pools.endpoints.items():
            for endpoint, (cause, reason) in self._outliers(name, pool).items():
                if self.health.eject(endpoint, cause, reason, self._next_wait_s(endpoint)):
                    self._times[endpoint] = self._times.get(endpoint, 0) + 1
                    found[endpoint] = reason
                self._count_anew(endpoint)
        return found

    def _next_wait_s(self, endpoint: str) -> float:
        times = self._times.get(endpoint, 0) + 1
        return min(self.config.base_ejection_seconds * times, self.config.max_ejection_seconds)

    def _outliers(self, name: str, pool: Sequence[str]) -> dict[str, tuple[str, str]]:
        """By endpoint: the cause and the reason. One that fails is not also slow."""
        return {**self._slow(name, pool), **self._failing(pool)}

    # By the share of failed calls

    def _failing(self, pool: Sequence[str]) -> dict[str, tuple[str, str]]:
        volume = self.config.success_rate_request_volume
        counts = {one: tuple(self.health.calls[one]) for one in pool if one in self.health.calls}
        counts = {one: (ok, failed) for one, (ok, failed) in counts.items() if ok + failed >= volume}
        if len(counts) < self.config.success_rate_minimum_hosts:
            return {}
        found = {}
        for endpoint, (ok, failed) in counts.items():
            others = [both for one, both in counts.items() if one != endpoint]
            other_ok, other_failed = sum(ok for ok, _ in others), sum(failed for _, failed in others)
            if self._is_worse((ok, failed), (other_ok, other_failed)):
                share, usual = failed / (ok + failed), other_failed / (other_ok + other_failed)
                reason = f"{share:.0%} of its calls failed, and {usual:.0%} of the others'"
                found[endpoint] = ("success_rate", reason)
        for endpoint in counts:
            self._count_anew(endpoint, well=endpoint not in found)
        return found

    def _is_worse(self, mine: tuple[int, int], others: tuple[int, int]) -> bool:
        """True if one share of failures is above another by more than chance makes likely.

        The difference of two shares, in standard errors of the pooled share (the two-proportion z-test).
        """
        (ok, failed), (other_ok, other_failed) = mine, others
        n, m = ok + failed, other_ok + other_failed
        gap = failed / n - other_failed / m
        pooled = (failed + other_failed) / (n + m)
        error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
        return gap >= _LEAST_GAP and gap > self.config.success_rate_stdev_factor * error

    def _count_anew(self, endpoint: str, *, well: bool = False) -> None:
        counted = self.health.calls.get(endpoint)
        if counted is not None:
            counted[:] = 0, 0
        if well and self._times.get(endpoint):
            self._times[endpoint] -= 1

    # By the time an answer takes

    def _slow(self, name: str, pool: Sequence[str]) -> dict[str, tuple[str, str]]:
        factor = self.config.latency_factor
        paces = {one: pace for one in pool if (pace := self._pace(name, one)) is not None}
        if factor is None or len(paces) < max(self.config.success_rate_minimum_hosts, 2):
            return {}
        found = {}
        for endpoint, pace in paces.items():
            usual = statistics.median(other for one, other in paces.items() if one != endpoint)
            if pace > factor * usual:
                found[endpoint] = ("latency", f"it takes {pace / usual:.0f} times as long as the others")
        return found

    def _pace(self, name: str, endpoint: str) -> float | None:
        """How many times as long as its model's replicas on average it takes; None if it was not measured enough."""
        if endpoint in self.health.ejected:
            return None
        known = self.load.of(f"{name}@{endpoint}")
        return None if known is None or known.speed.seen < _LEAST_MEASURED else known.speed.value
