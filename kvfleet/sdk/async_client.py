"""The fleet inside an asynchronous Python program, without a gateway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvfleet.config.loader import load_config
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router

if TYPE_CHECKING:
    from kvfleet.adapters.base import ChatMessage, ChatResponse, EndpointHealth
    from kvfleet.config.schema import FleetConfig
    from kvfleet.runtime import RouteStream
    from kvfleet.trace.explanation import Explanation

__all__ = ["AsyncFleetClient"]

Messages = Sequence["ChatMessage | Mapping[str, Any]"]


class AsyncFleetClient:
    """A fleet to talk to: a thin face over a `Router`, which does everything.

    Use it as an asynchronous context manager, or call `close` at the end. It belongs to one event loop.

    Args:
        router: The router; the client closes it.

    What `chat`, `chat_with_explanation`, `stream` and `simulate` take beside prompt or messages is what
    `kvfleet.pipeline.requests.request_from` takes: ``model``, ``data_class``, ``tenant_id``, ``tags``, ``temperature``,
    ``max_tokens``, ``tools``, ``response_format``, ``strategy_override``, ``model_allowlist``, ``timeout_s`` and more.
    All raise `kvfleet.errors.RouteError`, which carries the trace, if there is no answer.
    """

    def __init__(self, router: Router) -> None:
        self.router = router

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """A client of the fleet in a file.

        Raises:
            ConfigError: with all findings.
            FileNotFoundError: if there is no such file.
        """
        table = discover()
        return cls.from_config(load_config(path, resolvers=(table.secret,)), table=table)

    @classmethod
    def from_config(cls, config: FleetConfig, **options: Any) -> Self:
        """A client of a fleet; `options` are the router's.

        Raises:
            ConfigError: with all findings.
        """
        return cls(Router(config, **options))

    async def chat(
        self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any
    ) -> ChatResponse:
        """The whole answer to a prompt or a conversation."""
        response, _ = await self.router.route(messages, prompt, **options)
        return response

    async def chat_with_explanation(
        self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any
    ) -> tuple[ChatResponse, Explanation]:
        """The same, and why it came from where it came from."""
        return await self.router.route(messages, prompt, **options)

    def stream(
        self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any
    ) -> AbstractAsyncContextManager[RouteStream]:
        """The answer in chunks: ``async with client.stream("Hi") as chunks: async for chunk in chunks: …``.

        Leaving the block early cancels the engine's work; after the last chunk, ``chunks.explanation`` is whole.
        """
        return self.router.stream(messages, prompt, **options)

    async def simulate(
        self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any
    ) -> Explanation:
        """Where a request would go, and why; nobody is asked."""
        return await self.router.simulate(messages, prompt, **options)

    async def health(self) -> dict[str, EndpointHealth]:
        """Ask every endpoint now how it is."""
        return await self.router.health_check_all()

    async def close(self) -> None:
        """Close the router; twice is harmless."""
        await self.router.aclose()

    async def __aenter__(self) -> Self:
        await self.router.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
