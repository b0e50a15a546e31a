"""What must hold of the gateway, asked of a running one with engines on the loopback."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
import pytest

from kvfleet.config.schema import FleetConfig, GatewayConfig, ModelCapabilities, ModelConfig
from kvfleet.errors import ConfigError, Fault
from kvfleet.testing.fakes import FakeReply
from tests.adapters.scripted import STREAM_END, STREAM_HEAD, Request, Wire, chunk, engine, streamed, whole
from tests.page.living import CHAT, live, question
from tests.page.loopback import Served, completion, serving

ABLE = ModelCapabilities(supports_tools=True, supports_vision=True)


def at(url: str, name: str = "m", **known: Any) -> ModelConfig:
    """A model on a loopback engine."""
    return ModelConfig(name=name, endpoint=url, **{"provider": "openai_compat", "capabilities": ABLE, **known})


def fleet(*models: ModelConfig, **gateway: Any) -> FleetConfig:
    """A fleet of them, whose cheapest is the first."""
    return FleetConfig(models=models, strategy="static", default_model=models[0].name, gateway=GatewayConfig(**gateway))


REAL = {"m": None, "other": None}
"""Neither model gets a fake engine."""


async def test_streams_stream() -> None:
    """The client has the first event while the engine has not yet said the second."""
    heard = asyncio.Event()
    pieces = [b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % word for word in (b"a", b"b")]
    end = b'data: {"id":"1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'

    async def script(wire: Wire, request: Request) -> None:
        wire.send(STREAM_HEAD, chunk(pieces[0]))
        await heard.wait()
        wire.send(chunk(pieces[1]), chunk(end), STREAM_END)

    async with engine(script) as one, live(fleet(at(one.url)), scripts=REAL) as gateway:
        async with gateway.http.stream("POST", CHAT, json=question(stream=True)) as answer:
            lines = answer.aiter_lines()
            assert '"content":"a"' in await anext(lines)
            heard.set()
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        await gateway.router.settled()
        assert gateway.last.outcome == "answered"


ASKED: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}}], "odd": 1},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1.0}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "unknown": {"deep": [None, 1.50, {"x": "é"}]},
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_everything_survives_in_both_directions(stream: bool) -> None:
    """Content parts, null content, tool calls and results, unknown fields: there and back, whole and streamed."""
    call = {"index": 0, "id": "call_2", "type": "function", "function": {"name": "f", "arguments": '{"b": 2.0}'}}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [call],
        "reasoning_content": "Hm.",
        "mystery": [None],
    }
    said = {**completion("", "m"), "system_fingerprint": "fp", "service": {"x": None}}
    said["choices"] = [{"index": 0, "message": message, "finish_reason": "tool_calls", "odd": 1.5}]
    told = {"id": "1", "object": "chat.completion.chunk", "model": "m", "odd": {"x": [None]}, "choices": [{"index": 0, "delta": message, "finish_reason": None}]}  # fmt: skip
    done = {"id": "1", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    answer = streamed(*[b"data: " + orjson.dumps(one) + b"\n\n" for one in (told, done)], b"data: [DONE]\n\n") if stream else whole(orjson.dumps(said))  # fmt: skip

    async def script(wire: Wire, request: Request) -> None:
        wire.send(answer)

    async with engine(script) as one, live(fleet(at(one.url)), scripts=REAL) as gateway:
        got = await gateway.ask({**ASKED, "stream": stream})
        sent = json.loads(one.requests[0].body)
    assert {key: sent[key] for key in ASKED} == ASKED
    request_id = got.headers["x-request-id"]
    if stream:
        lines = [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: {")]
        assert lines == [{**told, "id": request_id}, {**done, "id": request_id}]
    else:
        assert got.json() == {**said, "id": request_id}


async def test_the_model_is_honoured() -> None:
    """The one that was asked for answers, whatever the strategy would rather have; an unknown one is a 404."""
    async with live(fleet(at("http://a"), at("http://b", "other"))) as gateway:
        assert await gateway.served({**question(), "model": "other"}) == "other"
        answer = await gateway.ask({**question(), "model": "nobody"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Entity"])
async def test_a_callers_error_is_not_retried_and_comes_back(status: str) -> None:
    """The other model would refuse it too: nobody asks it."""
    async with serving(Served(status=status), Served()) as (first, second):
        async with live(fleet(at(first.url), at(second.url, "other")), scripts=REAL) as gateway:
            answer = await gateway.ask()
            assert (answer.status_code, answer.json()["error"]["message"]) == (int(status[:3]), "Not today.")
            assert answer.json()["error"]["code"] == "invalid_request"
            assert len(gateway.last.attempts) == 1
        assert second.requests == []


@pytest.mark.parametrize("status", ["401 Unauthorized", "404 Not Found"])
async def test_another_model_may_serve_what_this_one_cannot(status: str) -> None:
    """A credential or a model that is missing there need not be missing elsewhere."""
    async with serving(Served(status=status), Served("Here.")) as (first, second):
        config = fleet(at(first.url), at(second.url, "other"))
        async with live(config, scripts=REAL) as gateway:
            assert await gateway.served() == "other"
            assert [attempt.model for attempt in gateway.last.attempts] == ["m", "other"]


@pytest.mark.parametrize(
    ("status", "key", "told"),
    [
        ("404 Not Found", "", (404, "model_not_found")),
        ("401 Unauthorized", "", (401, "unauthorized")),
        ("401 Unauthorized", "sk-wrong", (502, "backend_unauthorized")),
    ],
)
async def test_what_nobody_can_serve_comes_back_as_what_it_is(status: str, key: str, told: tuple[int, str]) -> None:
    """The backend's verdict; but a credential of ours that is wrong is our fault, and not the caller's."""
    async with serving(Served(status=status)) as (one,), live(fleet(at(one.url, api_key=key)), scripts=REAL) as gateway:
        answer = await gateway.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == told
        assert len([request for request in one.requests if request.method == "POST"]) == 1


async def test_a_timeout_is_not_for_the_whole_generation() -> None:
    """An answer that takes longer than both limits together is whole, as long as it goes on; silence is not."""
    limits = {"timeout_seconds": 0.6, "idle_timeout_seconds": 0.6, "max_retries": 0}
    tokens = [b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"%d "}}]}\n\n' % count for count in range(16)]
    end = b'data: {"id":"1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'

    async def script(wire: Wire, request: Request) -> None:
        wire.send(STREAM_HEAD)
        for token in tokens:
            wire.send(chunk(token))
            await asyncio.sleep(0.1)  # this is what the test is about
            if b"silent" in request.body:
                await wire.gone.wait()
        wire.send(chunk(end), STREAM_END)

    async with engine(script) as one, live(fleet(at(one.url, **limits)), scripts=REAL) as gateway:
        slow = await gateway.ask(question(stream=True))
        assert slow.text.rstrip().endswith("data: [DONE]")
        silent = await gateway.ask(question("silent", stream=True))
        assert "stream_interrupted" in silent.text
        assert "[DONE]" not in silent.text
        assert gateway.last.attempts[-1].fault == "idle_timeout"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_an_endpoint_may_be_written_with_v1(suffix: str) -> None:
    """The call goes to the same place."""
    async with serving(Served()) as (one,), live(fleet(at(one.url + suffix)), scripts=REAL) as gateway:
        assert await gateway.served() == "m"
        assert one.requests[-1].path == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("sent", "is_kept"), [("my-trace-001", True), ("x" * 128, True), ("x" * 129, False), ('a"b', False), ("a b", False)]
)
async def test_request_ids_travel_and_are_bounded(sent: str, is_kept: bool) -> None:
    """To the backend and back, on errors too; what is long or strange gives way to one of ours."""
    async with live(fleet(at("http://a"))) as gateway:
        answers = [
            await gateway.ask(X_Request_ID=sent),
            await gateway.ask({**question(), "model": "nobody"}, X_Request_ID=sent),
        ]
        ids = [answer.headers["x-request-id"] for answer in answers]
        assert [one == sent for one in ids] == [is_kept, is_kept]
        assert all(0 < len(one) <= 128 for one in ids)
        assert dict(gateway.engines["m"][0].calls[0].headers)["x-request-id"] == ids[0]
        assert answers[1].json()["error"]["kvfleet"]["request_id"] == ids[1]


@pytest.mark.parametrize(
    "fault", [Fault.SERVER_ERROR, Fault.CONNECT, Fault.RATE_LIMITED, Fault.TIMEOUT, Fault.BAD_REQUEST]
)
async def test_errors_have_openais_shape_and_no_address(fault: Fault) -> None:
    """Whatever went wrong, and whatever the backend said of itself."""
    where = "http://10.1.2.3:8000"
    async with live(fleet(at(where)), scripts={"m": FakeReply(fail=fault)}) as gateway:
        answer = await gateway.ask()
        error = answer.json()["error"]
        assert {"message", "type", "param", "code"} <= set(error)
        assert isinstance(error["message"], str)
        assert answer.status_code >= 400
        assert "10.1.2.3" not in answer.text + str(answer.headers)


async def test_passing_through_never_touches_the_backends_credential() -> None:
    """Neither by the client's own header nor by configuration, which is refused."""
    async with serving(Served()) as (one,):
        config = fleet(at(one.url, api_key="sk-backend"), passthrough_headers=("X-Team",))
        async with live(config, scripts=REAL) as gateway:
            await gateway.ask(Authorization="Bearer sk-client", X_Team="ml")
        assert one.requests[0].headers["authorization"] == "Bearer sk-backend"
        assert one.requests[0].headers["x-team"] == "ml"
    with pytest.raises(ConfigError, match="Authorization cannot be passed through"):
        async with live(fleet(at("http://a"), passthrough_headers=("Authorization",))):
            pass


async def test_health_asks_nobody() -> None:
    """However often it is asked: it tells what is known."""
    async with serving(Served()) as (one,), live(fleet(at(one.url)), scripts=REAL) as gateway:
        for path in ("/health", "/readyz", "/livez"):
            for _ in range(3):
                assert (await gateway.http.get(path)).status_code == 200
        assert one.requests == []


async def test_the_key_and_the_origins_are_enforced() -> None:
    """No route but the probes and the empty page answers without the key, and no page of another origin is served."""
    config = fleet(at("http://a"), api_key="sk-gateway", cors_origins=("https://ours.example",))
    async with live(config) as gateway:
        assert (await gateway.ask()).status_code == 401
        bearer = {"Authorization": "Bearer sk-gateway"}
        assert (await gateway.ask(**bearer)).status_code == 200
        assert (await gateway.ask(**bearer, Origin="https://theirs.example")).status_code == 403
        ours = await gateway.ask(**bearer, Origin="https://ours.example")
        assert ours.headers["access-control-allow-origin"] == "https://ours.example"
        for path in ("/v1/models", "/health", "/metrics", "/dashboard/api/state"):
            assert (await gateway.http.get(path)).status_code == 401
