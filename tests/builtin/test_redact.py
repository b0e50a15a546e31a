"""execute.redacting, through the whole engine and the gateway: what leaves the house holds no personal data."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import orjson
import pytest

from kvfleet.adapters.call import Call
from kvfleet.builtin.redact import Redacting
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FleetConfig, ModelConfig, StageConfig
from kvfleet.errors import Fault
from kvfleet.gateway.app import Gateway
from kvfleet.gateway.auth import Keys
from kvfleet.plugin.contract import RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.render import render
from kvfleet.trace.spans import Trace
from tests.gateway.asgi import call

TABLE = discover()
HOME = ModelConfig(name="home", endpoint="http://home", provider="vllm", quality_score=0.5)
CLOUD = ModelConfig(name="cloud", endpoint="https://cloud", provider="openai_compat", quality_score=0.9)
SPARE = ModelConfig(name="spare", endpoint="https://spare", provider="openai_compat", quality_score=0.7)
SECRETS = ("ada@example.com", "123-45-6789", "4111 1111 1111 1111")
TEXT = "Write to ada@example.com about 123-45-6789 and 4111 1111 1111 1111 please"


def repeat(call: Call) -> FakeReply:
    """An engine that says what it was told."""
    return FakeReply(text=call.body["messages"][-1]["content"])


class Sink:
    """Keeps finished traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        """Keep one."""
        self.traces.append(trace)


class House:
    """A router that redacts, its backends, and what was written down."""

    def __init__(self, *, failing: tuple[str, ...] = (), stages: tuple[str, ...] = ()) -> None:
        models = (HOME, CLOUD, SPARE)
        self.sink = Sink()
        self.backends = {
            model.name: FakeAdapter(
                endpoint=model.endpoint,
                model_id=model.name,
                script=FakeReply(fail=Fault.SERVER_ERROR) if model.name in failing else repeat,
            )
            for model in models
        }
        pipeline = tuple(StageConfig(use=use) for use in (*stages, "select.quality_first", "execute.redacting"))
        self.router = Router(
            FleetConfig(models=models, pipeline=pipeline),
            table=TABLE,
            clock=FrozenClock(),
            adapters={model.id: self.backends[model.name] for model in models},
            sinks=[self.sink],
            polls=False,
            seed=1,
        )

    def sent(self, name: str) -> str:
        """All that a backend was sent."""
        return "".join(repr(one) for one in self.backends[name].calls)


@contextlib.asynccontextmanager
async def house(*, failing: tuple[str, ...] = (), stages: tuple[str, ...] = ()) -> AsyncIterator[House]:
    """A house with its router open."""
    one = House(failing=failing, stages=stages)
    await one.router.open()
    try:
        yield one
    finally:
        await one.router.aclose()


async def ask(one: House, *, stream: bool, model: str = "auto") -> str:
    """What the caller reads."""
    body = {"model": model, "stream": stream, "temperature": 0, "messages": [{"role": "user", "content": TEXT}]}
    request = RouteRequest(body=body, raw=orjson.dumps(body), stream=stream, model=model)
    reply = (await one.router.dispatch(request)).answer.reply
    if reply.events is None:
        content: str = orjson.loads(reply.body)["choices"][0]["message"]["content"]
        return content
    out = b"".join([piece async for piece in reply.events])
    chunks = [orjson.loads(line[6:]) for line in out.splitlines() if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cloud_sees_no_value_and_the_caller_every_one(stream: bool) -> None:
    """The backend is sent placeholders; the answer has the values."""
    async with house() as one:
        assert await ask(one, stream=stream) == TEXT
        assert len(one.backends["cloud"].calls) == 1
        assert not any(secret in one.sent("cloud") for secret in SECRETS)
        assert "[EMAIL_1] about [SSN_1] and [CREDIT_CARD_1]" in one.sent("cloud")
    shown = render(Explanation(one.sink.traces[0]))
    assert "without credit_card, email, ssn" in shown
    assert not any(secret in shown for secret in SECRETS)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fallback_is_redacted_too(stream: bool) -> None:
    """Every attempt outside the house gets the same placeholders."""
    async with house(failing=("cloud",)) as one:
        assert await ask(one, stream=stream) == TEXT
        assert len(one.backends["spare"].calls) == 1
        assert not any(secret in one.sent(name) for secret in SECRETS for name in ("cloud", "spare"))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_private_model_gets_the_original(stream: bool) -> None:
    """Also as a fallback, after a cloud that failed; byte for byte."""
    async with house(failing=("cloud", "spare")) as one:
        assert await ask(one, stream=stream) == TEXT
        (sent,) = one.backends["home"].calls
        assert sent.body["messages"][0]["content"] == TEXT
        assert orjson.loads(sent.raw) == sent.body


async def test_a_long_request_is_redacted_too() -> None:
    """It is looked through off the event loop."""
    async with house() as one:
        body = {"model": "cloud", "messages": [{"role": "user", "content": f"{'word ' * 4000}{TEXT}"}]}
        await one.router.dispatch(RouteRequest(body=body, raw=orjson.dumps(body), model="cloud"))
        assert "[EMAIL_1]" in one.sent("cloud")
        assert not any(secret in one.sent("cloud") for secret in SECRETS)


async def test_the_trace_says_what_was_taken_out_and_no_value() -> None:
    """Types on the attempt; neither value nor placeholder anywhere."""
    async with house(failing=("spare",)) as one:
        await ask(one, stream=False)
        (trace,) = one.sink.traces
    attempts = [span for span in trace.spans if names.ATTEMPT in span.attributes]
    assert [span.attributes[names.REDACTED] for span in attempts] == [("credit_card", "email", "ssn")]
    written = repr(trace.spans)
    assert not any(word in written for word in (*SECRETS, "EMAIL_1"))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cached_answer_has_the_values(stream: bool) -> None:
    """What is kept is what the caller got, not what the cloud said."""
    async with house(stages=("answer.exact_cache",)) as one:
        assert await ask(one, stream=stream) == TEXT
        await one.router.settled()
        assert await ask(one, stream=stream) == TEXT
        assert len(one.backends["cloud"].calls) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_through_the_gateway(stream: bool) -> None:
    """A client of the gateway sees its own values; the cloud behind it none."""
    async with house() as one:
        app = Gateway(one.router, keys=Keys(), new_id=lambda: "req-1")
        await app.start()
        body = {"model": "cloud", "stream": stream, "messages": [{"role": "user", "content": TEXT}]}
        answer = await call(app, "POST", "/v1/chat/completions", body)
        assert answer.status == 200
        assert not any(secret in one.sent("cloud") for secret in SECRETS)
        assert (b"[EMAIL_1]" in answer.body, SECRETS[0].encode() in answer.body) == (False, True)


def test_an_unknown_type_is_refused() -> None:
    """With the types there are."""
    with pytest.raises(ValueError, match="no pattern for the type 'shoe_size'; known: email"):
        Redacting(types=("shoe_size",))
