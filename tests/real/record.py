"""Write down what Triton says, for the unit tests: ``python -m tests.real.record`` makes ``tests/adapters/samples/triton_*``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import httpx

from tests.real import engines

SAMPLES = Path(__file__).parent.parent / "adapters" / "samples"
VLLM_LIKE = {
    "exclude_input_in_output": True,
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
    "sampling_parameters": '{"max_tokens":3}',
}
WANTED = re.compile(r"^nv_inference_(pending_request_count|request_success|count)\{", re.MULTILINE)

CALLS = {
    "generate.json": ("words/generate", {"text_input": "a b c d", "max_tokens": 3}),
    "stream.sse": ("words/generate_stream", {"text_input": "a b c d", "max_tokens": 3, "stream": True}),
    "stream_error.sse": ("words/generate_stream", {"text_input": "a b fail", "stream": True}),
    "vllm_generate.json": ("wordy/generate", {"text_input": "a b c d", **VLLM_LIKE}),
    "vllm_stream.sse": ("wordy/generate_stream", {"text_input": "a b c d", "stream": True, **VLLM_LIKE}),
    "error.json": ("words/generate", {"text_input": "fail"}),
    "unknown_model.json": ("nobody/generate", {"text_input": "a"}),
    "bad_parameter.json": ("words/generate", {"text_input": "a", "metadata": {"a": 1}}),
}


def main() -> None:
    """Start Triton, ask it, and end it."""
    engine = engines.triton()
    engine.start()
    try:
        with httpx.Client(base_url=engine.url, trust_env=False, timeout=10) as client:
            for name, (path, body) in CALLS.items():
                answer = client.post(f"/v2/models/{path}", json=body)
                (SAMPLES / f"triton_{name}").write_bytes(answer.content)
                sys.stdout.write(f"{answer.status_code} {name} {answer.headers.get('content-type')}\n")
            index = client.post("/v2/repository/index", json={"ready": True})
            (SAMPLES / "triton_index.json").write_bytes(index.content)
            page = client.get(engine.metrics_url).text
        lines = [line for line in page.splitlines() if WANTED.match(line)]
        (SAMPLES / "triton_metrics.txt").write_text("\n".join(lines) + "\n")
    finally:
        engine.stop()


if __name__ == "__main__":
    main()
