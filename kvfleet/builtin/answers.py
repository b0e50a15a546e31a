"""Stages that answer without a backend."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, ClassVar

import attrs
import orjson

from kvfleet.adapters.call import Operation, Reply, Tally, Usage
from kvfleet.cache.answer_memory import AnswerMemory, Held
from kvfleet.config.fields import flag, number
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Answer, Kind, Outcome, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue

__all__ = ["ExactCache", "GivenAnswer", "digest_of", "may_keep", "may_look", "replay"]

# What names the caller or books the request, and changes no answer. Everything else is part of the key.
_NEUTRAL = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "store", "service_tier"})
_DONE = b"data: [DONE]"
_FIXED = (Operation.EMBEDDING, Operation.RERANK)


@attrs.frozen
class GivenAnswer:
    """An answer that was given."""

    model: str
    content: bytes = attrs.field(repr=False)
    usage: Usage | None
    cost_usd: float | None = None


@attrs.define
class ExactCache:
    """Answer from memory what was answered before: the very same request, of the same tenant and data class.

    Only requests that leave nothing to chance are looked up and kept: those of temperature 0, embeddings and rankings.
    An answer is given again only while its model is among the candidates, so that policy holds for it too; and a
    stream is given as a stream. `Cache-Control: no-cache` passes it by, `no-store` leaves nothing in it.
    """

    ttl_s: float = number(3600.0, gt=0, unit="s", doc="How long an answer is kept.")
    max_megabytes: float = number(64.0, gt=0, doc="Most memory for answers; the least recently used go first.")
    max_answer_bytes: int = number(262_144, gt=0, unit="bytes", doc="Larger answers are not kept.")
    any_temperature: bool = flag(False, doc="Also keep answers to requests that leave something to chance.")
    wants_content: ClassVar[bool] = True
    reads_headers: ClassVar[tuple[str, ...]] = ("cache-control",)
    _memory: AnswerMemory[GivenAnswer] = attrs.field(init=False, repr=False)
    _hits: int = attrs.field(init=False, default=0)
    _misses: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        """Make the memory."""
        self._memory = AnswerMemory(self.max_megabytes * 1e6)

    def inherit(self, before: ExactCache) -> None:
        """Remember the answers that were given before a reload."""
        bounds = self._memory.max_bytes, self._memory.max_entries
        self._memory = before._memory
        self._memory.resize(*bounds)
        self._hits, self._misses = before._hits, before._misses

    async def answer(self, ctx: RoutingContext) -> Answer | None:
        """The answer given before, or None."""
        if not self._is_fit(ctx) or not may_look(ctx):
            return None
        key = digest_of(ctx)
        held = self._memory.get(key, ctx.now_s)
        is_good = held is not None and any(m.name == held.value.model for m in ctx.candidates)
        if not ctx.dry_run:
            self._count(key, is_good)
        if held is None or not is_good:
            return None
        return replay(held, ctx)

    async def observe(self, outcome: Outcome) -> None:
        """Keep a whole answer."""
        ctx, served = outcome.context, outcome.served_by
        content = outcome.content
        if served is None or not outcome.is_success or not 0 < len(content) <= self.max_answer_bytes:
            return
        if not self._is_fit(ctx) or not may_keep(ctx) or (ctx.request.stream and _DONE not in content[-32:]):
            return
        value = GivenAnswer(served.name, content, outcome.usage, outcome.cost_usd)
        held = Held(value, len(content), ctx.now_s, ctx.now_s + self.ttl_s, ctx.tenant)
        self._memory.put(digest_of(ctx), held)

    def state(self) -> Mapping[str, float]:
        """How much is kept, and how often it was of use."""
        memory = self._memory
        return {"answers": len(memory), "bytes": memory.size, "hits": self._hits, "misses": self._misses}

    def _is_fit(self, ctx: RoutingContext) -> bool:
        """True if the same request deserves the same answer."""
        return self.any_temperature or ctx.request.operation in _FIXED or ctx.request.body.get("temperature") == 0

    def _count(self, key: bytes, is_hit: bool) -> None:
        if is_hit:
            self._hits += 1
            self._memory.touch(key)
        else:
            self._misses += 1


def digest_of(ctx: RoutingContext, body: Mapping[str, Any] | None = None) -> bytes:
    """Everything that tells one answer from another, as a digest that cannot be made to collide.

    Args:
        ctx: The request's.
        body: Its body if it is not the request's own, as without the question.
    """
    request = ctx.request
    whole = request.body if body is None else body
    known: dict[str, Any] = {name: value for name, value in whole.items() if name not in _NEUTRAL}
    who = [
        request.operation,
        ctx.tenant,
        ctx.data_class,
        ctx.region,
        request.model,
        sorted(request.models) if request.models is not None else None,
        request.strategy,
        request.stream,
        # What `auto` means may hang on them.
        dict(request.tags),
    ]
    return hashlib.sha256(orjson.dumps([who, known], option=orjson.OPT_SORT_KEYS)).digest()


def may_look(ctx: RoutingContext) -> bool:
    """True unless the client wants an answer made for this request."""
    asked = ctx.request.condition_headers.get("cache-control", "").lower()
    return "no-cache" not in asked and "no-store" not in asked


def may_keep(ctx: RoutingContext) -> bool:
    """True unless the client forbids to keep the answer."""
    return "no-store" not in ctx.request.condition_headers.get("cache-control", "").lower()


def replay(held: Held[GivenAnswer], ctx: RoutingContext, *, match: str = "exact", similarity: float = 1.0) -> Answer:
    """A kept answer as the client gets it, and as the trace tells of it."""
    kept = held.value
    usage = kept.usage
    details: dict[str, AttributeValue] = {
        names.ANSWER_MATCH: match,
        names.ANSWER_SIMILARITY: float(similarity),
        names.ANSWER_AGE_S: max(0.0, ctx.now_s - held.kept_s),
        names.ANSWER_MODEL: kept.model,
    }
    if usage is not None:
        details[names.ANSWER_SAVED_PROMPT] = usage.prompt_tokens
        details[names.ANSWER_SAVED_COMPLETION] = usage.completion_tokens
    if kept.cost_usd is not None:
        details[names.ANSWER_SAVED_USD] = float(kept.cost_usd)
    return Answer(_reply(kept, is_stream=ctx.request.stream), details=details)


def _reply(kept: GivenAnswer, *, is_stream: bool) -> Reply:
    tally = Tally(usage=kept.usage, model=kept.model, is_complete=True)
    if not is_stream:
        return Reply(headers={"content-type": "application/json"}, body=kept.content, tally=tally)
    return Reply(headers={"content-type": "text/event-stream"}, events=_events(kept.content, tally), tally=tally)


async def _events(content: bytes, tally: Tally) -> AsyncIterator[bytes]:
    """The events one by one, as they came the first time."""
    for event in content.split(b"\n\n"):
        if event.strip():
            tally.events += 1
            yield event + b"\n\n"


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The stages that answer."""
    yield Component(Kind.ANSWER, "exact_cache", ExactCache)
