"""Carries a `Translation` over HTTP: one base for every engine with a tongue of its own."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Iterator

import attrs
import orjson

from kvfleet.adapters.call import Call, Operation, Reply
from kvfleet.adapters.http import HTTPAdapter
from kvfleet.adapters.incoming import Incoming
from kvfleet.adapters.refusals import refuse
from kvfleet.adapters.splitters import MAX_EVENT_BYTES, EventSplitter, LineSplitter, data_of, split_events
from kvfleet.adapters.translation import Chunks, Framing, Translation
from kvfleet.clock import Clock, SystemClock
from kvfleet.errors import BackendError

__all__ = ["TranslatedAdapter", "events_of"]


@attrs.define(kw_only=True)
class TranslatedAdapter(HTTPAdapter):
    """An adapter that sends `Translation`s. A subclass gives them in `translate`."""

    _clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False, eq=False)

    @abc.abstractmethod
    def translate(self, call: Call) -> Translation:
        """The call in the engine's tongue.

        Raises:
            BackendError: (`Fault.BAD_REQUEST`) for what the engine cannot do.
        """

    def chunks(self, operation: Operation) -> Chunks:
        """A writer for one answer."""
        return Chunks(operation=operation, model=self.model_id, created=self._clock.time_ns() // 1_000_000_000)

    def _told(self, call: Call) -> tuple[Translation, bytes]:
        try:
            told = self.translate(call)
            return told, orjson.dumps(told.body)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise refuse("the request has not the shape it should", "body") from error

    async def send(self, call: Call) -> Reply:
        """Make one call; a stream has begun when this returns, so an error said first is the call's own."""
        told, body = self._told(call)
        incoming = await self.exchange("POST", told.path, body, headers=call.headers, limits=call.limits)
        told.headers = incoming.headers
        status, headers, tally = incoming.status, incoming.headers, told.chunks.tally
        try:
            if not call.stream:
                answer = told.read_whole(await incoming.read(), status)
                return Reply(status=status, headers=headers, body=answer, tally=tally)
            events = _translated(incoming, told)
            first = await anext(events)
        except BackendError as error:
            error.received = False  # nothing has been handed on yet
            await incoming.aclose()
            raise
        except BaseException:  # a cancelled call, too, must stop the engine
            await incoming.aclose()
            raise
        return Reply(status=status, headers=headers, events=_resumed(first, events), tally=tally, close=incoming.aclose)


async def _resumed(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in events:
        yield piece


async def _translated(incoming: Incoming, told: Translation) -> AsyncIterator[bytes]:
    """The engine's stream in OpenAI's shape; an error amid it ends the exchange."""
    try:
        async for event in events_of(incoming, told.framing, incoming.event_bytes):
            piece = told.done() if event == b"[DONE]" else told.read_event(event)
            is_over = told.chunks.tally.is_complete
            if is_over:
                incoming.finish()
            if piece:
                yield piece
            if is_over:
                return
        told.is_whole = incoming.is_complete
        yield told.end()
    except BackendError as error:
        error.received = True
        await incoming.aclose()
        raise


async def events_of(
    incoming: AsyncIterator[bytes], framing: Framing, max_bytes: int = MAX_EVENT_BYTES
) -> AsyncIterator[bytes]:
    """The single events of a stream: the data of SSE events, lines, or the pieces as they come."""
    if framing is Framing.TEXT:
        async for piece in incoming:
            yield piece
        return
    splitter = (EventSplitter if framing is Framing.SSE else LineSplitter)(max_bytes)
    async for piece in incoming:
        for event in _single(splitter.feed(piece)):
            yield event
        if splitter.refused is not None:
            raise splitter.refused
    # engines forget the last line's end now and then, and some answer a refusal that is no event under a 200; what was
    # cut off cannot be read
    rest = splitter.rest.strip()
    last = rest if isinstance(splitter, LineSplitter) or rest.startswith(b"{") else data_of(rest)
    if last:  # a comment has no data
        yield last


def _single(found: bytes | list[bytes]) -> Iterator[bytes]:
    if isinstance(found, list):
        return (line for line in found if line.strip())
    return (data for event in split_events(found) if (data := data_of(event)))
