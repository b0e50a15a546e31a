"""OpenAI's Responses API (``POST /v1/responses``) as a surface of the gateway, without its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kvfleet.adapters.call import Native, Tally
from kvfleet.gateway.surfaces.messages_request import Reading
from kvfleet.gateway.surfaces.responses_answer import response_of
from kvfleet.gateway.surfaces.responses_request import chat_of
from kvfleet.gateway.surfaces.responses_stream import ResponsesWriter
from kvfleet.gateway.surfaces.surface import Asked, Body, Surface, usage_in

__all__ = ["Responses"]


class Responses(Surface):
    """OpenAI's Responses API."""

    name: ClassVar[str] = "responses"
    path: ClassVar[str] = "/v1/responses"

    def read(self, body: Body, fields: Sequence[tuple[bytes, bytes]]) -> Asked:
        """See `Surface.read`."""
        del fields
        reading = Reading()
        chat = chat_of(body, reading)
        return Asked(chat=chat, native=Native(surface=self.name, body=body, only=reading.only))

    def render(self, answer: Body, asked: Asked, identifier: str, tally: Tally) -> dict[str, Any]:
        """See `Surface.render`."""
        return response_of(answer, asked.native.body, identifier, usage_in(answer, tally))

    def writer(self, asked: Asked, identifier: str) -> ResponsesWriter:
        """See `Surface.writer`."""
        return ResponsesWriter(asked.native.body, identifier)

    def error(self, wrapped: dict[str, Any], status: int) -> dict[str, Any]:
        """See `Surface.error`: the API has OpenAI's own errors."""
        del status
        return wrapped
