"""Stages that answer without a backend."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, ClassVar

import attrs
import orjson

from kvfleet.adapters.base import Operation, Reply, Tally, Usage
from kvfleet.config.fields import flag, number
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Answer, Kind, Outcome, RoutingContext
from kvfleet.plugin.spec import hookimpl

__all__ = ["ExactCache"]

# What names the caller or books the request, and changes no answer. Everything else is part of the key.
_NEUTRAL = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "store", "service_tier"})
_DONE = b"data: [DONE]"
_FIXED = (Operation.EMBEDDING, Operation.RERANK)


@attrs.frozen
class _Kept:
    """An answer that was given."""

    model: str
    content: bytes = attrs.field(repr=False)
    usage: Usage | None
    until_s: float


@attrs.define
class ExactCache:
    """Answer from memory what was answered before: the very same request, of the same tenant and data class.

    Only requests that leave nothing to chance are looked up and kept: those of temperature 0, embeddings and rankings.
    An answer is given again only while its model is among the candidates, so that policy holds for it too; and a
    stream is given as a stream.
    """

    ttl_s: float = number(3600.0, gt=0, unit="s", doc="How long an answer is kept.")
    max_megabytes: float = number(64.0, gt=0, doc="Most memory for answers; the least recently used go first.")
    max_answer_bytes: int = number(262_144, gt=0, unit="bytes", doc="Larger answers are not kept.")
    any_temperature: bool = flag(False, doc="Also keep answers to requests that leave something to chance.")
    wants_content: ClassVar[bool] = True
    _answers: OrderedDict[bytes, _Kept] = attrs.field(init=False, factory=OrderedDict, repr=False)
    _size: int = attrs.field(init=False, default=0)
    _hits: int = attrs.field(init=False, default=0)
    _misses: int = attrs.field(init=False, default=0)

    async def answer(self, ctx: RoutingContext) -> Answer | None:
        """The answer given before, or None."""
        if not self._is_fit(ctx):
            return None
        key = _key(ctx)
        kept = self._answers.get(key)
        is_good = kept is not None and kept.until_s >= ctx.now_s and any(m.name == kept.model for m in ctx.candidates)
        if not ctx.dry_run:
            self._count(key, is_good)
        if kept is None or not is_good:
            return None
        return Answer(_replay(kept, is_stream=ctx.request.stream))

    async def observe(self, outcome: Outcome) -> None:
        """Keep a whole answer."""
        ctx, served = outcome.context, outcome.served_by
        content = outcome.content
        if served is None or not outcome.is_success or not 0 < len(content) <= self.max_answer_bytes:
            return
        if not self._is_fit(ctx) or (ctx.request.stream and _DONE not in content[-32:]):
            return
        key = _key(ctx)
        self._drop(key)
        self._answers[key] = _Kept(served.name, content, outcome.usage, ctx.now_s + self.ttl_s)
        self._size += len(content)
        while self._size > self.max_megabytes * 1e6:
            self._drop(next(iter(self._answers)))

    def state(self) -> Mapping[str, float]:
        """How much is kept, and how often it was of use."""
        return {"answers": len(self._answers), "bytes": self._size, "hits": self._hits, "misses": self._misses}

    def _is_fit(self, ctx: RoutingContext) -> bool:
        """True if the same request deserves the same answer."""
        return self.any_temperature or ctx.request.operation in _FIXED or ctx.request.body.get("temperature") == 0

    def _count(self, key: bytes, is_hit: bool) -> None:
        if is_hit:
            self._hits += 1
            self._answers.move_to_end(key)
        else:
            self._misses += 1

    def _drop(self, key: bytes) -> None:
        kept = self._answers.pop(key, None)
        if kept is not None:
            self._size -= len(kept.content)


def _key(ctx: RoutingContext) -> bytes:
    """Everything that tells one answer from another, as a digest that cannot be made to collide."""
    request = ctx.request
    body: dict[str, Any] = {name: value for name, value in request.body.items() if name not in _NEUTRAL}
    who = [
        request.operation,
        ctx.tenant,
        ctx.data_class,
        ctx.region,
        request.model,
        sorted(request.models) if request.models is not None else None,
        request.strategy,
        request.stream,
    ]
    return hashlib.sha256(orjson.dumps([who, body], option=orjson.OPT_SORT_KEYS)).digest()


def _replay(kept: _Kept, *, is_stream: bool) -> Reply:
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
