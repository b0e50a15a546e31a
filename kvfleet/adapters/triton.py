"""Triton Inference Server: text models behind the generate extension.

``/v2/models/<model>/generate[_stream]``; ``/v2/health/ready`` and the model's own ``ready``; the repository index for
models; ``nv_*`` figures on the metrics port. Chat is written as one text by a template; tools, images and JSON mode are
refused, because the extension has no place for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

import attrs

from kvfleet.adapters.base import Call, EndpointHealth, Operation
from kvfleet.adapters.prompting import TEMPLATES, template_of
from kvfleet.adapters.refusals import one_prompt, refuse
from kvfleet.adapters.translated import TranslatedAdapter
from kvfleet.adapters.translation import Translation
from kvfleet.adapters.triton_wire import DIALECTS, ENGINE, Dialect, GenerateCall
from kvfleet.config.fields import choice, mapping, text

__all__ = ["TritonAdapter"]


@attrs.define(kw_only=True)
class TritonAdapter(TranslatedAdapter):
    """Speaks to a text model on Triton Inference Server."""

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
        return await self.probe(f"{self._model_path()}/ready")

    async def list_models(self) -> tuple[str, ...]:
        """Names of the models that are ready; models that are not loaded are left out."""
        index = await self.control_json("POST", "/v2/repository/index", {"ready": True})
        return tuple(str(model["name"]) for model in index if model.get("state", "READY") == "READY")
