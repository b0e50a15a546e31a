"""An answer held back until it is decided on: a whole one, or a stream of which only the beginning has been read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Self

import attrs
import orjson

from kvfleet.adapters.base import ChatResponse, StreamChunk, chunks_of
from kvfleet.adapters.call import Reply
from kvfleet.builtin.logprobs import Logprobs
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError
from kvfleet.plugin.contract import Answer
from kvfleet.plugin.judging import Grade

__all__ = ["Held", "response_in", "response_of"]


@attrs.define
class Held:
    """One answer, and what was made of it.

    Attributes:
        answer: As the attempt gave it.
        model: Who gave it.
        response: What it says; of a stream, what has been read of it. None if it cannot be read.
        is_open: True while its engine may still be writing.
        logprobs: What its engine told of its tokens' probabilities, if it was asked.
        grade: The judges' verdict.
    """

    answer: Answer
    model: ModelConfig
    response: ChatResponse | None
    is_open: bool = False
    logprobs: Logprobs | None = None
    grade: Grade = Grade(None, "nobody judged it")
    _pieces: Sequence[bytes] = ()

    @classmethod
    async def of(cls, answer: Answer, model: ModelConfig, *, most_tokens: int | None, most_bytes: int) -> Self:
        """Hold an answer; of a stream, read so many tokens of it (all of them if None), and no more than so many bytes.

        Raises:
            BackendError: if the stream breaks off meanwhile.
        """
        events = answer.reply.events
        if events is None:
            return cls(answer, model, _read(answer.reply.body))
        pieces: list[bytes] = []
        chunks: list[StreamChunk] = []
        size, is_open = 0, False
        async for piece in events:
            pieces.append(piece)
            chunks += chunks_of(piece)
            size += len(piece)
            said = sum(bool(chunk.content) for chunk in chunks)
            if size >= most_bytes or (most_tokens is not None and said >= most_tokens):
                is_open = True
                break
        return cls(answer, model, _joined(chunks), is_open, pieces=pieces)

    def given(self) -> Answer:
        """The answer for the caller: what was read of a stream, and then the rest."""
        reply = self.answer.reply
        if reply.events is None:
            return self.answer
        replayed: Reply = attrs.evolve(reply, events=_Replayed(b"".join(self._pieces), reply.events))
        return attrs.evolve(self.answer, reply=replayed)

    async def close(self) -> None:
        """Give it up: its engine stops."""
        self.is_open = False
        await self.answer.reply.close()


class _Replayed(AsyncIterator[bytes]):
    """A beginning and the rest. No generator, so that it may be closed while another task waits for a piece."""

    def __init__(self, beginning: bytes, rest: AsyncIterator[bytes]) -> None:
        self._beginning = beginning
        self._rest = rest

    async def __anext__(self) -> bytes:
        beginning, self._beginning = self._beginning, b""
        return beginning or await anext(self._rest)


async def response_of(reply: Reply) -> ChatResponse:
    """A whole answer, however it comes.

    Raises:
        BackendError: if there is none.
    """
    if reply.events is None:
        return ChatResponse.from_openai(orjson.loads(reply.body))
    return _joined([chunk async for piece in reply.events for chunk in chunks_of(piece)])


def response_in(content: bytes) -> ChatResponse | None:
    """A whole answer as it was kept: a JSON object, or a stream's events one after the other; None if it is neither."""
    if content.startswith(b"{"):
        return _read(content)
    try:
        return _joined(chunks_of(content))
    except (orjson.JSONDecodeError, AttributeError, TypeError):
        return None


def _read(body: bytes) -> ChatResponse | None:
    try:
        return ChatResponse.from_openai(orjson.loads(body))
    except (BackendError, orjson.JSONDecodeError, AttributeError, TypeError):
        return None


def _joined(chunks: Sequence[StreamChunk]) -> ChatResponse:
    """The first choice of a stream, as far as it came."""
    own = [chunk for chunk in chunks if not ((chunk.raw.get("choices") or [{}])[0].get("index") or 0)]
    ends = [chunk.finish_reason for chunk in own if chunk.finish_reason]
    return ChatResponse(
        content="".join(chunk.content for chunk in own),
        finish_reason=ends[-1] if ends else None,
        tool_calls=tuple(call for chunk in own for call in _calls(chunk)),
        usage=next((chunk.usage for chunk in reversed(chunks) if chunk.usage is not None), None),
    )


def _calls(chunk: StreamChunk) -> Sequence[dict[str, object]]:
    choice = (chunk.raw.get("choices") or [{}])[0]
    found = (choice.get("delta") or {}).get("tool_calls")
    return found if isinstance(found, list) else ()
