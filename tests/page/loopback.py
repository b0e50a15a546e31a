"""Engines on the loopback that speak HTTP as vLLM, Ollama, TGI, Triton and one's own services do."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import attrs
import orjson

from tests.adapters.scripted import Engine, Request, Wire, engine, streamed, whole

__all__ = ["Served", "serving"]

METRICS = b"""\
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 50.0
"""


def completion(text: str, model: str) -> dict[str, Any]:
    """An OpenAI answer."""
    return {
        "id": "chatcmpl-engine",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def events(text: str, model: str) -> bytes:
    """The same as a stream."""
    head = {"id": "chatcmpl-engine", "object": "chat.completion.chunk", "created": 1, "model": model}
    deltas = [({"role": "assistant", "content": ""}, None), ({"content": text}, None), ({}, "stop")]
    chunks = [
        b"data: " + orjson.dumps({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}) + b"\n\n"
        for delta, reason in deltas
    ]
    return streamed(*chunks, b"data: [DONE]\n\n")


@attrs.define
class Served:
    """What an engine answers by path; anything else is a 404.

    Attributes:
        says: The text of its chat answers.
        answers: JSON answers to other paths.
        status: Of its chat answers, if they are refusals.
        metrics: Its page of metrics.
        headers: More headers of its chat answers.
    """

    says: str = "Hello from the engine."
    answers: Mapping[str, Any] = attrs.field(factory=dict)
    status: str = "200 OK"
    metrics: bytes = METRICS
    headers: Mapping[str, str] = attrs.field(factory=dict)

    async def __call__(self, wire: Wire, request: Request) -> None:
        """Answer one request."""
        wire.send(self._answer(request))

    def _answer(self, request: Request) -> bytes:
        path = request.path.partition("?")[0]
        if path in self.answers:
            return whole(orjson.dumps(self.answers[path]))
        if path == "/v1/chat/completions":
            return self._chat(orjson.loads(request.body))
        if path == "/health":
            return whole(b"")
        if path == "/v1/models":
            return whole(b'{"object":"list","data":[{"id":"m","object":"model"}]}')
        if path == "/metrics":
            return whole(self.metrics, kind=b"text/plain")
        return whole(b'{"error":{"message":"Not Found"}}', status="404 Not Found")

    def _chat(self, body: Mapping[str, Any]) -> bytes:
        if self.status != "200 OK":
            return whole(b'{"error":{"message":"Not today."}}', status=self.status)
        if body.get("stream"):
            return events(self.says, body["model"])
        more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items()).encode()
        return whole(orjson.dumps(completion(self.says, body["model"])), headers=more)


@contextlib.asynccontextmanager
async def serving(*engines: Served) -> AsyncIterator[list[Engine]]:
    """Engines on free ports."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(engine(one)) for one in engines]
