"""Tokens' probabilities, asked for on the gateway's own account: read as the answer passes, and not passed on."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self

import attrs
import orjson

from kvfleet.adapters.call import Operation, Reply
from kvfleet.adapters.splitters import data_of
from kvfleet.eval.confidence import logprobs_of
from kvfleet.plugin.contract import RouteRequest

__all__ = ["Logprobs"]

_EVENT = re.compile(rb"(?<=\n\n)|(?<=\n\r\n)")


@attrs.define
class Logprobs:
    """A `kvfleet.plugin.contract.Rewrite` that asks for probabilities, keeps those of the first choice, and hides them.

    Attributes:
        body: The request, asking for them.
        values: Their logarithms, one for each token so far.
        hides: False if the caller asked for them too, and shall have them.
        types: Nothing is taken out of the request.
    """

    body: Mapping[str, Any] = attrs.field(repr=False)
    values: list[float] = attrs.field(factory=list, repr=False)
    hides: bool = True
    types: Sequence[str] = ()

    @classmethod
    def of(cls, request: RouteRequest) -> Self:
        """For one attempt of a request."""
        body = request.body
        if body.get("logprobs") not in (None, False):
            return cls(body, hides=False)
        return cls({**body, "logprobs": 1 if request.operation is Operation.COMPLETION else True})

    def restore(self, reply: Reply) -> Reply:
        """The answer without them."""
        if reply.events is not None:
            return attrs.evolve(reply, events=_Hidden(reply.events, self))
        try:
            answer = orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            return reply
        return attrs.evolve(reply, body=orjson.dumps(answer)) if self.read(answer) else reply

    def read(self, answer: Any) -> bool:
        """Keep what an answer or a chunk tells; True if it was changed."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        is_changed = False
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict) or not choice.get("logprobs"):
                continue
            if not choice.get("index"):
                self.values.extend(logprobs_of(choice))
            if self.hides:
                choice["logprobs"] = None
                is_changed = True
        return is_changed


class _Hidden(AsyncIterator[bytes]):
    """A stream without them. No generator, so that it may be closed while another task waits for a piece."""

    def __init__(self, events: AsyncIterator[bytes], logprobs: Logprobs) -> None:
        self._events = events
        self._logprobs = logprobs

    async def __anext__(self) -> bytes:
        piece = await anext(self._events)
        if b'"logprobs"' not in piece:
            return piece
        return b"".join([self._event(event) for event in _EVENT.split(piece) if event])

    def _event(self, event: bytes) -> bytes:
        try:
            chunk = orjson.loads(data_of(event))
        except orjson.JSONDecodeError:
            return event
        return b"data: " + orjson.dumps(chunk) + b"\n\n" if self._logprobs.read(chunk) else event
