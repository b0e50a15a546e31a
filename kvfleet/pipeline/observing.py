"""Tells observers how routes ended, after the answer has left and off its path."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import attrs

from kvfleet.pipeline.stage import BoundStage
from kvfleet.plugin.contract import Outcome

__all__ = ["Observing"]

log = logging.getLogger(__name__)


@attrs.define(kw_only=True)
class Observing:
    """A bounded queue of outcomes, and the one task that works through it.

    Attributes:
        observers: Called in order for each outcome; one that fails is logged and does not stop the others.
        finished: Called last, for the plugins' notification hook.
        most: Outcomes kept waiting; beyond that the newest is dropped and counted.
        dropped: How many were.
    """

    observers: Sequence[BoundStage]
    finished: Callable[[Outcome], None]
    most: int = 10_000
    dropped: int = attrs.field(init=False, default=0)
    _queue: deque[Outcome] = attrs.field(init=False, factory=deque)
    _ready: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _idle: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)

    def put(self, outcome: Outcome) -> None:
        """Queue an outcome; never waits."""
        if len(self._queue) >= self.most:
            self.dropped += 1
            return
        self._idle.clear()
        self._queue.append(outcome)
        self._ready.set()

    def tell_instead(self, heirs: Mapping[int, BoundStage]) -> None:
        """From now on, tell others in the place of some observers, which are named by their components' identity."""
        self.observers = tuple(heirs.get(id(stage.component), stage) for stage in self.observers)

    async def settled(self) -> None:
        """Wait until everything queued so far has been observed."""
        if self._queue or not self._idle.is_set():
            await self._idle.wait()

    async def run(self) -> None:
        """Work until cancelled."""
        self._idle.set()
        while True:
            await self._ready.wait()
            while self._queue:
                await self.tell(self._queue.popleft())
            self._ready.clear()
            self._idle.set()

    async def drain(self) -> None:
        """Observe what is left, at the end."""
        while self._queue:
            await self.tell(self._queue.popleft())
        self._idle.set()
        self.observers = ()  # others may have stood in for them, which must not be kept alive from here

    async def tell(self, outcome: Outcome) -> None:
        """Tell every observer of one outcome."""
        for stage in self.observers:
            try:
                await stage.component.observe(outcome)
            except Exception as error:  # noqa: BLE001 - the plugin border: the answer has left, the others must hear
                log.warning("observer failed stage=%s error=%s", stage.key, type(error).__name__)
        self.finished(outcome)
