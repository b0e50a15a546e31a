"""How late the event loop is: what one request's work makes all others wait.

Everything a gateway does is done by one loop, so a callback that takes ten milliseconds holds up every answer by as
much. A timer that asks for a time and sees when it is called shows it, whoever the culprit is, a plugin's stage
included. How much of that was this process, and not the machine, which had other things to do, its CPU time tells.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import attrs

from kvfleet.telemetry.metrics import MetricsExporter

__all__ = ["LOOP_HELD", "LOOP_LAG", "LoopLag"]

LOOP_LAG, LOOP_HELD = "kvfleet_event_loop_lag_seconds", "kvfleet_event_loop_held_seconds"
_BUSY = 0.1
"""The share of a core from which on looks are frequent. A look costs 5 µs while the loop is at work anyway, and more
than 100 µs where it has to be woken for it (a virtual machine)."""


@attrs.define
class LoopLag:
    """Watches the loop it is started on.

    Args:
        metrics: Gets the histograms `LOOP_LAG`, and `LOOP_HELD`: the part of a lag in which this process had the CPU.
        worker: The number of the process among the gateway's workers, which tells their histograms apart.
        busy_s: Time between two looks while the process is at work: so no turn of the loop that takes longer than this
            and 5 ms more goes unseen.
        idle_s: Time between two looks while it is not.
        cpu_s: Seconds of CPU that the process had, all threads together: one that holds Python's lock holds the loop.

    Attributes:
        longest_s: The greatest lag so far, in seconds.
    """

    metrics: MetricsExporter
    worker: int = 0
    busy_s: float = 0.005
    idle_s: float = 0.1
    cpu_s: Callable[[], float] = time.process_time
    longest_s: float = attrs.field(init=False, default=0.0)
    _timer: asyncio.TimerHandle | None = attrs.field(init=False, default=None, repr=False)

    def start(self) -> None:
        """Look until stopped; twice is harmless."""
        if self._timer is None:
            self._wait(asyncio.get_running_loop(), self.cpu_s(), self.busy_s)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, loop: asyncio.AbstractEventLoop, cpu_s: float, wait_s: float) -> None:
        # Not a task: to switch to one costs more than all that is done here.
        self._timer = loop.call_later(wait_s, self._look, loop, loop.time() + wait_s, cpu_s, wait_s)

    def _look(self, loop: asyncio.AbstractEventLoop, due_s: float, cpu_s: float, waited_s: float) -> None:
        lag_s, now_cpu_s = max(loop.time() - due_s, 0.0), self.cpu_s()
        had_s = now_cpu_s - cpu_s
        label = str(self.worker)
        self.metrics.histogram(LOOP_LAG, label).add(lag_s)
        self.metrics.histogram(LOOP_HELD, label).add(min(lag_s, had_s))
        self.longest_s = max(self.longest_s, lag_s)
        is_busy = had_s > _BUSY * (waited_s + lag_s)
        self._wait(loop, now_cpu_s, self.busy_s if is_busy else self.idle_s)
