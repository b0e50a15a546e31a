"""How long something computes at its best, since a machine may be busy with other things."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

__all__ = ["a_millisecond_s", "fastest_s"]

TRIES = 300


async def fastest_s(work: Callable[[], Awaitable[object]], enough_s: float) -> float:
    """The shortest of up to 300 tries, in seconds of this thread's own; no more are made once it is short enough."""
    best = float("inf")
    for _ in range(TRIES):
        started_s = time.thread_time()
        await work()
        best = min(best, time.thread_time() - started_s)
        if best < enough_s:
            break
    return best


async def a_millisecond_s() -> float:
    """A millisecond, or what it is worth on a slow or busy machine: the time of a loop that takes one on an old core."""

    async def loop() -> None:
        total = 0
        for number in range(50_000):
            total += number

    return max(0.001, await fastest_s(loop, 0.001))
