"""What every adapter takes and gives.

Inside kvfleet the OpenAI shapes are the common language: a `Call` carries an OpenAI request body, a `Reply` an OpenAI
answer or a stream of OpenAI server-sent events. An adapter for an engine with a tongue of its own translates in
`send`; everything else (`chat`, `chat_stream`) is built on that one method.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import attrs
import orjson

from kvfleet.adapters.call import Call, Limits, Operation, Reply, Usage
from kvfleet.config.models import rank_of
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "ChatResponse",
    "EndpointHealth",
    "EngineLoad",
    "InferenceAdapter",
    "StreamChunk",
]

RANK_HEADER = "X-Data-Parallel-Rank"
"""Which data-parallel rank is to compute a request: vLLM obeys it (``_get_data_parallel_rank``), and so does SGLang."""

_MOST_NAMED = 3


@attrs.frozen
class ChatMessage:
    """One message of a conversation, as OpenAI has it: `content` is text, a list of parts, or None with tool calls."""

    role: str
    content: str | Sequence[Mapping[str, Any]] | None = ""
    name: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] | None = None
    tool_call_id: str | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict)

    def to_openai(self) -> dict[str, Any]:
        """The message as an OpenAI object; absent fields stay absent, unknown ones are kept."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("name", "tool_calls", "tool_call_id"):
            value = getattr(self, key)
            if value is not None:
                out[key] = value
        out.update(self.extra)
        return out

    @classmethod
    def from_openai(cls, message: Mapping[str, Any]) -> ChatMessage:
        """Read an OpenAI message; fields this class does not know are kept in `extra`."""
        known = ("role", "content", "name", "tool_calls", "tool_call_id")
        extra = {key: value for key, value in message.items() if key not in known}
        return cls(**{key: message[key] for key in known if key in message}, extra=extra)


@attrs.frozen
class ChatRequest:
    """A chat request as Python programs write it. Parameters left at None are not sent."""

    messages: Sequence[ChatMessage]
    model: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    stream: bool = False
    top_p: float | None = None
    stop: str | Sequence[str] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    response_format: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    extra: Mapping[str, Any] = attrs.field(factory=dict)

    def to_openai(self) -> dict[str, Any]:
        """The request as an OpenAI body; `metadata` is kvfleet's own and is not sent, `extra` is."""
        out: dict[str, Any] = {"model": self.model, "messages": [m.to_openai() for m in self.messages]}
        for key in ("temperature", "max_tokens", "top_p", "stop", "tools", "response_format"):
            value = getattr(self, key)
            if value is not None:
                out[key] = value
        if self.stream:
            out["stream"] = True
        out.update(self.extra)
        return out


@attrs.frozen
class ChatResponse:
    """A whole answer. `raw` is the OpenAI object it was read from, with everything the engine said."""

    content: str
    model: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    latency_ms: float = 0.0
    endpoint: str = ""
    raw: Mapping[str, Any] = attrs.field(factory=dict, repr=False)

    @classmethod
    def from_openai(cls, answer: Mapping[str, Any], *, latency_ms: float = 0.0, endpoint: str = "") -> ChatResponse:
        """Read an OpenAI chat or text completion.

        Raises:
            BackendError: (`Fault.PROTOCOL`) if it has no choices.
        """
        try:
            choice = answer["choices"][0]
            message = choice.get("message") or {"content": choice.get("text", "")}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise BackendError(Fault.PROTOCOL, "the backend's answer has no choices") from error
        content = message.get("content")
        return cls(
            content=content if isinstance(content, str) else "",
            model=str(answer.get("model", "")),
            finish_reason=choice.get("finish_reason"),
            usage=Usage.from_openai(answer.get("usage")),
            tool_calls=tuple(message.get("tool_calls") or ()),
            latency_ms=latency_ms,
            endpoint=endpoint,
            raw=answer,
        )


@attrs.frozen
class StreamChunk:
    """One piece of a streamed answer; `raw` is the OpenAI chunk, `usage` comes with the last one if asked for."""

    content: str = ""
    finish_reason: str | None = None
    model: str = ""
    usage: Usage | None = None
    raw: Mapping[str, Any] = attrs.field(factory=dict, repr=False)


