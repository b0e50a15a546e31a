"""Asks the engines in the background how they are, so that no route ever has to."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping

import anyio
import attrs

from kvfleet.adapters.base import EndpointHealth, EngineLoad, InferenceAdapter
from kvfleet.background import until_cancelled
from kvfleet.clock import Clock, SystemClock
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad

__all__ = ["Collector"]

_log = logging.getLogger(__name__)
_MOST_READINGS_PER_S = 100
_JITTER = 0.2
_AFTER_FAILURE = 5
_WHILE_DOWN_S = 5.0
"""Time between two health checks of an engine that is not well: so its return is seen soon."""
_SILENT = EngineLoad()


@attrs.define
class Collector:
    """Polls each engine's health and load. Replicas that share an endpoint are asked once.

    A health check that fails says the engine is down. A reading of the load that fails says nothing: what is known of
    the load just grows old. Nothing here raises. Pauses vary by a fifth, so that many gateways do not ask at once; in a
    large fleet they grow, so that all engines together are read at most 100 times a second; and an engine that says
    nothing of its load is asked for it only as often as for its health.

    Args:
        adapters: By replica id.
        health: Told what the checks found.
        load: Told what the engines say.
        clock: For the time of a reading.
        health_interval_s: Time between two health checks of an engine.
        load_interval_s: Time between two readings of its load.
        deadline_s: Longest wait for an answer.
        sleep: Waits for some seconds; another one in tests.
        seed: For the jitter.
    """

    adapters: Mapping[str, InferenceAdapter]
    health: HealthManager
    load: FleetLoad
    clock: Clock = attrs.field(factory=SystemClock, kw_only=True)
    health_interval_s: float = attrs.field(default=30.0, kw_only=True)
    load_interval_s: float = attrs.field(default=1.0, kw_only=True)
    deadline_s: float = attrs.field(default=5.0, kw_only=True)
    sleep: Callable[[float], Awaitable[None]] = attrs.field(default=anyio.sleep, kw_only=True)
    seed: int | None = attrs.field(default=None, kw_only=True)
    failed_readings: int = attrs.field(init=False, default=0)
    _random: random.Random = attrs.field(init=False, repr=False)

    @_random.default
    def _make_random(self) -> random.Random:
        return random.Random(self.seed)  # noqa: S311 - jitter, not cryptography

    def origins(self) -> dict[str, InferenceAdapter]:
        """One adapter for each endpoint."""
        found: dict[str, InferenceAdapter] = {}
        for replica_id, adapter in self.adapters.items():
            found.setdefault(replica_id.partition("@")[2] or adapter.endpoint, adapter)
        return found

    async def run(self) -> None:
        """Poll until cancelled. Start it in a task group that somebody owns."""
        origins = self.origins()
        pause_s = max(self.load_interval_s, len(origins) / _MOST_READINGS_PER_S)
        async with anyio.create_task_group() as group:
            for endpoint, adapter in origins.items():
                group.start_soon(until_cancelled, self._keep_checking, endpoint, adapter)
                group.start_soon(until_cancelled, self._keep_reading, endpoint, adapter, pause_s)

    async def collect_once(self) -> None:
        """Ask every engine once for its health and load, all at the same time."""
        async with anyio.create_task_group() as group:
            for endpoint, adapter in self.origins().items():
                group.start_soon(self.check, endpoint, adapter)
                group.start_soon(self.read_load, endpoint, adapter)

    async def check_health(self) -> None:
        """Check every engine's health once, all at the same time."""
        async with anyio.create_task_group() as group:
            for endpoint, adapter in self.origins().items():
                group.start_soon(self.check, endpoint, adapter)

    async def check(self, endpoint: str, adapter: InferenceAdapter) -> EndpointHealth:
        """Check one engine's health, now; what was found."""
        found = await self._find_health(endpoint, adapter)
        if found.healthy and not found.models:
            found = attrs.evolve(found, models=await self._listed(endpoint, adapter))
        self.health.update_health(found)
        for replica, one in self.adapters.items():
            if one.refuses_unlisted and (replica.partition("@")[2] or one.endpoint) == endpoint:
                self.health.update_served(replica, one.why_unlisted(found.models))
        return found

    async def read_load(self, endpoint: str, adapter: InferenceAdapter) -> EngineLoad | None:
        """Read one engine's load, now; None if it could not be read."""
        try:
            with anyio.fail_after(self.deadline_s):
                said = await adapter.get_load()
        except Exception as error:  # noqa: BLE001 - an adapter may be a plugin's; a reading must not end the polling
            self.failed_readings += 1
            _log.debug("load reading failed endpoint=%s error=%s", endpoint, type(error).__name__)
            return None
        if said != _SILENT:
            self.load.report(endpoint, said, self.clock.now_s())
        return said

    async def _find_health(self, endpoint: str, adapter: InferenceAdapter) -> EndpointHealth:
        try:
            with anyio.fail_after(self.deadline_s):
                found = await adapter.health_check()
        except TimeoutError:
            text = f"no answer to the health check within {self.deadline_s:g} s"
            return EndpointHealth(endpoint=endpoint, healthy=False, error=text)
        except Exception as error:  # noqa: BLE001 - the same
            text = f"the health check failed: {type(error).__name__}"
            return EndpointHealth(endpoint=endpoint, healthy=False, error=text)
        return found if found.endpoint == endpoint else attrs.evolve(found, endpoint=endpoint)

    async def _listed(self, endpoint: str, adapter: InferenceAdapter) -> tuple[str, ...]:
        """The models an engine lists; none if it does not say, which is not its health."""
        try:
            with anyio.fail_after(self.deadline_s):
                return tuple([name for name in await adapter.list_models() if name])
        except Exception as error:  # noqa: BLE001 - the same
            _log.debug("list of models not read endpoint=%s error=%s", endpoint, type(error).__name__)
            return ()

    async def _keep_checking(self, endpoint: str, adapter: InferenceAdapter) -> None:
        while True:
            await self.check(endpoint, adapter)
            is_well = self.health.is_healthy(endpoint)
            await self._pause(self.health_interval_s if is_well else min(self.health_interval_s, _WHILE_DOWN_S))

    async def _keep_reading(self, endpoint: str, adapter: InferenceAdapter, pause_s: float) -> None:
        while True:
            said = await self.read_load(endpoint, adapter)
            if said == _SILENT:
                await self._pause(max(pause_s, self.health_interval_s))
            else:
                await self._pause(pause_s if said is not None else pause_s * _AFTER_FAILURE)

    async def _pause(self, seconds: float) -> None:
        await self.sleep(seconds * (1 + _JITTER * (2 * self._random.random() - 1)))
