"""Virtual time: an event loop that never waits, because its clock jumps to whatever is due next.

Everything that asks the loop to wake it later (`asyncio.sleep`, `anyio.sleep`, `asyncio.timeout`) works as ever, so the
code of a live route runs unchanged, its time limits and retries included. Nothing here opens a socket.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.clock import FrozenClock

__all__ = ["VirtualClock", "VirtualLoop"]

START_S = 1000.0
"""Where a virtual clock begins; not 0, because 0 stands for never in places."""


@attrs.define
class VirtualClock(FrozenClock):
    """The clock that a `VirtualLoop` moves; whoever else holds it reads the same time."""

    seconds: float = START_S


class _Jump(selectors.BaseSelector):
    """A selector that moves the clock on by as long as it was to wait.

    Real waiting is left for one case: nothing is due ever, so that only a thread can still bring work.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._real = selectors.DefaultSelector()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:  # there is work already
            return []
        ready = self._real.select(timeout if timeout is None else 0)
        if timeout is not None and not ready:
            self._clock.seconds += timeout
        return ready

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a `VirtualClock`.

    >>> loop = VirtualLoop(VirtualClock())
    >>> loop.run_until_complete(asyncio.sleep(3600))
    >>> loop.time()
    4600.0
    >>> loop.close()
    """

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        super().__init__(_Jump(clock))

    def time(self) -> float:
        """The virtual time, in seconds."""
        return self.clock.seconds
