"""Anthropic's Messages API (``POST /v1/messages``) as a surface of the gateway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from kvfleet.adapters.call import Native, Tally
from kvfleet.gateway.surfaces.messages_answer import MessagesWriter, error_of, message_of
from kvfleet.gateway.surfaces.messages_request import Reading, chat_of
from kvfleet.gateway.surfaces.surface import Asked, Body, Surface, usage_in

__all__ = ["Messages"]

_BETA = b"anthropic-beta"
_SESSION = b"x-claude-code-session-id"


class Messages(Surface):
    """Anthropic's Messages API."""

    name: ClassVar[str] = "messages"
    path: ClassVar[str] = "/v1/messages"

    def read(self, body: Body, fields: Sequence[tuple[bytes, bytes]]) -> Asked:
        """See `Surface.read`."""
        reading = Reading()
        chat = chat_of(body, reading)
        own = {name: value.decode("latin-1") for name, value in fields if name in (_BETA, _SESSION)}
        headers = ((_BETA.decode(), own[_BETA]),) if _BETA in own else ()
        native = Native(surface=self.name, body=body, headers=headers, only=reading.only)
        return Asked(chat=chat, native=native, session=own.get(_SESSION, "")[:256])

    def render(self, answer: Body, asked: Asked, identifier: str, tally: Tally) -> dict[str, Any]:
        """See `Surface.render`."""
        body = asked.native.body
        return message_of(answer, identifier, usage_in(answer, tally), stops=_stops(body), thinks=_thinks(body))

    def writer(self, asked: Asked, identifier: str) -> MessagesWriter:
        """See `Surface.writer`."""
        body = asked.native.body
        return MessagesWriter(identifier, _stops(body), _thinks(body))

    def error(self, wrapped: dict[str, Any], status: int) -> dict[str, Any]:
        """See `Surface.error`."""
        return error_of(wrapped, status)


def _stops(body: Body) -> Sequence[str]:
    given = body.get("stop_sequences")
    return [stop for stop in given if isinstance(stop, str)] if isinstance(given, list) else ()


def _thinks(body: Body) -> bool:
    """True if the client wants to see thoughts; others take the first block for the answer."""
    thinking = body.get("thinking")
    return isinstance(thinking, Mapping) and thinking.get("type") in ("enabled", "adaptive")
