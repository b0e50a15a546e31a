"""Changing a gateway's configuration while it serves: built beside the one that answers, and put in its place at once.

What a configuration describes is made anew: the pipeline, the keys, the names. What was learned or is held outlives it:
load and reservations, health, rate limits, what is known of caches, budgets, answers in memory, counts and traces
(`kvfleet.runtime.Router.take_over`). A request is answered to its end by the gateway that it came to. A file with
findings changes nothing.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import anyio.to_thread
import attrs

from kvfleet.config.findings import Finding
from kvfleet.config.schema import FleetConfig
from kvfleet.errors import ConfigError, KVFleetError, RouteError
from kvfleet.gateway.app import Gateway
from kvfleet.gateway.doors import Doors
from kvfleet.gateway.health import Phase
from kvfleet.gateway.memory import keep_what_is_there, undisturbed
from kvfleet.gateway.siblings import Siblings
from kvfleet.runtime import Router
from kvfleet.turns import in_turns

__all__ = ["FleetFile", "Reloader", "needs_restart"]

_log = logging.getLogger(__name__)

_FIXED = (
    ("gateway", "host"),
    ("gateway", "port"),
    ("gateway", "admin"),
    ("gateway", "watch"),
    ("telemetry", "prometheus_enabled"),
    ("telemetry", "prometheus_port"),
    ("telemetry", "structured_logs"),
    ("telemetry", "otlp"),
    ("telemetry", "trace_store"),
)
"""What is opened once, when the process starts."""


@attrs.frozen
class FleetFile:
    """Where a configuration comes from.

    Attributes:
        path: The fleet file.
        read: Reads and checks it, as ``kvfleet validate`` does.
    """

    path: Path
    read: Callable[[], FleetConfig]


def needs_restart(before: FleetConfig, now: FleetConfig) -> list[str]:
    """What is different in a configuration and takes effect only when the process starts."""
    return [
        f"{section}.{key}"
        for section, key in _FIXED
        if getattr(getattr(before, section), key) != getattr(getattr(now, section), key)
    ]


class Reloader:
    """Reloads a fleet file, one time after the other.

    Args:
        doors: Where the new gateway is to stand.
        file: What is read.
        make: The gateway of a router, and of the gateway before.
        siblings: The other workers, which are told if the file is good; None if there are none.
        retire_s: Seconds that requests have, after a reload, to be answered by the gateway they came to.
    """

    def __init__(
        self,
        doors: Doors,
        file: FleetFile,
        make: Callable[[Router, Gateway], Gateway],
        *,
        siblings: Siblings | None = None,
        retire_s: float = 3600.0,
    ) -> None:
        self.file = file
        self._doors = doors
        self._make = make
        self._retire_s = retire_s
        self._started_with = doors.gateway.router.config
        self._lock = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._asked: asyncio.Task[None] | None = None
        self._siblings = siblings
        self._gone: list[weakref.ref[Any]] = []
        self._may_keep = True
        doors.gateway.reload = self.reload

    async def reload(self, why: str) -> Mapping[str, Any]:
        """Read the file and serve by it, and then have the other workers do so; what came of it, for whoever asked.

        Raises:
            RouteError: 400 with the findings, if there are any; 409 while the gateway stops.
        """
        done = await self.reload_here(why)
        if self._siblings is None:
            return done
        statuses = [status for status, _ in await self._siblings.all("POST", "/-/worker/reload")]
        if any(status != 200 for status in statuses):
            _log.error("configuration not reloaded by every worker statuses=%s", ",".join(map(str, statuses)))
        return {**done, "workers": 1 + len(statuses), "reloaded": 1 + statuses.count(200)}

    async def reload_here(self, why: str) -> Mapping[str, Any]:
        """The same for this worker alone."""
        async with self._lock:
            self._look_after_those_before()
            with undisturbed():
                try:
                    gateway = await self._beside()
                except (KVFleetError, OSError) as error:
                    raise self._refused(error, why) from error
                done = await self._change(gateway, why)
                if self._may_keep:
                    keep_what_is_there()
            return done

    def soon(self) -> None:
        """Reload, at a signal; what comes of it is in the log. One is enough for signals that come meanwhile."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.get_running_loop().create_task(self.quietly("signal"), name="kvfleet-reload")

    async def quietly(self, why: str) -> None:
        """Reload, and leave a refusal to the log."""
        try:
            await self.reload(why)
        except RouteError as error:
            _log.debug("reload refused error=%s", error.code)

    async def aclose(self) -> None:
        """Reload no more, and close what is still there of gateways before."""
        if self._asked is not None:
            self._asked.cancel()
        async with self._lock:
            for task in self._retiring:
                task.cancel()
            await asyncio.gather(*self._retiring, return_exceptions=True)

    # How

    async def _beside(self) -> Gateway:
        """The new gateway, open, beside the one that serves.

        Raises:
            KVFleetError: if there are findings, or a component cannot be opened.
            OSError: if the file cannot be read.
        """
        before = self._doors.gateway
        if before.phase is not Phase.SERVING:
            raise RouteError("the gateway is stopping", status=409, code="shutting_down")
        gateway = await anyio.to_thread.run_sync(self._build, before)
        try:
            await gateway.open_beside()
            await in_turns(gateway.router.take_over_ahead(before.router))
        except BaseException:
            await gateway.retire()
            raise
        return gateway

    def _build(self, before: Gateway) -> Gateway:
        """In a thread: reading and building a large fleet takes a second, in which the others go on."""
        return self._make(before.router.successor(self.file.read()), before)

    async def _change(self, gateway: Gateway, why: str) -> Mapping[str, Any]:
        before, doors = self._doors.gateway, self._doors
        await before.router.stop_watching()
        # No await from here on: whoever asks next asks the new one, and both know the same.
        gateway.take_over(before)
        in_flight = doors.change(gateway)
        gateway.meters.reloads["ok"] += 1
        gateway.meters.loaded_s = time.time()
        task = asyncio.create_task(self._retire(before, in_flight), name="kvfleet-retire")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return self._tell(gateway, why)

    def _tell(self, gateway: Gateway, why: str) -> Mapping[str, Any]:
        router = gateway.router
        fixed = needs_restart(self._started_with, router.config)
        _log.info(
            "configuration reloaded why=%s file=%s pipeline=%s replicas=%d",
            *(why, self.file.path, router.pipeline.hash, len(router.models)),
        )
        if fixed:
            _log.warning("configuration needs a restart changed=%s", ",".join(fixed))
        return {
            "object": "reload",
            "fleet": router.config.fleet_name,
            "pipeline": router.pipeline.hash,
            "replicas": len(router.models),
            "needs_restart": fixed,
        }

    async def _retire(self, before: Gateway, in_flight: frozenset[asyncio.Task[Any]]) -> None:
        """Close a gateway after the last request that it answers."""
        this = asyncio.current_task()
        try:
            late: AbstractSet[asyncio.Task[Any]] = in_flight
            if in_flight:
                _, late = await asyncio.wait(in_flight, timeout=self._retire_s)
            for task in late:
                task.cancel()
            if late:
                _log.warning("gateway before a reload gives up requests in_flight=%d", len(late))
                await asyncio.wait(late)
        finally:
            gone = [weakref.ref(one) for one in before.router.pipeline.components if hasattr(one, "__weakref__")]
            await before.retire()
            self._gone += gone
            if self._retiring <= {this}:
                self._doors.gateway.router.forget_others()

    def _look_after_those_before(self) -> None:
        """Components that hold themselves are the garbage collector's, which must see those to come too, then."""
        held = [type(one).__name__ for one in (gone() for gone in self._gone) if one is not None]
        self._gone = []
        if held and self._may_keep:
            self._may_keep = False
            gc.unfreeze()
            _log.info("components of before a reload are left to the garbage collector held=%s", ",".join(held))

    def _refused(self, error: KVFleetError | OSError, why: str) -> RouteError:
        self._doors.gateway.meters.reloads["refused"] += 1
        if isinstance(error, RouteError):
            return error
        findings = _findings(error)
        for finding in findings:
            _log.error("configuration refused why=%s finding=%s", why, finding)
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        return RouteError(
            f"the configuration was refused, and the one before serves on: {findings[0]}{more}",
            status=400,
            code="invalid_configuration",
            details={"findings": [{"text": str(finding), **finding.to_dict()} for finding in findings]},
        )


def _findings(error: KVFleetError | OSError) -> Sequence[Finding]:
    """What is wrong, as ``kvfleet validate`` has it."""
    if isinstance(error, ConfigError):
        return error.findings
    if isinstance(error, OSError):
        what = (error.strerror or type(error).__name__).lower()
        return [Finding(what, file=str(error.filename or ""), code="file")]
    return [Finding(str(error), code="component")]
