"""What crosses between an attempt and an adapter: a call, and what came back of it.

Both are in the OpenAI shape, which is the common language inside kvfleet.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import attrs

__all__ = [
    "LARGE_BYTES",
    "MOST_TOKENS",
    "OWN_COMMENT",
    "Call",
    "Limits",
    "Native",
    "Operation",
    "Reply",
    "Tally",
    "Usage",
    "count_of",
]


OWN_COMMENT = b": kvfleet: "
"""How a comment begins that kvfleet itself puts into a stream."""
LARGE_BYTES = 256 * 1024
"""Of a request's body: what is done with a larger one is done in several turns of the event loop."""


class Operation(enum.StrEnum):
    """What is asked of a backend."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANK = "rerank"

    @property
    def path(self) -> str:
        """The OpenAI (for rerank: the field's usual) path of the operation."""
        return _PATHS[self]


_NOTHING: Mapping[str, Any] = {}
_PATHS = {
    Operation.CHAT: "/v1/chat/completions",
    Operation.COMPLETION: "/v1/completions",
    Operation.EMBEDDING: "/v1/embeddings",
    Operation.RERANK: "/v1/rerank",
}


MOST_TOKENS = 1_000_000_000
"""More than any engine reads or writes for one request: a count beyond it is a mistake, and would be money."""


def count_of(value: Any) -> int | None:
    """A number of tokens as an engine tells it; None for what cannot be one.

    >>> [count_of(value) for value in (7, 7.0, 0, -7, 1.5, "7", True, 1e300, float("nan"), None)]
    [7, 7, 0, None, None, None, None, None, None, None]
    """
    if type(value) is int:
        return value if 0 <= value <= MOST_TOKENS else None
    if type(value) is float and value.is_integer():
        return count_of(int(value))
    return None


@attrs.frozen
class Usage:
    """Tokens an answer cost; `prompt_tokens` includes the cached ones, `completion_tokens` those of thinking.

    `cached_tokens` were read from a cache, `cache_creation_tokens` written to one that is paid for, `reasoning_tokens`
    thought; each is None if nobody said.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int | None = None
    cache_creation_tokens: int | None = None
    reasoning_tokens: int | None = None

    @classmethod
    def from_openai(cls, usage: Mapping[str, Any] | None) -> Usage | None:
        """Read an OpenAI ``usage`` object; None for none."""
        if not isinstance(usage, Mapping) or not usage:
            return None
        inward, outward = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
        inward = inward if isinstance(inward, Mapping) else _NOTHING
        return cls.told(
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
            inward.get("cached_tokens"),
            inward.get("cache_creation_tokens"),
            outward.get("reasoning_tokens") if isinstance(outward, Mapping) else None,
            total=usage.get("total_tokens"),
        )

    @classmethod
    def told(
        cls, prompt: Any, said: Any, cached: Any = None, written: Any = None, thought: Any = None, *, total: Any = None
    ) -> Usage | None:
        """What an engine says it counted; None if that cannot be, which is as if it had said nothing.

        Of what is missing there were none. More cached tokens than the prompt has are not believed either.
        """
        asked, answered = count_of(prompt or 0), count_of(said or 0)
        if asked is None or answered is None:
            return None
        found = count_of(cached)
        return cls(
            asked,
            answered,
            count_of(total) or asked + answered,
            found if found is None or found <= asked else None,
            count_of(written),
            count_of(thought),
        )

    def to_openai(self) -> dict[str, Any]:
        """The same as an OpenAI ``usage`` object."""
        out: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        }
        cache = {"cached_tokens": self.cached_tokens, "cache_creation_tokens": self.cache_creation_tokens}
        if known := {key: count for key, count in cache.items() if count is not None}:
            out["prompt_tokens_details"] = known
        if self.reasoning_tokens is not None:
            out["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return out


@attrs.frozen(kw_only=True)
class Limits:
    """Time limits of one backend call, in seconds: to connect, to the first byte of the answer, between two bytes."""

    connect_s: float = 5.0
    first_byte_s: float = 60.0
    idle_s: float = 60.0


@attrs.frozen(kw_only=True)
class Native:
    """A chat as its client said it in another API's words, for an engine that speaks those words too.

    The chat body made of it holds every text of it: what the policy saw of one, it saw of the other.

    Attributes:
        surface: The API: ``messages`` (Anthropic) or ``responses`` (OpenAI).
        body: The body as the client sent it, parsed; never changed in place.
        headers: The client's headers that belong to that API.
        only: What of it no chat body can say, so that only an engine that speaks the API can answer; empty if there is
            nothing of the kind.
    """

    surface: str
    body: Mapping[str, Any]
    headers: tuple[tuple[str, str], ...] = ()
    only: str = ""


@attrs.frozen(kw_only=True)
class Call:
    """One backend call, in the OpenAI shape.

    Attributes:
        operation: Which endpoint.
        body: The parsed body; never changed in place.
        raw: The same body as the client sent it, to be forwarded by patching bytes; empty if there is none.
        stream: True if the answer shall be streamed.
        headers: Headers to pass on (request id, ``traceparent``, pass-through); they never carry a credential of ours.
        limits: Time limits.
        ask_usage: True to have usage reported at the end of a stream even where the client did not ask; the relay then
            takes the usage-only event out again.
        native: The same request in the words of another API that this engine speaks; None if there is none, or if the
            answer must come in the OpenAI shape. An adapter may always take `body` instead.
    """

    operation: Operation
    body: Mapping[str, Any]
    raw: bytes = b""
    stream: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    limits: Limits = Limits()
    ask_usage: bool = False
    native: Native | None = None


@attrs.define
class Tally:
    """What was learned of an answer while it passed by.

    Attributes:
        usage: Tokens, when reported.
        finish_reason: Of the first choice, when it came.
        model: The name the engine answered under.
        response_id: The engine's id of the answer.
        events: Server-sent events relayed.
        is_complete: True once the stream said that it ended (``[DONE]``, or a finish reason and a clean end).
    """

    usage: Usage | None = None
    finish_reason: str | None = None
    model: str = ""
    response_id: str = ""
    events: int = 0
    is_complete: bool = False


async def _nothing() -> None:
    return None


@attrs.define
class Reply:
    """What came back of a `Call` that the backend accepted.

    Attributes:
        status: The backend's status, 200..299.
        headers: The backend's headers, lower-case.
        body: The OpenAI answer as JSON bytes; empty for a stream.
        events: For a stream: pieces of one or more whole server-sent events in the OpenAI shape, the final ``[DONE]``
            included. Iterating raises `BackendError` if the backend dies, falls silent, reports an error amid the
            stream, or ends without having finished.
        tally: Filled in as the answer passes.
        close: Ends the call at once, also amid a stream (the engine then stops its work); safe twice.
        surface: The API in whose words `body` or `events` are; empty for OpenAI's chat, as nearly always.
    """

    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict)
    body: bytes = b""
    events: AsyncIterator[bytes] | None = None
    tally: Tally = attrs.field(factory=Tally)
    close: Callable[[], Awaitable[None]] = attrs.field(default=_nothing, repr=False)
    surface: str = ""

    def followed(self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]) -> Reply:
        """The same reply, whose stream goes through another's hands."""
        # `attrs.evolve` takes 4 µs
        return Reply(self.status, self.headers, self.body, events, self.tally, close, self.surface)
