"""One mock engine of a process: its engine, what follows it, and what it says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from kvfleet.adapters.mock import MockAdapter
from kvfleet.clock import Clock
from kvfleet.mock.faults import FaultBook
from kvfleet.mock.kv_publisher import KVPublisher, wire_events
from kvfleet.mock.metrics import EngineMetrics
from kvfleet.sim.events import Event

__all__ = ["MockEngine"]


@attrs.define(eq=False)
class MockEngine:
    """A simulated engine with its metrics, its faults and, if it has one, its publisher of KV events.

    Args:
        adapter: What plans and makes answers.
        publisher: Of KV events; None for none.
    """

    adapter: MockAdapter
    publisher: KVPublisher | None = None
    metrics: EngineMetrics = attrs.field(init=False)
    faults: FaultBook = attrs.field(init=False)
    in_flight: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        live = self.adapter.live
        self.faults = FaultBook(self.clock)
        self.metrics = EngineMetrics(self.adapter.model_id, self.adapter.spec, live.load)
        live.listener = self._follow
        live.on_cancel = self.metrics.abort

    @property
    def clock(self) -> Clock:
        """Its clock."""
        return self.adapter.clock

    def clear_cache(self) -> bool:
        """Forget all blocks; False while any are held."""
        return self.adapter.live.clear_cache()

    def set_speed(self, speed: float) -> None:
        """Go at another speed from the next step on."""
        self.adapter.live.set_speed(speed)

    def state(self) -> dict[str, Any]:
        """What it is and does, for people and tests."""
        live = self.adapter.live
        return {
            "model": self.adapter.model_id,
            "spec": attrs.asdict(live.engine.spec),
            "load": attrs.asdict(live.load()),
            "in_flight": self.in_flight,
            "faults": self.faults.state(),
        }

    def _follow(self, events: Sequence[Event]) -> None:
        self.metrics.follow(events)
        if self.publisher is not None:
            told = list(wire_events(events, self.adapter.block_tokens))
            if told:
                self.publisher.publish(told)
