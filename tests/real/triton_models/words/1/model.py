"""A text model as the TensorRT-LLM backend has them: says the prompt's words back, one response a word if streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import triton_python_backend_utils as triton


def first(request: Any, name: str, default: Any) -> Any:
    """The first value of an input, or the default if it is not there."""
    tensor = triton.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().reshape(-1)[0]


class TritonPythonModel:
    """Echoes. A prompt with the word "fail" in it fails: at once, or after the second word of a stream."""

    def execute(self, requests: list[Any]) -> None:
        """Answer each request through its sender, as a decoupled model does."""
        for request in requests:
            sender = request.get_response_sender()
            for answer in self.answers(request):
                sender.send(answer)
            sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answers(self, request: Any) -> Iterator[Any]:
        """What is said."""
        words = first(request, "text_input", b"").decode().split()
        stops = triton.get_input_tensor_by_name(request, "stop_words")
        for stop in () if stops is None else stops.as_numpy().reshape(-1):
            words = words[: words.index(stop.decode())] if stop.decode() in words else words
        words = words[: int(first(request, "max_tokens", 16))]
        pieces = [f"{word} " for word in words]
        is_stream = bool(first(request, "stream", False))
        if "fail" in words:
            if is_stream:
                yield from (said(piece) for piece in pieces[:2])
            yield triton.InferenceResponse(error=triton.TritonError("the model was told to fail"))
            return
        yield from (said(piece) for piece in pieces) if is_stream else (said("".join(pieces)),)


def said(text: str) -> Any:
    """One response."""
    return triton.InferenceResponse([triton.Tensor("text_output", np.array([text.encode()], dtype=np.object_))])
