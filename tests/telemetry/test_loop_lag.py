"""How late the loop is."""

from __future__ import annotations

import asyncio
import contextlib
import time

from kvfleet.telemetry.loop_lag import LOOP_LAG, LoopLag
from kvfleet.telemetry.metrics import MetricsExporter


async def test_what_holds_up_the_loop_shows() -> None:
    """Somebody who works for a tenth of a second makes everybody wait as long."""
    metrics = MetricsExporter()
    watch = LoopLag(metrics, interval_s=0.01)
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0.05)
    time.sleep(0.1)  # noqa: ASYNC251 - what a plugin must not do
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert 0.05 < watch.longest_s < 5
    text = metrics.render().decode()
    count = next(line for line in text.splitlines() if line.startswith(f"{LOOP_LAG}_count"))
    assert float(count.split()[1]) >= 3
