"""One mock engine of a process: its engine, what follows it, and what it says of itself.

Of several data-parallel ranks (vLLM's ``--data-parallel-size``) each is such an engine, and one stands for all: it has
the port, and the faults.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from kvfleet.adapters.mock import MockAdapter
from kvfleet.clock import Clock
from kvfleet.errors import BadRequestError
from kvfleet.mock.faults import FaultBook
from kvfleet.mock.kv_publisher import KVPublisher, wire_events
from kvfleet.mock.metrics import EngineMetrics, MetricsPage
from kvfleet.sim.events import Event

__all__ = ["RANK_HEADER", "MockEngine"]

RANK_HEADER = b"x-data-parallel-rank"
"""Names the rank that is to compute a request; another word than a number counts as none, as with vLLM."""


@attrs.define(eq=False)
class MockEngine:
    """A simulated engine with its metrics, its faults and, if it has one, its publisher of KV events.

    Args:
        adapter: What plans and makes answers.
        publisher: Of KV events; None for none.
        others: The further data-parallel ranks; each has a cache, a queue and a publisher of its own.
    """

    adapter: MockAdapter
    publisher: KVPublisher | None = None
    others: Sequence[MockEngine] = ()
    metrics: EngineMetrics = attrs.field(init=False)
    faults: FaultBook = attrs.field(init=False)
    in_flight: int = attrs.field(init=False, default=0)
    _turns: Iterator[int] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        live = self.adapter.live
        self.faults = FaultBook(self.clock)
        self.metrics = EngineMetrics(self.adapter.model_id, self.adapter.spec, live.load)
        live.listener = self._follow
        live.on_cancel = self.metrics.abort
        for number, rank in enumerate(self.ranks):
            rank.metrics.rank = number
            if rank.publisher is not None:
                rank.publisher.rank = number
        self._turns = itertools.cycle(range(len(self.ranks)))

    @property
    def clock(self) -> Clock:
        """Its clock."""
        return self.adapter.clock

    @property
    def ranks(self) -> Sequence[MockEngine]:
        """Its data-parallel ranks; itself alone if it has no others."""
        return (self, *self.others)

    def chosen(self, named: bytes | None) -> MockEngine:
        """The rank that computes a request: the one that its header names, or the one with the fewest requests.

        vLLM takes those that are equal in turns (``DPLBAsyncMPClient.get_core_engine_for_request``).

        Raises:
            BadRequestError: if there is no such rank.
        """
        ranks = self.ranks
        if (rank := _number(named)) is not None:
            if not 0 <= rank < len(ranks):
                raise BadRequestError(f"data_parallel_rank {rank} is out of range [0, {len(ranks)}).")
            return ranks[rank]
        first = next(self._turns)
        return min((*ranks[first:], *ranks[:first]), key=MockEngine.requests)

    def requests(self) -> int:
        """How many requests it has, those that wait among them; of this rank alone."""
        load = self.adapter.live.load()
        return int((load.running or 0) + (load.waiting or 0))

    def page(self) -> bytes:
        """The metrics of all ranks."""
        return MetricsPage([rank.metrics for rank in self.ranks]).read()

    def clear_cache(self) -> bool:
        """Forget all blocks, of all ranks; False if a rank has some that are held, and keeps its own."""
        cleared = [rank.adapter.live.clear_cache() for rank in self.ranks]
        return all(cleared)

    def set_speed(self, speed: float) -> None:
        """Go at another speed from the next step on, all ranks."""
        for rank in self.ranks:
            rank.adapter.live.set_speed(speed)

    def state(self) -> dict[str, Any]:
        """What it is and does, for people and tests."""
        live = self.adapter.live
        found = {
            "model": self.adapter.model_id,
            "spec": attrs.asdict(live.engine.spec),
            "load": attrs.asdict(live.load()),
            "in_flight": self.in_flight,
            "faults": self.faults.state(),
        }
        if self.publisher is not None:
            found["kv_batches"] = self.publisher.sent
        if self.others:
            found["ranks"] = [attrs.asdict(rank.adapter.live.load()) for rank in self.ranks]
        return found

    def _follow(self, events: Sequence[Event]) -> None:
        self.metrics.follow(events)
        if self.publisher is not None:
            told = list(wire_events(events, self.adapter.block_tokens, self.adapter.window_tokens))
            if told:
                self.publisher.publish(told)


def _number(named: bytes | None) -> int | None:
    try:
        return None if named is None else int(named)
    except ValueError:
        return None
