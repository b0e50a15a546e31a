"""Triton Inference Server: text models behind the generate extension.

``/v2/models/<model>/generate[_stream]``; ``/v2/health/ready`` and the model's own ``ready``; the repository index for
models; ``nv_*`` figures on the metrics port. Chat is written as one text by a template; tools, images and JSON mode are
refused, because the extension has no place for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import quote

import attrs

from kvfleet.adapters.base import EndpointHealth, EngineLoad
from kvfleet.adapters.call import Call, Operation
from kvfleet.adapters.exposition import Reader, Samples
from kvfleet.adapters.gauged import GaugedAdapter
from kvfleet.adapters.prompting import TEMPLATES, template_of
from kvfleet.adapters.refusals import one_prompt, refuse
from kvfleet.adapters.translation import Translation
from kvfleet.adapters.triton_wire import DIALECTS, ENGINE, Dialect, GenerateCall
from kvfleet.config.fields import choice, mapping, text

__all__ = ["TritonAdapter"]

_PENDING = "nv_inference_pending_request_count"
# of the TensorRT-LLM backend alone
_REQUESTS = "nv_trt_llm_request_metrics"
_BLOCKS = "nv_trt_llm_kv_cache_block_metrics"


@attrs.define(kw_only=True)
class TritonAdapter(GaugedAdapter):
    """Speaks to a text model on Triton Inference Server."""

    prefix: ClassVar[str] = "nv_"
    reader: ClassVar[Reader] = Reader([_PENDING, _REQUESTS, _BLOCKS])

    dialect: str = choice("plain", of=tuple(DIALECTS), doc="How the model names its inputs and outputs.")
    parameter_names: Mapping[str, str] = mapping(
        doc="Parameters the model names otherwise than the dialect.", example={"max_tokens": "request_output_len"}
    )
    text_input: str = text("text_input", doc="The model's input for the prompt.")
    text_output: str = text("text_output", doc="The model's output with the answer.")
    model_version: str = text("", doc="The version to ask; Triton's choice if empty.", pattern="[0-9]*")
    prompt_format: str = choice("chatml", of=tuple(TEMPLATES), doc="How a conversation is written as one text.")
    message_template: str = text(
        "", doc="One message of that text, in place of the format's own.", example="[{role}] {content}"
    )
    answer_template: str = text("", doc="What makes the model answer, in place of the format's own.")
    metrics_url: str = text(
        "", doc="Where Triton serves its metrics, as in `http://gpu-1:8002/metrics`; none if empty."
    )

    def translate(self, call: Call) -> Translation:
        """The call as a generate call."""
        if call.operation is Operation.CHAT:
            template = template_of(self.prompt_format, self.message_template, self.answer_template)
            prompt = template.render(call.body.get("messages"), ENGINE)
        elif call.operation is Operation.COMPLETION:
            prompt = one_prompt(call.body, ENGINE)
        else:
            raise refuse(f"Triton's generate extension has no {call.operation.value}", "model")
        return GenerateCall.of(
            call.operation,
            f"{self._model_path()}/generate{'_stream' if call.stream else ''}",
            call.body,
            prompt,
            self.chunks(call.operation),
            is_stream=call.stream,
            text_input=self.text_input,
            text_output=self.text_output,
            dialect=self._dialect(),
        )

    def _dialect(self) -> Dialect:
        named = DIALECTS[self.dialect]
        return attrs.evolve(named, names={**named.names, **self.parameter_names}) if self.parameter_names else named

    def _model_path(self) -> str:
        path = f"/v2/models/{quote(self.model_id, safe='')}"
        return f"{path}/versions/{self.model_version}" if self.model_version else path

    async def health_check(self) -> EndpointHealth:
        """Whether the server is ready, and the model with it."""
        health = await self.probe("/v2/health/ready")
        if not health.healthy:
            return health
        return await self.with_load(await self.probe(f"{self._model_path()}/ready"))

    def page_url(self) -> str:
        """Triton serves its metrics on a port of their own."""
        return self.metrics_url

    async def get_load(self) -> EngineLoad:
        """Requests that wait for the model; with the TensorRT-LLM backend, its batch and its KV cache too."""
        return await super().get_load() if self.metrics_url else EngineLoad()

    async def get_metrics(self) -> Mapping[str, float]:
        """Triton's own figures, summed over models; empty without a `metrics_url`."""
        return await super().get_metrics() if self.metrics_url else {}

    def load_of(self, samples: Samples) -> EngineLoad:
        """See `get_load`."""
        pending = _labelled(samples, _PENDING, "model", self.model_id)
        running = _labelled(samples, _REQUESTS, "request_type", "scheduled")
        queued = _labelled(samples, _REQUESTS, "request_type", "waiting")
        blocks = _labelled(samples, _BLOCKS, "kv_cache_block_type", "max")
        tokens = _labelled(samples, _BLOCKS, "kv_cache_block_type", "tokens_per")
        waiting = [count for count in (pending, queued) if count is not None]
        return EngineLoad(
            running=None if running is None else round(running),
            waiting=round(sum(waiting)) if waiting else None,
            kv_usage=_labelled(samples, _BLOCKS, "kv_cache_block_type", "fraction"),
            cache_blocks=None if blocks is None else round(blocks),
            block_tokens=None if tokens is None else round(tokens),
        )

    async def list_models(self) -> tuple[str, ...]:
        """Names of the models that are ready; models that are not loaded are left out."""
        index = await self.control_json("POST", "/v2/repository/index", {"ready": True})
        return tuple(str(model["name"]) for model in index if model.get("state", "READY") == "READY")


def _labelled(samples: Samples, name: str, label: str, value: str) -> float | None:
    """The sum of a metric's lines with this label; None if there is none."""
    found = [sample.value for sample in samples.all(name) if sample.labels.get(label) == value]
    return sum(found) if found else None
