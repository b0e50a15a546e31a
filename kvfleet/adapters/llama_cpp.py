"""llama.cpp's server: OpenAI's API, slots instead of a queue, and a cache in each slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.exposition import Reader, Samples
from kvfleet.adapters.metered import MeteredAdapter, tokens_of
from kvfleet.errors import BackendError, Fault

__all__ = ["LlamaCppAdapter"]

_RUNNING = "llamacpp:requests_processing"
_WAITING = "llamacpp:requests_deferred"
_PREFILLED = "llamacpp:prompt_tokens_total"  # without the cached ones
_CACHED = "llamacpp:prompt_tokens_cached_total"
_GENERATED = "llamacpp:tokens_predicted_total"
_RENDERED = ("messages", "tools", "tool_choice", "add_generation_prompt", "chat_template_kwargs", "response_format")


@attrs.define(kw_only=True)
class LlamaCppAdapter(MeteredAdapter):
    """llama.cpp's ``llama-server``. Start it with ``--metrics`` to have its load and cache read from one page."""

    prefix: ClassVar[str] = "llamacpp:"
    reader: ClassVar[Reader] = Reader([_RUNNING, _WAITING, _PREFILLED, _CACHED, _GENERATED])

    def load_of(self, samples: Samples) -> EngineLoad:
        """Slots at work and requests that wait for one; the engine has no figure for its KV memory."""
        prefilled, cached = samples.total(_PREFILLED), samples.total(_CACHED)
        return EngineLoad(
            running=samples.count(_RUNNING),
            waiting=samples.count(_WAITING),
            prefix_queries_tokens=None if prefilled is None or cached is None else prefilled + cached,
            prefix_hits_tokens=cached,
            tokens_per_second=self.throughput(samples.total(_GENERATED)),
        )

    async def load_without_metrics(self) -> EngineLoad:
        """What ``/slots`` says; all None if that is switched off too."""
        try:
            slots = await self.control_json("GET", "/slots")
        except BackendError as error:
            if error.kind is not Fault.NOT_FOUND:
                raise
            return EngineLoad()
        busy = [slot for slot in slots if isinstance(slot, dict) and slot.get("is_processing")]
        return EngineLoad(running=len(busy))

    async def get_metrics(self) -> Mapping[str, float]:
        """The figures of the metrics page, and from ``/props``: ``total_slots`` and each one's ``n_ctx``."""
        props = await self.control_json("GET", "/props")
        settings = props.get("default_generation_settings") or {}
        found = {"total_slots": props.get("total_slots"), "n_ctx": settings.get("n_ctx")}
        sizes = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
        return {**await super().get_metrics(), **sizes}

    async def prompt_tokens(self, operation: Operation, body: Mapping[str, Any]) -> Sequence[int] | None:
        """What ``/apply-template`` and ``/tokenize`` make of it; see `InferenceAdapter.prompt_tokens`."""
        if operation is Operation.CHAT:
            asked = {key: body[key] for key in _RENDERED if key in body}
            found = await self.control_json("POST", "/apply-template", asked)
            prompt = found.get("prompt") if isinstance(found, Mapping) else None
        else:
            prompt = body.get("prompt") if operation is Operation.COMPLETION else None
        if not isinstance(prompt, str):
            return None
        asked = {"content": prompt, "add_special": True, "parse_special": True}
        return tokens_of(await self.control_json("POST", "/tokenize", asked))

    def read_usage(self, answer: Mapping[str, Any]) -> Usage | None:
        """The usage; servers before February 2026 tell the cached tokens in ``timings`` alone."""
        usage = super().read_usage(answer)
        timings = answer.get("timings")
        if usage is None or usage.cached_tokens is not None or not isinstance(timings, Mapping):
            return usage
        cached = timings.get("cache_n")
        return attrs.evolve(usage, cached_tokens=cached) if isinstance(cached, int) else usage

    def error_of(self, status: int, headers: Mapping[str, str], body: bytes, *, received: bool = False) -> BackendError:
        """See `HTTPAdapter.error_of`; a server that is loading its model says so."""
        error = super().error_of(status, headers, body, received=received)
        if error.kind is Fault.OVERLOADED and b"oading model" in body:
            error.message = "the engine is still loading its model"
        return error
