"""Whether something takes less than a millisecond, on machines that are slow, or busy with other things."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

__all__ = ["takes_less_than_a_millisecond"]

_TRIES = 300


async def takes_less_than_a_millisecond(work: Callable[[], Awaitable[object]]) -> bool:
    """True if some work took less than a millisecond, or than a loop that takes one on an old core, just before or after.

    They take turns, in this thread's own time, because a machine may be slower from one second to the next.
    """
    for _ in range(_TRIES):
        before_s, took_s, after_s = await _timed_s(_loop), await _timed_s(work), await _timed_s(_loop)
        if took_s < max(0.001, before_s, after_s):
            return True
    return False


async def _loop() -> None:
    total = 0
    for number in range(50_000):
        total += number


async def _timed_s(work: Callable[[], Awaitable[object]]) -> float:
    started_s = time.thread_time()
    await work()
    return time.thread_time() - started_s
