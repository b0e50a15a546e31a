"""Routing as Python programs ask for it: a conversation in, an answer or a stream and its explanation out."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import orjson

from kvfleet.adapters.base import ChatMessage, ChatResponse
from kvfleet.pipeline.dispatched import Dispatch, RouteStream
from kvfleet.pipeline.requests import request_from
from kvfleet.plugin.contract import RouteRequest
from kvfleet.trace.explanation import Explanation

__all__ = ["Conversations"]


class Conversations(abc.ABC):
    """What whoever dispatches requests can do with conversations."""

    @abc.abstractmethod
    async def dispatch(self, request: RouteRequest) -> Dispatch:
        """Route one request."""

    @abc.abstractmethod
    async def simulate_request(self, request: RouteRequest) -> Explanation:
        """Decide as for a live request, and call nobody."""

    async def route(
        self,
        messages: Sequence[ChatMessage | Mapping[str, Any]] | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> tuple[ChatResponse, Explanation]:
        """Route a chat request and wait for the whole answer.

        Args:
            messages: The conversation; or
            prompt: a single user message; or ``request``, a `ChatRequest`, among the options.
            **options: See `kvfleet.pipeline.requests.request_from`.

        Raises:
            RouteError: with ``.trace``, if there is no answer.
        """
        dispatched = await self.dispatch(request_from(messages, prompt, **options))
        reply, model = dispatched.answer.reply, dispatched.answer.served_by
        explanation = dispatched.explanation
        response = ChatResponse.from_openai(
            orjson.loads(reply.body), latency_ms=explanation.total_latency_ms, endpoint=model.endpoint if model else ""
        )
        return response, explanation

    @contextlib.asynccontextmanager
    async def stream(
        self,
        messages: Sequence[ChatMessage | Mapping[str, Any]] | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> AsyncIterator[RouteStream]:
        """Route a chat request and stream the answer; leaving the block early cancels it.

        Takes what `route` takes.
        """
        dispatched = await self.dispatch(request_from(messages, prompt, stream=True, **options))
        try:
            yield RouteStream(dispatched)
        finally:
            await dispatched.answer.reply.close()

    async def simulate(
        self,
        messages: Sequence[ChatMessage | Mapping[str, Any]] | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> Explanation:
        """Decide as `route` would, and call nobody. Takes what `route` takes."""
        return await self.simulate_request(request_from(messages, prompt, **options))