@attrs.frozen(kw_only=True)
class EndpointHealth:
    """What one health check found. `queue_depth` and the rest are None where the engine does not say."""

    endpoint: str
    healthy: bool
    latency_ms: float = 0.0
    error: str = ""
    queue_depth: int | None = None
    active_requests: int | None = None
    kv_usage: float | None = None
    tokens_per_second: float | None = None
    models: tuple[str, ...] = ()

    @property
    def load_score(self) -> float:
        """0 (idle) to 1 (full): the fullest of queue, batch and KV cache, as far as they are known."""
        parts = (
            min((self.queue_depth or 0) / 32, 1.0),
            min((self.active_requests or 0) / 128, 1.0),
            self.kv_usage or 0.0,
        )
        return max(parts)


@attrs.frozen(kw_only=True)
class EngineLoad:
    """An engine's own account of its load and cache; None where it does not say.

    Attributes:
        running: Requests in the batch.
        waiting: Requests in the queue.
        kv_usage: Share of the KV cache in use, 0..1.
        cache_blocks: Size of the KV cache, in blocks.
        block_tokens: Tokens in one block.
        cache_tokens: Tokens of prompts and answers that fit into it, where it says so: a hybrid model's take blocks of
            several groups of layers.
        prefix_queries_tokens, prefix_hits_tokens: Running totals of prompt tokens looked up and found in the cache.
        tokens_per_second: Generation throughput.
    """

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    cache_blocks: int | None = None
    block_tokens: int | None = None
    cache_tokens: int | None = None
    prefix_queries_tokens: float | None = None
    prefix_hits_tokens: float | None = None
    tokens_per_second: float | None = None

    @property
    def capacity_tokens(self) -> int | None:
        """Tokens that fit into its cache."""
        if self.cache_tokens or not self.cache_blocks or not self.block_tokens:
            return self.cache_tokens or None
        return self.cache_blocks * self.block_tokens

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of looked-up prompt tokens that were cached, 0..1, since the engine started."""
        if not self.prefix_queries_tokens or self.prefix_hits_tokens is None:
            return None
        return self.prefix_hits_tokens / self.prefix_queries_tokens


@attrs.define(kw_only=True)
class InferenceAdapter(abc.ABC):
    """Speaks to one model on one endpoint.

    An adapter is an attrs class: the fields here, and options of its own made with `kvfleet.config.fields`, which users
    set under ``options:`` of a model.

    Args:
        endpoint: Base URL, with or without a trailing ``/v1``.
        model_id: The engine's name of the model.
        timeout: Seconds to the first byte, used by `chat` and `chat_stream`.
        api_key: The backend's credential.
        headers: Sent with every call.
        connections: The pools shared with other adapters (`kvfleet.adapters.connections.Connections`); an adapter that
            needs some and is given none makes its own, and closes them.

    Attributes:
        continues: What its engine can go on with where an answer stopped: a text whose prompt ends in its beginning, a
            chat whose last message is its beginning (``continue_final_message``, ``add_generation_prompt: false``).
    """

    continues: ClassVar[frozenset[Operation]] = frozenset()

    endpoint: str = ""
    model_id: str = ""
    timeout: float = 60.0
    api_key: str = attrs.field(default="", repr=False)
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    connections: Any = attrs.field(default=None, repr=False, eq=False)
    keeps_marks: ClassVar[bool] = False
    """True if it reads Anthropic's own fields of a chat (`cache_control`, ...); else they are left out."""
    refuses_unlisted: ClassVar[bool] = False
    """True if the engine refuses requests for a model that it does not list; others answer under any name."""

    @classmethod
    def from_config(cls, model: ModelConfig, *, connections: Any = None, **options: Any) -> Self:
        """Make the adapter for one replica; `options` are its own, already checked."""
        rank = rank_of(model.endpoint)
        return cls(
            endpoint=model.endpoint,
            model_id=model.get_model_id(),
            timeout=model.timeout_seconds,
            api_key=model.api_key,
            headers=model.custom_headers if rank is None else {**model.custom_headers, RANK_HEADER: str(rank)},
            connections=connections,
            **options,
        )

    @abc.abstractmethod
    async def send(self, call: Call) -> Reply:
        """Make one call.

        Returns once the answer's headers (for a stream: its beginning) are there.

        Raises:
            BackendError: for anything but an accepted call.
        """

    @abc.abstractmethod
    async def health_check(self) -> EndpointHealth:
        """Ask whether the engine is up; never raises for an engine that is not."""

    def speaks(self, surface: str) -> bool:
        """True if `send` can take a call's `native` of that API, ``messages`` or ``responses``."""
        del surface
        return False

    def why_unlisted(self, listed: Sequence[str]) -> str:
        """What an engine that lists these models serves instead of this one; empty if it lists it, or none at all."""
        if not listed or any(self.is_named(one) for one in listed):
            return ""
        more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
        return f"the engine serves {', '.join(listed[:_MOST_NAMED])}{more}, not {self.model_id}"

    def is_named(self, name: str) -> bool:
        """True if the engine means this adapter's model by a name."""
        return name == self.model_id

    async def list_models(self) -> tuple[str, ...]:
        """Names of the models the engine serves.

        Raises:
            BackendError: if it cannot be asked.
        """
        return (self.model_id,)

    async def get_load(self) -> EngineLoad:
        """The engine's load and cache; all None if it does not say.

        Raises:
            BackendError: if it cannot be asked.
        """
        return EngineLoad()

    async def get_metrics(self) -> Mapping[str, float]:
        """The engine's own figures by their own names; empty if it has none."""
        return {}

    async def prompt_tokens(self, operation: Operation, body: Mapping[str, Any]) -> Sequence[int] | None:
        """The token ids that the engine makes of a request's prompt; None if it cannot be asked for this one's.

        Raises:
            BackendError: if it can, and does not answer.
        """
        del operation, body
        return None

    async def drain_kv_events(self) -> bytes | None:
        """What happened in the engine's KV cache since it was last asked, as it says it; None if it cannot be asked.

        Raises:
            BackendError: if it can, and does not answer.
        """
        return None

    async def get_cache_state(self) -> Mapping[str, float]:
        """State of the KV cache, by the documented names; what is unknown is absent."""
        load = await self.get_load()
        rate = load.prefix_hit_rate
        found = {
            "kv_cache_usage_pct": None if load.kv_usage is None else load.kv_usage * 100,
            "num_requests_running": load.running,
            "num_requests_waiting": load.waiting,
            "prefix_cache_hit_rate": rate,
        }
        return {key: float(value) for key, value in found.items() if value is not None}

    async def aclose(self) -> None:  # noqa: B027 - most adapters hold nothing of their own
        """Close what the adapter holds; safe twice."""

    async def close(self) -> None:
        """The documented name of `aclose`."""
        await self.aclose()

    async def chat(self, request: ChatRequest) -> ChatResponse:
        """Ask for a whole answer.

        Raises:
            BackendError: if there is none.
        """
        reply = await self.send(self._call(request, stream=False))
        try:
            answer = orjson.loads(reply.body)
        except orjson.JSONDecodeError as error:
            raise BackendError(Fault.PROTOCOL, "the backend's answer is not JSON", status=reply.status) from error
        return ChatResponse.from_openai(answer, endpoint=self.endpoint)

    async def chat_stream(self, request: ChatRequest) -> AsyncIterator[StreamChunk]:
        """Ask for a streamed answer; leaving the iteration early cancels it.

        Raises:
            BackendError: if it cannot begin, or breaks off.
        """
        reply = await self.send(self._call(request, stream=True))
        assert reply.events is not None  # noqa: S101 - the contract of `send`
        try:
            async for piece in reply.events:
                for chunk in chunks_of(piece):
                    yield chunk
        finally:
            await reply.close()

    def _call(self, request: ChatRequest, *, stream: bool) -> Call:
        body = attrs.evolve(request, stream=stream, model=request.model or self.model_id).to_openai()
        limits = Limits(first_byte_s=self.timeout, idle_s=self.timeout)
        return Call(operation=Operation.CHAT, body=body, stream=stream, limits=limits)


def chunks_of(events: bytes) -> list[StreamChunk]:
    r"""Read whole OpenAI server-sent events into chunks; ``[DONE]`` and comments give none.

    >>> chunks_of(b'data: {"choices":[{"delta":{"content":"Hi"}}]}\n\ndata: [DONE]\n\n')[0].content
    'Hi'
    """
    found = []
    for line in events.split(b"\n"):
        if not line.startswith(b"data:") or b"[DONE]" in line[:16]:
            continue
        data = orjson.loads(line[5:])
        choice = (data.get("choices") or [{}])[0]
        delta = choice.get("delta") or {"content": choice.get("text")}
        found.append(
            StreamChunk(
                content=delta.get("content") or "",
                finish_reason=choice.get("finish_reason"),
                model=data.get("model", ""),
                usage=Usage.from_openai(data.get("usage")),
                raw=data,
            )
        )
    return found
