"""What a caller in Python gets of a routed request: the answer, and the record of how it came about."""

from __future__ import annotations

from collections.abc import AsyncIterator

import attrs

from kvfleet.adapters.base import StreamChunk, chunks_of
from kvfleet.plugin.contract import Answer
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace

__all__ = ["Dispatch", "RouteStream"]


@attrs.frozen
class Dispatch:
    """A request that is being answered: the answer, and the record of how it came about."""

    answer: Answer
    trace: Trace

    @property
    def explanation(self) -> Explanation:
        """The record, as people and programs read it; for a stream it grows until the end."""
        return Explanation(self.trace)


@attrs.define
class RouteStream:
    """A streamed answer in Python: iterate it for chunks; `explanation` is whole after the last one."""

    dispatched: Dispatch

    @property
    def explanation(self) -> Explanation:
        """Why the request went where it went."""
        return self.dispatched.explanation

    async def __aiter__(self) -> AsyncIterator[StreamChunk]:
        events = self.dispatched.answer.reply.events
        assert events is not None  # noqa: S101 - a stream was asked for, and the contract of adapters gives one
        async for piece in events:
            for chunk in chunks_of(piece):
                yield chunk
