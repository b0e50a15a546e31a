"""How late the loop is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator

from kvfleet.telemetry.loop_lag import LOOP_HELD, LOOP_LAG, LoopLag
from kvfleet.telemetry.metrics import MetricsExporter


def count(metrics: MetricsExporter, name: str, *, above_s: float | None = None, worker: int = 0) -> int:
    """How many looks there were, or those that found it later than a bound."""
    found = metrics.histogram(name, str(worker))
    first = 0 if above_s is None else found.bounds.index(above_s) + 1
    return sum(found.counts[first:])


@contextlib.contextmanager
def started(watch: LoopLag) -> Iterator[LoopLag]:
    """A watch that is stopped at the end."""
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.001)


async def test_what_holds_up_the_loop_shows() -> None:
    """Somebody who works for a tenth of a second makes everybody wait as long."""
    metrics = MetricsExporter()
    with started(LoopLag(metrics, worker=3, cpu_s=itertools.count(0, 10).__next__)) as watch:
        await until(lambda: count(metrics, LOOP_LAG, worker=3) >= 2)
        time.sleep(0.1)  # noqa: ASYNC251 - what a plugin must not do
        await until(lambda: count(metrics, LOOP_LAG, above_s=0.05, worker=3) >= 1)
    assert watch.longest_s > 0.05
    assert count(metrics, LOOP_HELD, above_s=0.05, worker=3) >= 1
    assert 'le="0.005",worker="3"' in metrics.render().decode()


async def test_what_the_machine_does_meanwhile_is_not_held() -> None:
    """A process that had no CPU while its loop was late did not hold it."""
    metrics = MetricsExporter()
    with started(LoopLag(metrics, cpu_s=lambda: 7.0)):
        time.sleep(0.1)  # noqa: ASYNC251 - as if somebody else had the CPU
        await until(lambda: count(metrics, LOOP_LAG, above_s=0.05) == 1)
    assert count(metrics, LOOP_HELD, above_s=0.00005) == 0


async def test_it_looks_often_while_there_is_work_and_seldom_while_there_is_none() -> None:
    """So that an idle process sleeps."""
    busy, idle = MetricsExporter(), MetricsExporter()
    with (
        started(LoopLag(busy, busy_s=0.001, idle_s=60, cpu_s=itertools.count().__next__)),
        started(LoopLag(idle, busy_s=0.001, idle_s=60, cpu_s=lambda: 7.0)),
    ):
        await until(lambda: count(busy, LOOP_LAG) >= 20)
    assert count(idle, LOOP_LAG) == 1


async def test_it_may_be_stopped_at_any_time() -> None:
    """Also before it began; started twice it looks once."""
    metrics = MetricsExporter()
    watch = LoopLag(metrics, busy_s=0.001, idle_s=0.001)
    watch.stop()
    watch.start()
    watch.start()
    await until(lambda: count(metrics, LOOP_LAG) >= 2)
    watch.stop()
    seen = count(metrics, LOOP_LAG)
    await asyncio.sleep(0.01)
    assert count(metrics, LOOP_LAG) == seen
