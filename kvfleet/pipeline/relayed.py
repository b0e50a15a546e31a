"""A stream on its way to the client: its first piece already read, its end told once to whoever waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import attrs

from kvfleet.adapters.call import OWN_COMMENT
from kvfleet.errors import BackendError, Fault

__all__ = ["Ended", "Kept", "Relay", "adapter_broke", "deadline_passed"]

Ended = Callable[[BackendError | None], None]

_MOST_KEPT_BYTES = 1024 * 1024


@attrs.define
class Kept:
    """A stream's bytes, kept because the operator or a component asked for them: all of them, or none if too many."""

    pieces: bytearray = attrs.field(factory=bytearray)
    is_too_long: bool = False

    def add(self, piece: bytes) -> None:
        """Keep a piece; not a comment of our own, which tells of this route and not of the answer."""
        if piece.startswith(OWN_COMMENT):
            return
        self.is_too_long = self.is_too_long or len(self.pieces) + len(piece) > _MOST_KEPT_BYTES
        if self.is_too_long:
            self.pieces.clear()
        else:
            self.pieces += piece


@attrs.define
class Relay(AsyncIterator[bytes]):
    """A stream with its first piece already read (None if it was not), and a word to whoever waits for its end.

    `ended` is called once: with None at a whole end, with the error otherwise; a client that leaves is
    `Fault.CANCELLED`. `left_s` says how many seconds the request's own deadline leaves, if it has one, and `limit` what
    set it.
    """

    first: bytes | None
    rest: AsyncIterator[bytes]
    ended: Ended
    kept: Kept | None = None
    left_s: Callable[[], float] | None = None
    limit: str = ""
    _is_over: bool = attrs.field(init=False, default=False)

    async def __anext__(self) -> bytes:
        if self.first is not None:
            first, self.first = self.first, None
            return self._keep(first)
        if self._is_over:
            raise StopAsyncIteration
        try:
            return self._keep(await (anext(self.rest) if self.left_s is None else self._in_time(self.left_s())))
        except StopAsyncIteration:
            self._end(None)
            raise
        except BackendError as error:
            self._end(error)
            raise
        except asyncio.CancelledError:
            self._end(_left())
            raise
        except Exception as error:
            # The plugin border: an adapter that breaks ends the answer, and the books must be closed.
            broken = adapter_broke(error, received=True)
            self._end(broken)
            raise broken from error

    async def _in_time(self, left_s: float) -> bytes:
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                return await anext(self.rest)
        except TimeoutError as error:
            raise deadline_passed(self.limit, received=True) from error

    def _keep(self, piece: bytes) -> bytes:
        if self.kept is not None:
            self.kept.add(piece)
        return piece

    def push(self, sink: Callable[[bytes], bool]) -> None:
        """Offer what arrives to `sink`, while somebody waits for the next piece; see `EventRelay.push`.

        Where the bytes are kept, and where the adapter knows no such thing, all of them come to whoever iterates.
        """
        offer = getattr(self.rest, "push", None)
        if self.kept is None and callable(offer):
            offer(sink)

    def leave(self) -> None:
        """The client left: end now."""
        self._end(_left())

    def _end(self, error: BackendError | None) -> None:
        if not self._is_over:
            self._is_over = True
            self.ended(error)


def _left() -> BackendError:
    return BackendError(Fault.CANCELLED, "the client left", received=True)


def deadline_passed(limit: str, *, received: bool = False) -> BackendError:
    """The fault of a request whose time was up, and by which limit."""
    where = " amid the answer" if received else ""
    error = BackendError(Fault.DEADLINE, f"the request's own deadline ({limit}) passed{where}", received=received)
    error.limit = limit
    return error


def adapter_broke(error: Exception, *, received: bool) -> BackendError:
    """The fault of an adapter that raised what it must not; a foreign exception's text may hold content."""
    return BackendError(Fault.PROTOCOL, f"the adapter failed: {type(error).__name__}", received=received)
