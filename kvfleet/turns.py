"""Long work in steps: all at once, or in turns of the event loop, so that whoever else waits is answered in between.

The work is a generator that yields wherever it may be interrupted, and gives its result at its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

__all__ = ["Steps", "at_once", "in_turns"]

T = TypeVar("T")
Steps = Generator[None, None, T]

_MOST_S = 0.002


def at_once(steps: Steps[T]) -> T:
    """What the work gives, without a pause.

    >>> def counted(items):
    ...     for count, _ in enumerate(items, 1):
    ...         yield
    ...     return count
    >>> at_once(counted("abc"))
    3
    """
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


async def in_turns(steps: Steps[T]) -> T:
    """The same, others having their turn whenever 2 ms have passed; what the steps read may change meanwhile."""
    clock = asyncio.get_running_loop().time
    since_s = clock()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if clock() - since_s > _MOST_S:
            await asyncio.sleep(0)
            since_s = clock()
