"""Ollama's native API, which says more than its OpenAI route: loaded models, keep-alive, durations, thinking.

``/api/chat`` (chat), ``/api/generate`` (text completions) and ``/api/embed``; ``/api/version``, ``/api/tags`` and
``/api/ps`` for health, models and state. Source: ``docs/api.md``, ``api/types.go`` and ``server/routes.go`` of
ollama/ollama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.adapters.base import EndpointHealth
from kvfleet.adapters.call import Call, Operation
from kvfleet.adapters.ollama_wire import OllamaChat, OllamaCompletion, OllamaEmbedding
from kvfleet.adapters.refusals import refuse
from kvfleet.adapters.translated import TranslatedAdapter
from kvfleet.adapters.translation import Translation
from kvfleet.config.fields import flag, text
from kvfleet.errors import BackendError

__all__ = ["OllamaAdapter"]


@attrs.define(kw_only=True)
class OllamaAdapter(TranslatedAdapter):
    """Speaks Ollama's native API.

    Ollama cuts a conversation that is too long without a word. Unless `truncate` is set it is told not to, so that the
    request fails with `context_length` and another model may answer it.
    """

    keep_alive: str = text(
        "", doc="How long the model stays loaded after a call, as in `30m` or `-1`; its own if empty."
    )
    truncate: bool = flag(doc="Let Ollama cut off the beginning of a conversation that is too long.")

    def translate(self, call: Call) -> Translation:
        """The call in Ollama's words."""
        chunks, defaults = self.chunks(call.operation), self._defaults()
        if call.operation is Operation.CHAT:
            return OllamaChat.of(call.body, chunks, is_stream=call.stream, defaults=defaults)
        if call.operation is Operation.COMPLETION:
            return OllamaCompletion.of(call.body, chunks, is_stream=call.stream, defaults=defaults)
        if call.operation is Operation.EMBEDDING:
            return OllamaEmbedding.of(call.body, chunks, defaults=defaults)
        raise refuse(f"Ollama has no {call.operation.value} endpoint", "model")

    def _defaults(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"truncate": self.truncate}
        if self.keep_alive:
            # Ollama reads a bare number as seconds only if it is one, and a text as a Go duration
            is_number = self.keep_alive.removeprefix("-").isdecimal()
            defaults["keep_alive"] = int(self.keep_alive) if is_number else self.keep_alive
        return defaults

    async def health_check(self) -> EndpointHealth:
        """Whether Ollama answers, and which models it has."""
        health = await self.probe("/api/version")
        if not health.healthy:
            return health
        try:
            return attrs.evolve(health, models=await self.list_models())
        except BackendError as error:
            return attrs.evolve(health, healthy=False, error=error.message)

    def is_named(self, name: str) -> bool:
        """See `InferenceAdapter.is_named`."""
        return _is_called(name, self.model_id)

    async def list_models(self) -> tuple[str, ...]:
        """Names of the models on its disk."""
        return tuple(_name(model) for model in (await self.control_json("GET", "/api/tags")).get("models") or ())

    async def get_metrics(self) -> Mapping[str, float]:
        """What ``/api/ps`` says: it has no figures of load, but tells whether the model is in memory.

        ``loaded_models``; ``is_loaded`` (0 or 1), and for a loaded model ``size_bytes``, ``size_vram_bytes`` and
        ``context_length``.
        """
        running = (await self.control_json("GET", "/api/ps")).get("models") or []
        found: dict[str, float] = {"loaded_models": len(running), "is_loaded": 0}
        for model in running:
            if _is_called(_name(model), self.model_id):
                found["is_loaded"] = 1
                names = {"size": "size_bytes", "size_vram": "size_vram_bytes", "context_length": "context_length"}
                found |= {ours: float(model[theirs]) for theirs, ours in names.items() if theirs in model}
        return found


def _name(model: Mapping[str, Any]) -> str:
    return str(model.get("model") or model.get("name") or "")


def _is_called(name: str, asked: str) -> bool:
    """True if Ollama means the same model: a name without a tag is that of ``:latest``."""
    return name in (asked, f"{asked}:latest")
