"""The stage that answers a question that was answered before, also in other words of courtesy and form."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import anyio.to_thread
import attrs
import orjson

from kvfleet.adapters.call import Operation
from kvfleet.builtin.answers import ExactCache, GivenAnswer, digest_of, may_keep, may_look, replay
from kvfleet.builtin.facts import messages_of
from kvfleet.cache.answer_memory import AnswerMemory, Held
from kvfleet.cache.likeness import Likeness, Meaning, Sketch, Wording
from kvfleet.config.fields import number, text
from kvfleet.errors import ComponentError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Answer, Kind, Outcome, RoutingContext
from kvfleet.plugin.spec import hookimpl

__all__ = ["SemanticAnswers"]

_TOOLS = ("tools", "functions")
_CALLS = ("tool_calls", "function_call")


@attrs.define
class SemanticAnswers(ExactCache):
    """Answer from memory what was answered before: the same request, or a chat that asks the same as its last question.

    Everything but the last question must be the very same: what stands before it, every parameter that changes an
    answer, tenant, data class, region, tags and the model asked for. The question may differ in form alone, unless an
    embedder is given. Requests with tools, answers with tool calls, cut-off answers and errors are never kept.
    """

    max_size: int = number(10_000, ge=1, unit="answers", doc="Most answers; the least recently used go first.")
    similarity_threshold: float = number(0.85, ge=0, le=1, doc="Least similarity of a question that asks the same.")
    embedder: str = text(
        "", doc="A function from text to a vector, to compare meanings; by wording if empty.", example="my_models:embed"
    )
    _likeness: Likeness = attrs.field(init=False, factory=Wording, repr=False)
    _near_hits: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        """Make the memory."""
        self._memory = AnswerMemory(self.max_megabytes * 1e6, self.max_size)

    def provision(self, services: Services) -> None:  # noqa: ARG002 - the contract's signature
        """Load the embedder, if one is named.

        Raises:
            ComponentError: if there is no such function.
        """
        if self.embedder:
            self._likeness = Meaning(_load(self.embedder))

    def inherit(self, before: ExactCache) -> None:
        """Remember the answers that were given before a reload, unless questions are compared in another way now."""
        if isinstance(before, SemanticAnswers) and before.embedder == self.embedder:
            ExactCache.inherit(self, before)
            self._near_hits = int(before.state()["near_hits"])

    async def answer(self, ctx: RoutingContext) -> Answer | None:
        """The answer to this question, or None."""
        if not self._is_fit(ctx) or not may_look(ctx):
            return None
        names = {model.name for model in ctx.candidates}
        key = digest_of(ctx)
        held = self._memory.get(key, ctx.now_s)
        if held is not None and held.value.model in names:
            self._note(ctx, key, is_hit=True)
            return replay(held, ctx)
        scope, sketch = await self._sketch(ctx)
        if sketch is not None:
            near = self._memory.nearest(
                sketch,
                scope,
                self._likeness,
                threshold=self.similarity_threshold,
                now_s=ctx.now_s,
                fits=lambda kept: kept.model in names,
            )
            if near is not None:
                self._note(ctx, near[0], is_hit=True, is_near=True)
                return replay(near[1], ctx, match="near", similarity=near[2])
        self._note(ctx, key, is_hit=False)
        return None

    async def observe(self, outcome: Outcome) -> None:
        """Keep a whole answer in words."""
        ctx, served, content = outcome.context, outcome.served_by, outcome.content
        if served is None or not outcome.is_success or not 0 < len(content) <= self.max_answer_bytes:
            return
        if not self._is_fit(ctx) or not may_keep(ctx) or not _is_whole(content, is_stream=ctx.request.stream):
            return
        scope, sketch = await self._sketch(ctx)
        value = GivenAnswer(served.name, content, outcome.usage, outcome.cost_usd)
        until_s = ctx.now_s + self.ttl_s
        self._memory.put(digest_of(ctx), Held(value, len(content), ctx.now_s, until_s, ctx.tenant, scope, sketch))

    def state(self) -> Mapping[str, float]:
        """How much is kept, and how often it was of use; `near_hits` are among `hits`."""
        return {**ExactCache.state(self), "near_hits": self._near_hits}

    def _is_fit(self, ctx: RoutingContext) -> bool:
        request = ctx.request
        if request.operation not in (Operation.CHAT, Operation.COMPLETION) or any(map(request.body.get, _TOOLS)):
            return False
        return self.any_temperature or request.body.get("temperature") == 0

    async def _sketch(self, ctx: RoutingContext) -> tuple[str, Sketch | None]:
        """What must be the same beside the question, and the question; None where only the same request will do."""
        question = _question_of(ctx)
        if question is None:
            return "", None
        asked, rest = question
        if isinstance(self._likeness, Wording):
            sketch = self._likeness.sketch(asked)
        else:
            sketch = await anyio.to_thread.run_sync(self._likeness.sketch, asked)
        return digest_of(ctx, rest).hex(), sketch

    def _note(self, ctx: RoutingContext, key: Any, *, is_hit: bool, is_near: bool = False) -> None:
        if not ctx.dry_run:
            self._count(key, is_hit)
            self._near_hits += is_near


def _question_of(ctx: RoutingContext) -> tuple[str, Mapping[str, Any]] | None:
    """The text of a chat's last message, if it is a user's and all of it is one text; and the body without it."""
    body = ctx.request.body
    messages = messages_of(body) if ctx.request.operation is Operation.CHAT else ()
    if not messages or messages[-1].get("role") != "user" or len(messages) != len(body["messages"]):
        return None
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str) and len(content) == 1:
        part = content[0]
        is_text = isinstance(part, Mapping) and part.get("type") == "text" and set(part) == {"type", "text"}
        content = part["text"] if is_text else None
    if not isinstance(content, str):
        return None
    bare = {name: value for name, value in last.items() if name != "content"}
    return content, {**body, "messages": [*messages[:-1], bare]}


def _is_whole(content: bytes, *, is_stream: bool) -> bool:
    """True for an answer in words that came to its own end."""
    try:
        chunks = list(_chunks(content)) if is_stream else [orjson.loads(content)]
        return _ends_well(chunks)
    except (orjson.JSONDecodeError, AttributeError, TypeError):
        return False


def _ends_well(chunks: Iterable[Mapping[str, Any]]) -> bool:
    ends: dict[Any, Any] = {}
    for chunk in chunks:
        if chunk.get("error"):
            return False
        for choice in chunk.get("choices") or ():
            said = choice.get("message") or choice.get("delta") or {}
            if any(map(said.get, _CALLS)):
                return False
            index = choice.get("index", 0)
            ends[index] = choice.get("finish_reason") or ends.get(index)
    return bool(ends) and all(end == "stop" for end in ends.values())


def _chunks(content: bytes) -> Iterator[Mapping[str, Any]]:
    """The chunks of a whole stream.

    Raises:
        TypeError: if its end is missing.
    """
    lines = [line[5:].strip() for line in content.splitlines() if line.startswith(b"data:")]
    if not lines or lines[-1] != b"[DONE]":
        raise TypeError
    for line in lines[:-1]:
        yield orjson.loads(line)


def _load(place: str) -> Callable[[str], Sequence[float]]:
    module, _, name = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "write it as module:function, and install its package beside kvfleet"
        raise ComponentError(f"answer.semantic_cache: there is no embedder {place!r}; {remedy}") from error
    if not callable(found):
        raise ComponentError(f"answer.semantic_cache: the embedder {place!r} is no function")
    embed: Callable[[str], Sequence[float]] = found
    return embed


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The stage."""
    yield Component(Kind.ANSWER, "semantic_cache", SemanticAnswers)
