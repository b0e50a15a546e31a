"""Personal data in places where few look: a model that is not private must get none of it, in whichever field."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from kvfleet.config.models import ModelCapabilities
from kvfleet.config.schema import FleetConfig, ModelConfig, PolicyConfig, StageConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from tests.gateway.upstream import Upstream, upstream, whole

SSN = "123-45-6789"
QUIET = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
ANSWER = whole(json.dumps({"id": "c", "choices": [CHOICE]}).encode())
HELLO = {"role": "user", "content": "Hello"}
ABLE = ModelCapabilities(supports_tools=True, supports_vision=True, supports_audio=True)
PII = PolicyConfig(enabled=True, pii_detection=True)
REDACTING = tuple(StageConfig(use=use) for use in ("score.quality", "select.quality_first", "execute.redacting"))


def chat(**fields: Any) -> bytes:
    """A chat with something more in it."""
    return json.dumps({"messages": [HELLO], **fields}).encode()


def said(**fields: Any) -> bytes:
    """A chat with a message before."""
    return chat(messages=[{"role": "assistant", "content": "So?", **fields}, HELLO])


def shown(**fields: Any) -> bytes:
    """A chat with a part that is a file."""
    return chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Look"}, fields]}])


PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(3000)).decode()
FILE = base64.b64encode(f"What is known of {SSN} is in here.".encode()).decode()
PLACES: Mapping[str, bytes] = {
    "behind a picture": shown(type="image_url", image_url={"url": f"data:image/png;base64,{PICTURE} {SSN}"}),
    "behind a sound": shown(type="input_audio", input_audio={"data": f"{PICTURE}\n{SSN}", "format": "wav"}),
    "a file": shown(type="file", file={"file_data": f"data:text/csv;base64,{FILE}", "filename": "a.csv"}),
    "a file of no name": shown(type="file", file={"file_data": FILE}),
    "a file in percents": shown(
        type="file", file={"file_data": f"data:text/plain,{quote(SSN, safe='').replace('-', '%2D')}"}
    ),
    "a file in a text": shown(type="text", text=f"Read data:text/plain;base64,{FILE} to me"),
    "a file in a message": chat(messages=[{"role": "user", "content": f"Read data:text/plain;base64,{FILE} to me"}]),
    "a type": chat(metadata={"type": SSN}),
    "a name": said(name=SSN),
    "arguments of a function": said(function_call={"name": "f", "arguments": SSN}),
    "a refusal": said(refusal=SSN),
    "thoughts": said(reasoning=SSN),
    "a part of a kind nobody knows": chat(messages=[{"role": "user", "content": [{"type": "x", "x": SSN}]}]),
    "a tool": chat(tools=[{"type": "function", "function": {"name": "f", "description": SSN, "parameters": {}}}]),
    "documents": chat(documents=[{"title": "About", "text": SSN}]),
    "a prediction": chat(prediction={"type": "content", "content": SSN}),
    "a tag": chat(metadata={"who": SSN}),
    "a user": chat(user=SSN),
    "a choice": chat(guided_choice=[SSN, "no"]),
    "a template's argument": chat(chat_template_kwargs={"system": SSN}),
    "a field nobody knows": chat(zzz={"deep": [{"deeper": SSN}]}),
    "a field in another case": chat(Content=SSN),
    "the first of two contents": b'{"messages":[{"role":"user","content":"%s","content":"Hi"}]}' % SSN.encode(),
    "the first of two names": b'{"messages":[{"role":"user","content":"Hi","name":"%s","name":"x"}]}' % SSN.encode(),
}


@asynccontextmanager
async def guarded(*, redacts: bool) -> AsyncIterator[tuple[httpx.AsyncClient, Upstream]]:
    """A client of a gateway that keeps personal data from a public model, which is better; and that model's engine."""
    async with upstream(ANSWER) as cloud, upstream(ANSWER) as house:
        public = ModelConfig(name="cloud", endpoint=cloud.url, private=False, quality_score=0.9, capabilities=ABLE)
        own = ModelConfig(name="house", endpoint=house.url, private=True, quality_score=0.1, capabilities=ABLE)
        config = (
            FleetConfig(models=(public,), pipeline=REDACTING, telemetry=QUIET)
            if redacts
            else FleetConfig(models=(public, own), policy=PII, strategy="quality_first", telemetry=QUIET)
        )
        router = Router(config, polls=False)
        async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            yield client, cloud


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("redacts", [False, True])
async def test_a_model_that_is_not_private_sees_none(place: str, redacts: bool) -> None:
    """The policy keeps the request on a private model, or redaction takes the value out."""
    async with guarded(redacts=redacts) as (client, cloud):
        for sent in (chat(), PLACES[place]):
            answer = await client.post("/v1/chat/completions", content=sent)
            assert answer.status_code == 200
    assert len(cloud.requests) >= 1
    seen = b"".join(cloud.requests)
    assert not any(one.encode() in seen for one in (SSN, SSN.replace("-", "%2D"), FILE))


@pytest.mark.parametrize("field", ["Model", "MESSAGES", "Stream", "me\u017f\u017fages"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_a_field_in_another_case_is_refused(field: str, path: str) -> None:
    """Engines written in Go read it as the one in lower case: a model nobody was asked about, a prompt nobody saw."""
    body = {"model": "m", "messages": [HELLO], "input": "Hello", "max_tokens": 9, field: "x"}
    async with upstream(ANSWER) as engine:
        config = FleetConfig(models=(ModelConfig(name="m", endpoint=engine.url),), telemetry=QUIET)
        async with running(config) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            answer = await client.post(path, json=body)
    assert answer.status_code == 400
    assert field.casefold() in answer.json()["error"]["message"]
    assert not any(line.startswith(b"POST") for line in engine.requests)


def block(**fields: Any) -> dict[str, Any]:
    """A conversation with a part that is a file."""
    return {"model": "auto", "max_tokens": 9, "messages": [{"role": "user", "content": [fields]}]}


SOURCE = {"type": "base64", "media_type": "image/png"}
NATIVE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "a picture that is text": ("/v1/messages", block(type="image", source={**SOURCE, "data": FILE})),
    "behind a picture": ("/v1/messages", block(type="image", source={**SOURCE, "data": f"{PICTURE} {SSN}"})),
    "a document": ("/v1/messages", block(type="document", source={**SOURCE, "media_type": "text/csv", "data": FILE})),
    "an input file": (
        "/v1/responses",
        {
            "model": "auto",
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_file", "filename": "a", "file_data": f"data:text/csv;base64,{FILE}"}],
                }
            ],
        },
    ),
}


@pytest.mark.parametrize("place", NATIVE)
@pytest.mark.parametrize("redacts", [False, True])
async def test_files_of_other_apis_are_looked_into(place: str, redacts: bool) -> None:
    """Anthropic's and the Responses' files are those of a chat."""
    path, body = NATIVE[place]
    async with guarded(redacts=redacts) as (client, cloud):
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
    seen = b"".join(cloud.requests)
    assert (b"POST" in seen) == redacts
    assert not any(one.encode() in seen for one in (SSN, FILE))
