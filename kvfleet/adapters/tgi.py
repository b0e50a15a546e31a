"""Text Generation Inference: chat through its Messages API, text completions through its native route.

``/v1/chat/completions``, ``/generate`` and ``/generate_stream``; ``/health``, ``/info`` and ``/metrics``. Source:
``router/src/server.rs`` of huggingface/text-generation-inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import attrs

from kvfleet.adapters.base import EndpointHealth, EngineLoad
from kvfleet.adapters.call import Call, Operation
from kvfleet.adapters.exposition import Reader, Samples
from kvfleet.adapters.gauged import GaugedAdapter
from kvfleet.adapters.prompting import TEMPLATES, template_of
from kvfleet.adapters.refusals import one_prompt, refuse
from kvfleet.adapters.tgi_wire import ENGINE, GenerateCall, MessagesCall, tgi_error
from kvfleet.adapters.translation import Translation
from kvfleet.config.fields import choice, text
from kvfleet.errors import BackendError

__all__ = ["TGIAdapter"]

_WAITING = "tgi_queue_size"
_RUNNING = "tgi_batch_current_size"


@attrs.define(kw_only=True)
class TGIAdapter(GaugedAdapter):
    """Speaks to Text Generation Inference."""

    prefix: ClassVar[str] = "tgi_"
    reader: ClassVar[Reader] = Reader([_WAITING, _RUNNING])

    chat_route: str = choice(
        "messages",
        of=("messages", "generate"),
        doc="How chat is sent: by the Messages API, or, where TGI is older than 1.4, as one text to `/generate`.",
    )
    prompt_format: str = choice(
        "chatml", of=tuple(TEMPLATES), doc="How `chat_route: generate` writes a conversation as one text."
    )
    message_template: str = text(
        "", doc="One message of that text, in place of the format's own.", example="[{role}] {content}"
    )
    answer_template: str = text("", doc="What makes the model answer, in place of the format's own.")

    def translate(self, call: Call) -> Translation:
        """The call in TGI's words."""
        chunks = self.chunks(call.operation)
        if call.operation is Operation.CHAT and self.chat_route == "messages":
            return MessagesCall.of(call.body, chunks, is_stream=call.stream, ask_usage=call.ask_usage)
        if call.operation is Operation.CHAT:
            template = template_of(self.prompt_format, self.message_template, self.answer_template)
            prompt = template.render(call.body.get("messages"), "TGI's native route")
        elif call.operation is Operation.COMPLETION:
            prompt = one_prompt(call.body, ENGINE)
        else:
            raise refuse(f"TGI has no {call.operation.value} endpoint", "model")
        return GenerateCall.of(call.operation, call.body, prompt, chunks, is_stream=call.stream)

    def error_of(self, status: int, headers: Mapping[str, str], body: bytes, *, received: bool = False) -> BackendError:
        """The error that a refusal stands for."""
        return tgi_error(status, headers, body, received=received)

    async def health_check(self) -> EndpointHealth:
        """Whether TGI answers, and its load; its ``/health`` makes the model say a token if it has been idle."""
        return await self.with_load(await self.probe("/health"))

    def load_of(self, samples: Samples) -> EngineLoad:
        """Batch and queue; TGI shows nothing of its cache."""
        return EngineLoad(running=samples.count(_RUNNING), waiting=samples.count(_WAITING))

    async def list_models(self) -> tuple[str, ...]:
        """The one model it serves."""
        found = (await self.control_json("GET", "/info")).get("model_id")
        return (str(found),) if found else ()
