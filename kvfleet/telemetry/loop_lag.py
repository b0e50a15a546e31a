"""How late the event loop is: what one request's work makes all others wait.

Everything a gateway does is done by one loop, so a callback that takes ten milliseconds holds up every answer by as
much. A timer that asks for a time and sees when it is called shows it, whoever the culprit is, a plugin's stage
included.
"""

from __future__ import annotations

import asyncio

import attrs

from kvfleet.telemetry.metrics import MetricsExporter

__all__ = ["LOOP_LAG", "LoopLag"]

LOOP_LAG = "kvfleet_event_loop_lag_seconds"


@attrs.define
class LoopLag:
    """Watches the loop it runs on.

    Args:
        metrics: Gets the histogram `LOOP_LAG`, in seconds.
        interval_s: Time between two looks; each costs some ten microseconds.

    Attributes:
        longest_s: The greatest lag so far, in seconds.
    """

    metrics: MetricsExporter
    interval_s: float = 0.1
    longest_s: float = attrs.field(init=False, default=0.0)

    async def run(self) -> None:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        seen = self.metrics.histogram(LOOP_LAG)
        while True:
            due_s = loop.time() + self.interval_s
            await asyncio.sleep(self.interval_s)
            lag_s = max(loop.time() - due_s, 0.0)
            seen.add(lag_s)
            self.longest_s = max(self.longest_s, lag_s)
