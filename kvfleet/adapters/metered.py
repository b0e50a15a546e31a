"""OpenAI-compatible engines that show their load on a Prometheus page."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs

from kvfleet.adapters.base import EndpointHealth, EngineLoad
from kvfleet.adapters.exposition import Rate, Reader, Samples, totals
from kvfleet.adapters.openai_compat import OpenAICompatAdapter
from kvfleet.config.models import rank_of
from kvfleet.errors import BackendError, Fault

__all__ = ["MeteredAdapter", "tokens_of"]

PAGE_TTL_S = 0.5


@attrs.define(kw_only=True)
class MeteredAdapter(OpenAICompatAdapter):
    """What such engines have in common: one page, read at most twice a second for all models of an endpoint."""

    reader: ClassVar[Reader]
    prefix: ClassVar[str]
    rank_label: ClassVar[str] = ""
    """The label that says which data-parallel rank a line of the page is about."""

    _generated: Rate = attrs.field(init=False, factory=Rate, repr=False, eq=False)

    @abc.abstractmethod
    def load_of(self, samples: Samples) -> EngineLoad:
        """The engine's load, from the lines that `reader` found."""

    async def load_without_metrics(self) -> EngineLoad:
        """The engine's load where its page is switched off; all None unless the engine says it elsewhere too."""
        return EngineLoad()

    async def get_load(self) -> EngineLoad:
        """The engine's load and cache; see `InferenceAdapter.get_load`."""
        samples = await self._samples()
        if samples is None:
            return await self.load_without_metrics()
        return self.load_of(samples)

    async def get_metrics(self) -> Mapping[str, float]:
        """The engine's own figures by their own names, summed over its processes; empty if the page is switched off."""
        page = await self._page()
        return {} if page is None else totals(page, self.prefix)

    async def health_check(self) -> EndpointHealth:
        """Ask ``/health``, and a healthy engine for its load too."""
        found = await self.probe("/health")
        if not found.healthy:
            return found
        try:
            load = await self.get_load()
        except BackendError:
            return found  # it is up; that its load cannot be read is not its health
        return attrs.evolve(
            found,
            queue_depth=load.waiting,
            active_requests=load.running,
            kv_usage=load.kv_usage,
            tokens_per_second=load.tokens_per_second,
        )

    def throughput(self, generated_tokens: float | None) -> float | None:
        """Tokens per second since the last reading, from a running total."""
        return self._generated.update(generated_tokens, self.shared_connections().clock.now_s())

    async def _samples(self) -> Samples | None:
        page = await self._page()
        if page is None:
            return None
        samples, rank = self.reader.read(page), rank_of(self.endpoint)
        return samples if rank is None else samples.only(self.rank_label, str(rank))

    async def _page(self) -> bytes | None:
        """The page; None if the engine does not serve it."""
        return await self.shared_connections().shared(("metrics", self.root), PAGE_TTL_S, self._fetch_page)

    async def _fetch_page(self) -> bytes | None:
        response = await self.control("GET", "/metrics")
        if response.is_success:
            return response.content
        refusal = self.error_of(response.status_code, response.headers, response.content)
        if refusal.kind is Fault.NOT_FOUND:
            return None
        raise refusal


def tokens_of(answer: Any) -> Sequence[int]:
    """The token ids of an answer to a question for them.

    Raises:
        BackendError: (`Fault.PROTOCOL`) if it has none.
    """
    tokens = answer.get("tokens") if isinstance(answer, Mapping) else None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise BackendError(Fault.PROTOCOL, "the engine's answer has no token ids")
    return tokens
