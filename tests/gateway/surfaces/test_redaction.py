"""Personal data on the other APIs: taken out wherever it stands, before an engine that is not private, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import httpx
import orjson
import pytest

from kvfleet.config.expand import expand
from kvfleet.config.schema import (
    FleetConfig,
    ModelCapabilities,
    ModelConfig,
    StageConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from tests.adapters.scripted import Request, Wire, engine, streamed, whole

TLS = httpx.create_ssl_context()
MAIL = "jane.roe@example.com"
SAYS = f"Her mail is {MAIL}."
TOOL = {"name": "find", "description": "Finds.", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "t", "name": "find", "input": {"query": SAYS}}


def turns(*blocks: Mapping[str, Any], role: str = "user") -> Mapping[str, Any]:
    """A message with these blocks in a turn."""
    first = [] if role == "user" else [{"role": "user", "content": "Hi"}]
    last = [] if role == "user" else [{"role": "user", "content": "Go on."}]
    return {"max_tokens": 9, "messages": [*first, {"role": role, "content": list(blocks)}, *last]}


RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": SAYS}]}
DOCUMENT = {"type": "document", "title": SAYS, "source": {"type": "text", "media_type": "text/plain", "data": SAYS}}
FOUND = {"type": "search_result", "title": SAYS, "source": SAYS, "content": [{"type": "text", "text": SAYS}]}
THOUGHT = {"type": "thinking", "thinking": SAYS, "signature": "abc"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": SAYS}

PLACES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "a text": ("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": SAYS}]}),
    "a block": ("/v1/messages", turns({"type": "text", "text": SAYS})),
    "a system prompt": ("/v1/messages", {**turns({"type": "text", "text": "Hi"}), "system": SAYS}),
    "a system block": (
        "/v1/messages",
        {**turns({"type": "text", "text": "Hi"}), "system": [{"type": "text", "text": SAYS}]},
    ),
    "a tool's result": ("/v1/messages", turns(RESULT)),
    "a tool's call": ("/v1/messages", turns(CALL, role="assistant")),
    "a tool's description": (
        "/v1/messages",
        {**turns({"type": "text", "text": "Hi"}), "tools": [{**TOOL, "description": SAYS}]},
    ),
    "a document": ("/v1/messages", turns(DOCUMENT)),
    "a search result": ("/v1/messages", turns(FOUND)),
    "a thought": ("/v1/messages", turns(THOUGHT, {"type": "text", "text": "a"}, role="assistant")),
    "a user's name": ("/v1/messages", {**turns({"type": "text", "text": "Hi"}), "metadata": {"user_id": MAIL}}),
    "an unknown field": ("/v1/messages", {**turns({"type": "text", "text": "Hi"}), "odd": {"deep": [SAYS]}}),
    "an input": ("/v1/responses", {"input": SAYS}),
    "instructions": ("/v1/responses", {"input": "Hi", "instructions": SAYS}),
    "an item": ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": SAYS}]}]}),
    "an output": ("/v1/responses", {"input": [OUTPUT]}),
    "a reasoning item": (
        "/v1/responses",
        {
            "input": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": SAYS}]},
                {"role": "user", "content": "Hi"},
            ]
        },
    ),
}
ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "I wrote to [EMAIL_1]."}, "finish_reason": "stop"}
    ],
}
CHUNKS = [
    b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"I wrote to [EM"},"finish_reason":null}]}\n\n',
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"AIL_1]."},"finish_reason":null}]}\n\n',
    b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]


async def script(wire: Wire, request: Request) -> None:
    """An engine that has every API, and says the placeholder."""
    is_stream = orjson.loads(request.body)["stream"] if b'"stream"' in request.body else False
    wire.send(streamed(*CHUNKS) if is_stream else whole(orjson.dumps(ANSWER)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", PLACES)
async def test_personal_data_does_not_leave(place: str, stream: bool) -> None:
    """Wherever it stands; and though the engine speaks the API, it is sent what can be redacted."""
    path, body = PLACES[place]
    async with engine(script) as backend:
        model = ModelConfig(
            name="m",
            endpoint=backend.url,
            private=False,
            capabilities=ModelCapabilities(supports_tools=True),
            options={"surfaces": ["messages", "responses"]},
        )
        config = FleetConfig(models=(model,), telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)))
        stages = [
            StageConfig(use="execute.redacting") if one.use == "execute.fallback" else one for one in expand(config)
        ]
        config = attrs.evolve(config, pipeline=tuple(stages))
        async with (
            running(config, router=Router(config, polls=False)) as serving,
            httpx.AsyncClient(base_url=serving.url, verify=TLS) as client,
        ):
            answer = await client.post(path, json={**body, "stream": stream})
    assert answer.status_code == 200, answer.text
    (sent,) = backend.requests
    assert sent.path == "/v1/chat/completions"
    assert MAIL.encode() not in sent.body
    if place not in ("a thought", "a reasoning item"):  # these are left out for an engine that cannot read them
        assert MAIL in answer.text
