"""Observers hear of every outcome, after the answer has left, and cannot hurt each other."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import attrs
import pytest

from kvfleet.pipeline.observing import Observing
from kvfleet.pipeline.stage import BoundStage
from kvfleet.plugin.contract import Kind, Outcome, RouteRequest, RoutingContext
from kvfleet.trace.spans import Span, Trace


def outcome(number: int) -> Outcome:
    """An outcome told apart by its request's id."""
    ctx = RoutingContext(request=RouteRequest(body={}, request_id=str(number)), candidates=())
    return Outcome(context=ctx, trace=Trace("0" * 32, [Span("kvfleet.route", 0)]))


@attrs.define
class Hears:
    """Remembers what it was told; raises if asked to."""

    raises: bool = False
    heard: list[str] = attrs.field(factory=list)

    async def observe(self, outcome: Outcome) -> None:
        self.heard.append(outcome.context.request.request_id)
        if self.raises:
            raise ValueError("my prompt")


def observing(*components: Hears, **more: Any) -> tuple[Observing, list[str]]:
    """A queue for some observers, and what the plugins' hook was told."""
    told: list[str] = []
    stages = [BoundStage.bind(Kind.OBSERVE, f"o{i}", component) for i, component in enumerate(components)]
    return Observing(observers=stages, finished=lambda o: told.append(o.context.request.request_id), **more), told


async def test_every_observer_hears_in_order_even_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    """One that raises is logged by name and type, never by its message, and the next is told all the same."""
    broken, sound = Hears(raises=True), Hears()
    queue, told = observing(broken, sound)
    task = asyncio.create_task(queue.run())
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            queue.put(outcome(number))
        await queue.settled()
    task.cancel()
    assert sound.heard == broken.heard == told == ["0", "1", "2"]
    assert "observer failed stage=observe.o0 error=ValueError" in caplog.text
    assert "my prompt" not in caplog.text


async def test_the_queue_is_bounded_and_counts_what_it_drops() -> None:
    """A stuck observer costs outcomes, not memory."""
    hears = Hears()
    queue, _ = observing(hears, most=2)
    for number in range(5):
        queue.put(outcome(number))
    assert queue.dropped == 3
    await queue.drain()
    assert hears.heard == ["0", "1"]


async def test_settled_returns_at_once_when_nothing_waits() -> None:
    """Waiting for an idle queue does not wait."""
    queue, _ = observing(Hears())
    task = asyncio.create_task(queue.run())
    await asyncio.sleep(0)
    await asyncio.wait_for(queue.settled(), 1)
    task.cancel()
