"""What relays of an engine's events have in common, whichever API these are in: whole events, and an honest end."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator

from kvfleet.adapters.call import Tally
from kvfleet.adapters.incoming import Incoming
from kvfleet.adapters.splitters import EventSplitter, split_events
from kvfleet.errors import BackendError, Fault

__all__ = ["RelayedEvents", "cut_off"]


class RelayedEvents(abc.ABC):
    """Iterates over pieces of whole events, what ends the answer included.

    It is an iterator and not a generator, so that `aclose` may be called while another task waits for the next piece.

    Args:
        incoming: The answer.
        tally: Filled in as the answer passes.

    Raises (while iterating):
        BackendError: if the stream breaks off, falls silent, holds an error or something that is no event, or ends
            without having finished. The error's `received` tells whether an event had been given out before.
    """

    def __init__(self, incoming: Incoming, tally: Tally) -> None:
        self.tally = tally
        self._incoming = incoming
        self._take = incoming.piece
        self._splitter = EventSplitter(incoming.event_bytes)
        self._feed = self._splitter.feed
        self._has_given = False
        self._is_over = False
        self._failed: BackendError | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._is_over:
            raise StopAsyncIteration
        try:
            refused = self._failed or self._splitter.refused
            if refused is not None:
                raise refused
            while data := await self._take():
                piece = self._feed(data)
                if piece and (out := self._passed(piece)):
                    self._has_given = True
                    return out
            out = self._at_end()
        except BackendError as error:
            self._is_over = True
            error.received = self._has_given
            await self._incoming.aclose()
            raise
        self._has_given = True
        return out

    async def aclose(self) -> None:
        """End the stream at once; the engine then stops its work. Safe twice."""
        await self._incoming.aclose()

    @abc.abstractmethod
    def _passed(self, piece: bytes) -> bytes:
        """What of a piece goes on now; everything to be learned from it is learned."""

    @abc.abstractmethod
    def _read_event(self, event: bytes) -> bytes:
        """Learn from one event; what goes on now, which may be nothing, or more than that one."""

    @abc.abstractmethod
    def _at_end(self) -> bytes:
        """The body has ended, and nothing that went on was an end: what goes on for it.

        Raises:
            BackendError: if it was none.
        """

    def _end(self) -> None:
        """The answer is whole."""
        self._is_over = True
        self.tally.is_complete = True

    def _one_by_one(self, piece: bytes) -> bytes:
        """A piece event by event. What stands before an error is passed on before that is raised."""
        kept: list[bytes] = []
        try:
            for event in split_events(piece):
                kept.append(self._read_event(event))
                if self._is_over:
                    self._incoming.finish()  # the connection may be used again once the body's end is there
                    break
        except BackendError as error:
            if not any(kept):
                raise
            self._failed = error
        return b"".join(kept)


def cut_off() -> BackendError:
    """The error for a body that ended before its answer did."""
    return BackendError(Fault.DISCONNECTED, "the backend's stream ended before its answer did", received=True)
