"""Background work that goes on until it is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVarTuple, Unpack

__all__ = ["until_cancelled"]

Ts = TypeVarTuple("Ts")


async def until_cancelled(work: Callable[[Unpack[Ts]], Awaitable[object]], *args: *Ts) -> None:
    """Do some work in a task group, and end without a word where the group is cancelled.

    A child of anyio's groups that ends in its cancellation is kept by its own traceback, and all that its frames know
    with it: a ring that only the garbage collector could free. A gateway has it pass over what lives as long as a
    fleet does, its background work too (`kvfleet.gateway.memory`), so each reload left 100 KB behind, for good.
    """
    with contextlib.suppress(asyncio.CancelledError):
        await work(*args)
