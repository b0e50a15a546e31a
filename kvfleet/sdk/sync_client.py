"""The fleet inside a synchronous Python program: scripts, notebooks, web workers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs
from anyio.from_thread import BlockingPortal, start_blocking_portal

from kvfleet.config.loader import load_config
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router

if TYPE_CHECKING:
    from kvfleet.adapters.base import ChatMessage, ChatResponse, EndpointHealth, StreamChunk
    from kvfleet.config.schema import FleetConfig
    from kvfleet.runtime import RouteStream
    from kvfleet.trace.explanation import Explanation

__all__ = ["ChunkStream", "SyncFleetClient"]

Messages = Sequence["ChatMessage | Mapping[str, Any]"]


@attrs.define
class ChunkStream:
    """A streamed answer: iterate it for chunks; `explanation` is whole after the last one."""

    _stream: RouteStream
    _portal: BlockingPortal

    @property
    def explanation(self) -> Explanation:
        """Why the request went where it went."""
        return self._stream.explanation

    def __iter__(self) -> Iterator[StreamChunk]:
        chunks = self._stream.__aiter__()

        async def following() -> StreamChunk | None:
            return await anext(chunks, None)

        try:
            while (chunk := self._portal.call(following)) is not None:
                yield chunk
        finally:
            if isinstance(chunks, AsyncGenerator):
                self._portal.call(chunks.aclose)


class SyncFleetClient:
    """What `kvfleet.sdk.async_client.AsyncFleetClient` is, for programs without an event loop.

    The router runs in an event loop of its own, in a thread that starts with the client and ends with `close`; so
    clients do not disturb each other, nor an event loop that the program may have. Any thread may call.

    Args:
        router: Called in that thread; makes the router.
    """

    def __init__(self, router: Callable[[], Router]) -> None:
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._is_closed = False
        self._portal = self._stack.enter_context(start_blocking_portal("asyncio"))
        try:
            self.router: Router = self._portal.call(router)
            self._portal.call(self.router.open)
        except BaseException:
            self._stack.close()
            raise

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
        return cls(lambda: Router(config, **options))

    def chat(self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any) -> ChatResponse:
        """The whole answer to a prompt or a conversation."""
        return self.chat_with_explanation(prompt, messages=messages, **options)[0]

    def chat_with_explanation(
        self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any
    ) -> tuple[ChatResponse, Explanation]:
        """The same, and why it came from where it came from."""

        async def ask() -> tuple[ChatResponse, Explanation]:
            return await self.router.route(messages, prompt, **options)

        return self._portal.call(ask)

    @contextlib.contextmanager
    def stream(
        self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any
    ) -> Iterator[ChunkStream]:
        """The answer in chunks: ``with client.stream("Hi") as chunks: for chunk in chunks: …``.

        Leaving the block early cancels the engine's work.
        """
        streaming = self._portal.wrap_async_context_manager(self.router.stream(messages, prompt, **options))
        with streaming as stream:
            yield ChunkStream(stream, self._portal)

    def simulate(self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any) -> Explanation:
        """Where a request would go, and why; nobody is asked."""

        async def ask() -> Explanation:
            return await self.router.simulate(messages, prompt, **options)

        return self._portal.call(ask)

    def health(self) -> dict[str, EndpointHealth]:
        """Ask every endpoint now how it is."""
        return self._portal.call(self.router.health_check_all)

    def close(self) -> None:
        """Close the router and end its thread; twice is harmless."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with self._stack:
            self._portal.call(self.router.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
