"""A text model with the inputs and outputs of Triton's vLLM backend: says the prompt's words back, and counts them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as triton


def first(request: Any, name: str, default: Any) -> Any:
    """The first value of an input, or the default if it is not there."""
    tensor = triton.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().reshape(-1)[0]


class TritonPythonModel:
    """Echoes as many words as `max_tokens` allows, and says why it stopped, as that backend does."""

    def execute(self, requests: list[Any]) -> None:
        """Answer each request through its sender, as a decoupled model does."""
        for request in requests:
            words = first(request, "text_input", b"").decode().split()
            asked = json.loads(first(request, "sampling_parameters", b"{}"))
            limit = asked.get("max_tokens", 16)
            pieces = [f"{word} " for word in words[:limit]]
            if not first(request, "stream", False):
                pieces = ["".join(pieces)]
            sender = request.get_response_sender()
            for place, piece in enumerate(pieces, 1):
                reason = "None" if place < len(pieces) else "length" if len(words) > limit else "stop"
                sender.send(said(piece, reason, len(words)))
            sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def said(text: str, reason: str, read: int) -> Any:
    """One response."""
    outputs = {
        "text_output": np.array([text.encode()], dtype=np.object_),
        "finish_reason": np.array([reason.encode()], dtype=np.object_),
        "num_input_tokens": np.array([read], dtype=np.uint32),
        "num_output_tokens": np.array([len(text.split())], dtype=np.uint32),
    }
    return triton.InferenceResponse([triton.Tensor(name, value) for name, value in outputs.items()])
