"""Listens to every engine that tells of its KV cache, for as long as it runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import anyio
import attrs

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.background import until_cancelled
from kvfleet.cache.knowledge import CacheKnowledge, Source
from kvfleet.cache.kv_drain import EventDrain
from kvfleet.cache.kv_sequence import EventStream
from kvfleet.cache.kv_state import CacheState
from kvfleet.config.caching import address_of
from kvfleet.config.models import rank_of
from kvfleet.errors import BackendError
from kvfleet.telemetry.kv_stream import EventReader, zmq_context
from kvfleet.telemetry.load import FleetLoad

__all__ = ["CacheWatch"]

_log = logging.getLogger(__name__)
_COMPARE_S = 1.0
_AGAIN_S = 5.0
_DRAIN_S = 5.0


@attrs.define(eq=False)
class CacheWatch:
    """Brings engines' events to what is known of their caches, and their own figures beside them.

    Args:
        knowledge: Whose sources are listened to.
        adapters: By replica id; through them engines are asked for events.
        load: What the engines say of themselves.
    """

    knowledge: CacheKnowledge
    adapters: Mapping[str, InferenceAdapter]
    load: FleetLoad
    _context: Any = attrs.field(init=False, default=None, repr=False)
    _readers: dict[int, EventReader] = attrs.field(init=False, factory=dict, repr=False)

    async def run(self) -> None:
        """Listen until cancelled. Start it in a task group that somebody owns.

        The engines' messages then wait for another watch that does `inherit`, or for `close`.

        Raises:
            ComponentError: if an engine publishes over ZMQ and the extra is not installed.
        """
        if not self.knowledge.sources:
            return
        if self._context is None and any(source.settings.source == "zmq" for source in self.knowledge.sources):
            self._context = zmq_context()
        async with anyio.create_task_group() as group:
            group.start_soon(until_cancelled, self._compare)
            for source in self.knowledge.sources:
                for at, state in enumerate(source.states):
                    group.start_soon(until_cancelled, self._keep, source, state, at)

    def inherit(self, before: CacheWatch) -> None:
        """Go on with another one's subscriptions, to the engines whose state the knowledge here has inherited.

        So nothing is missed: what an engine publishes between the two waits in its socket.
        """
        self._context, before._context = before._context, None
        readers, before._readers = before._readers, {}
        same = {id(state) for source in self.knowledge.sources for state in source.states}
        for key, reader in readers.items():
            if key in same:
                self._readers[key] = reader
            else:
                reader.close()

    def close(self) -> None:
        """Subscribe to none any more; twice is harmless."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    def _reader(self, source: Source, state: EventStream, at: int) -> EventReader:
        known = self._readers.get(id(state))
        if known is not None:
            return known
        settings, rank = source.settings, at + (rank_of(source.endpoint) or 0)
        above = at + source.place * settings.data_parallel_ranks if settings.bind else rank
        self._readers[id(state)] = reader = EventReader(
            state=state,
            context=self._context,
            endpoint=address_of(settings.endpoint, source.endpoint, above),
            replay=address_of(settings.replay, source.endpoint, rank) if settings.replay else "",
            topic=settings.topic,
            binds=settings.bind,
        )
        return reader

    async def _keep(self, source: Source, state: CacheState, at: int) -> None:
        """Listen to one engine, and go on listening whatever it says."""
        while True:
            try:
                if isinstance(state, EventStream):
                    await self._reader(source, state, at).run()
                elif isinstance(state, EventDrain):
                    await self._drain(source, state)
            except Exception:  # noqa: BLE001 - what an engine says must not end the gateway
                _log.exception("kv events stopped endpoint=%s", source.endpoint)
                state.doubt("what it said could not be taken in")
            else:
                return
            await anyio.sleep(_AGAIN_S)

    async def _drain(self, source: Source, state: EventDrain) -> None:
        """Ask an engine again and again for what happened since."""
        adapter, pause_s = self.adapters[source.replicas[0]], source.settings.poll_ms / 1000
        while True:
            try:
                with anyio.fail_after(_DRAIN_S):
                    body = await adapter.drain_kv_events()
            except (BackendError, TimeoutError) as error:
                state.disconnected()
                _log.debug("kv events not drained endpoint=%s error=%s", source.endpoint, type(error).__name__)
                await anyio.sleep(max(pause_s, _AGAIN_S))
                continue
            if body is None:
                state.why = "its adapter cannot ask for events"
                _log.warning("kv events cannot be asked for endpoint=%s", source.endpoint)
                return
            state.drained(body)
            await anyio.sleep(pause_s)

    async def _compare(self) -> None:
        """Hold what was told against the engines' own figures, and let time pass."""
        while True:
            await anyio.sleep(_COMPARE_S)
            self.compare()

    def compare(self) -> None:
        """Do so once."""
        for source in self.knowledge.sources:
            said = self.load.engine(source.endpoint)
            age_s = self.load.age_s(source.endpoint)
            is_fresh = said is not None and age_s is not None and age_s < self.load.stale_s
            for state in source.states:
                if said is not None and is_fresh and len(source.states) == 1:  # of several ranks it says their sum
                    state.told(said)
                state.tick()
