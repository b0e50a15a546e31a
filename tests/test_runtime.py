"""The router: one request from its names to its outcome, through the default pipeline."""

from __future__ import annotations

import asyncio
import gc
from typing import Any, Self

import attrs
import orjson
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest
from kvfleet.adapters.call import Operation
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import (
    AliasConfig,
    FallbackConfig,
    FleetConfig,
    ModelCapabilities,
    ModelConfig,
    TelemetryConfig,
    TenantConfig,
)
from kvfleet.errors import (
    AttemptsExhaustedError,
    BackendError,
    BadRequestError,
    ConfigError,
    DeadlineExceededError,
    Fault,
    ModelNotFoundError,
    NoCandidatesError,
    RouteError,
)
from kvfleet.plugin.contract import RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.spans import Status, Trace

TABLE = discover()
SMALL = ModelConfig(
    name="small",
    endpoint="http://small",
    quality_score=0.9,
    cost_per_1k_input_tokens=0.001,
    cost_per_1k_output_tokens=0.002,
)
LARGE = ModelConfig(name="large", endpoint="http://large", quality_score=0.5, latency_p50_ms=900)
EMBED = ModelConfig(name="embed", endpoint="http://embed", capabilities=ModelCapabilities(model_type="embedding"))


class Sink:
    """Keeps finished traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


class Fleet:
    """A router over fake adapters, and everything a test wants to look at."""

    def __init__(self, *models: ModelConfig, scripts: dict[str, Any] | None = None, **config: Any) -> None:
        self.models = models or (SMALL, LARGE)
        self.clock = FrozenClock()
        self.sink = Sink()
        self.adapters = {
            model.id: FakeAdapter(
                endpoint=model.endpoint,
                model_id=model.get_model_id(),
                time=self.clock,
                script=(scripts or {}).get(model.name, FakeReply(text="Hello there.")),
            )
            for model in self.models
        }
        self.router = Router(
            FleetConfig(models=self.models, **config),
            table=TABLE,
            clock=self.clock,
            adapters=self.adapters,
            sinks=[self.sink],
            polls=False,
            seed=1,
        )

    def calls(self, name: str) -> int:
        """How often a model was asked."""
        return sum(len(a.calls) for key, a in self.adapters.items() if key.startswith(f"{name}@"))

    async def __aenter__(self) -> Self:
        await self.router.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.router.aclose()


def stream_request(**more: Any) -> RouteRequest:
    """A streamed chat request."""
    body = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    return RouteRequest(body=body, raw=orjson.dumps(body), stream=True, **more)


async def test_a_route_gives_answer_and_explanation() -> None:
    """The documented call: an answer, and why it came from where it came."""
    async with Fleet() as fleet:
        response, explanation = await fleet.router.route(prompt="Hi", request_id="mine")
    assert response.content == "Hello there."
    assert response.endpoint == "http://small"
    assert (explanation.selected_model, explanation.served_by) == ("small", "small")
    assert (explanation.outcome, explanation.request_id) == ("answered", "mine")


async def test_the_request_reaches_the_backend_with_its_context() -> None:
    """Request id and W3C context travel; the attempt's span is the parent the backend sees."""
    async with Fleet() as fleet:
        parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        request = RouteRequest(body=body, request_id="r1", traceparent=parent, headers=(("x-team", "ml"),))
        dispatched = await fleet.router.dispatch(request)
        (call,) = fleet.adapters[SMALL.id].calls
    headers = dict(call.headers)
    attempt = dispatched.trace.spans[-1]
    assert headers["x-request-id"] == "r1"
    assert headers["x-team"] == "ml"
    assert headers["traceparent"] == f"00-{'a' * 32}-{attempt.span_id}-01"
    assert dispatched.trace.parent_span_id == "b" * 16


async def test_after_a_fallback_everything_names_who_answered() -> None:
    """Explanation, attempts and health agree on the way as it went."""
    async with Fleet(scripts={"small": FakeReply(fail=Fault.CONNECT)}) as fleet:
        response, explanation = await fleet.router.route(prompt="Hi")
        assert response.endpoint == "http://large"
        assert (explanation.selected_model, explanation.served_by) == ("small", "large")
        assert explanation.fallback_triggered
        assert [attempt.model for attempt in explanation.attempts] == ["small", "large"]
        failed, answered = [s for s in explanation.trace.stages if names.ATTEMPT in s.attributes]
        assert (failed.status, failed.attributes[names.ERROR_TYPE]) == (Status.ERROR, "connect")
        assert (answered.status, answered.attributes[names.ATTEMPT_REASON]) == (Status.OK, "connect")


async def test_a_replica_that_keeps_failing_is_left_alone() -> None:
    """Failures of attempts open the replica's breaker, and the health filter then drops it by name."""
    async with Fleet(scripts={"small": FakeReply(fail=Fault.CONNECT)}) as fleet:
        for _ in range(3):
            await fleet.router.route(prompt="Hi")
        _, explanation = await fleet.router.route(prompt="Hi")
        assert explanation.selected_model == "large"
        assert fleet.calls("small") == 3
        (drop,) = explanation.drops
        assert (drop.model, drop.stage) == ("small", "filter.health")


async def test_cost_is_what_the_tokens_cost_and_unknown_stays_unknown() -> None:
    """A price known gives a cost; a price unknown gives none, not zero."""
    async with Fleet() as fleet:
        _, cheap = await fleet.router.route(prompt="Hi", model_allowlist=["small"])
        _, unknown = await fleet.router.route(prompt="Hi", model_allowlist=["large"])
        usage = cheap.usage
        assert usage is not None
        expected = (usage.prompt_tokens * 0.001 + usage.completion_tokens * 0.002) / 1000
        assert cheap.cost_usd == pytest.approx(expected)
        assert unknown.cost_usd is None


async def test_nobody_left_carries_the_explanation() -> None:
    """The error says who was excluded by what, and brings its trace."""
    async with Fleet() as fleet:
        with pytest.raises(NoCandidatesError, match="does not support tools") as raised:
            await fleet.router.route(prompt="Hi", tools=[{"type": "function", "function": {"name": "f"}}])
        assert raised.value.trace is fleet.sink.traces[0]
        assert raised.value.trace.route.attributes[names.OUTCOME] == "no_candidates"
        assert fleet.calls("small") == 0


async def test_names_are_resolved() -> None:
    """A model's own name, an alias with its strategy, and `auto`."""
    aliases = {"fast": AliasConfig(models=("large",), strategy="latency_first")}
    async with Fleet(aliases=aliases) as fleet:
        for asked, answers in (("auto", "small"), ("large", "large"), ("fast", "large")):
            _, explanation = await fleet.router.route(prompt="Hi", model=asked)
            assert explanation.selected_model == answers
        assert explanation.strategy == "latency_first"
        assert not explanation.strategy_overridden


async def test_a_tenant_has_a_strategy_of_its_own() -> None:
    """It decides the tenant's requests, behind what an alias or the request itself says, and nobody else's."""
    aliases = {"fast": AliasConfig(strategy="latency_first")}
    tenants = {"a": TenantConfig(strategy="quality_first"), "b": TenantConfig()}
    async with Fleet(aliases=aliases, tenants=tenants) as fleet:
        asked: list[tuple[str, dict[str, Any]]] = [
            ("quality_first", {"tenant_id": "a"}),
            ("hybrid_score", {"tenant_id": "b"}),
            ("latency_first", {"tenant_id": "a", "model": "fast"}),
            ("cost_first", {"tenant_id": "a", "strategy_override": "cost_first"}),
        ]
        for strategy, request in asked:
            _, explanation = await fleet.router.route(prompt="Hi", **request)
            assert explanation.strategy == strategy
            assert explanation.strategy_overridden == ("strategy_override" in request)


async def test_unknown_names_are_the_callers_mistake() -> None:
    """An unknown model is a 404, an unknown strategy a 400 that lists those there are."""
    async with Fleet() as fleet:
        with pytest.raises(ModelNotFoundError, match="no model is called 'huge'; known: auto, large, small"):
            await fleet.router.route(prompt="Hi", model="huge")
        with pytest.raises(BadRequestError, match="unknown model 'huge' in the list"):
            await fleet.router.route(prompt="Hi", model_allowlist=["huge"])
        with pytest.raises(
            BadRequestError, match=r"unknown strategy 'best'; known: .*cheap_cascade, .*cost_first, .*ran"
        ):
            await fleet.router.route(prompt="Hi", strategy_override="best")
        with pytest.raises(BadRequestError, match="give messages, a prompt or a request"):
            await fleet.router.route()


async def test_a_strategy_asked_for_is_used_and_said() -> None:
    """The override decides this request alone."""
    async with Fleet() as fleet:
        _, explanation = await fleet.router.route(prompt="Hi", strategy_override="latency_first")
        assert (explanation.strategy, explanation.strategy_overridden) == ("latency_first", True)
        _, explanation = await fleet.router.route(prompt="Hi")
        assert (explanation.strategy, explanation.strategy_overridden) == ("hybrid_score", False)


async def test_a_simulation_decides_as_the_live_route_does_and_calls_nobody() -> None:
    """Same code, same seed, same decision, down to the spans."""
    async with Fleet() as fleet:
        request = RouteRequest(body={"messages": [{"role": "user", "content": "Hi"}]}, request_id="r", seed=7)
        simulated = await fleet.router.simulate_request(request)
        assert fleet.calls("small") == fleet.calls("large") == 0
        live = (await fleet.router.dispatch(request)).explanation
        decided = [(s.name, s.attributes) for s in live.trace.stages if names.ATTEMPT not in s.attributes]
        assert [(s.name, s.attributes) for s in simulated.trace.stages] == decided
        assert simulated.outcome == "simulated"


async def test_a_simulation_of_a_hopeless_request_explains_it() -> None:
    """Nobody left is an explanation, not an exception."""
    async with Fleet() as fleet:
        explanation = await fleet.router.simulate(prompt="Hi", tools=[{"type": "function", "function": {"name": "f"}}])
        assert explanation.selected_model == ""
        assert {drop.model for drop in explanation.drops} == {"small", "large"}


async def test_a_stream_ends_the_route_when_it_ends() -> None:
    """Chunks arrive, and the record is whole after the last."""
    async with Fleet() as fleet:
        async with fleet.router.stream(prompt="Hi") as stream:
            assert fleet.sink.traces == []
            text = "".join([chunk.content async for chunk in stream])
        assert text == "Hello there."
        assert stream.explanation.outcome == "answered"
        assert stream.explanation.usage is not None
        assert len(fleet.sink.traces) == 1
        assert fleet.router.services.load.in_flight(SMALL.id) == 0


async def test_a_stream_that_fails_before_its_first_event_falls_back() -> None:
    """Until the first byte nothing is committed."""
    async with Fleet(scripts={"small": FakeReply(fail=Fault.OVERLOADED)}) as fleet:
        async with fleet.router.stream(prompt="Hi") as stream:
            text = "".join([chunk.content async for chunk in stream])
        assert (text, stream.explanation.served_by) == ("Hello there.", "large")


async def test_a_stream_that_breaks_off_is_an_error_and_not_tried_again() -> None:
    """After the first byte a failure reaches the reader, and nobody else is asked."""
    broken = FakeReply(text="one two three", fail=Fault.DISCONNECTED, fail_after=2)
    async with Fleet(scripts={"small": broken}) as fleet:
        dispatched = await fleet.router.dispatch(stream_request())
        events = dispatched.answer.reply.events
        assert events is not None
        with pytest.raises(BackendError) as raised:
            async for _ in events:
                pass
        assert raised.value.kind is Fault.DISCONNECTED
        assert fleet.calls("large") == 0
        explanation = dispatched.explanation
        assert (explanation.outcome, explanation.error_code) == ("failed", "stream_interrupted")
        assert fleet.router.services.load.in_flight(SMALL.id) == 0


async def test_a_reader_who_leaves_cancels_the_backend() -> None:
    """Closing amid a stream closes the backend's, and the record says that the client left."""
    async with Fleet() as fleet:
        async with fleet.router.stream(prompt="Hi") as stream:
            await anext(aiter(stream))
        assert fleet.adapters[SMALL.id].cancelled == 1
        assert stream.explanation.outcome == "cancelled"
        assert fleet.router.services.load.in_flight(SMALL.id) == 0


async def test_a_cancelled_caller_leaves_nothing_behind() -> None:
    """A task cancelled while it waits for the backend closes its books."""
    waiting = asyncio.Event()

    class Silent(FakeAdapter):
        async def send(self, call: Any) -> Any:
            waiting.set()
            await asyncio.Event().wait()

    fleet = Fleet(SMALL)
    fleet.router.adapters[SMALL.id] = Silent(endpoint="http://small", model_id="small")
    async with fleet:
        task = asyncio.create_task(fleet.router.route(prompt="Hi"))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fleet.sink.traces[0].route.attributes[names.OUTCOME] == "cancelled"
        assert fleet.router.services.load.in_flight(SMALL.id) == 0


async def test_all_attempts_failing_is_one_error_with_the_way() -> None:
    """The error lists the attempts; the trace has them all."""
    down = {"small": FakeReply(fail=Fault.CONNECT), "large": FakeReply(fail=Fault.SERVER_ERROR)}
    once = [attrs.evolve(model, max_retries=0) for model in (SMALL, LARGE)]
    async with Fleet(*once, scripts=down) as fleet:
        with pytest.raises(AttemptsExhaustedError) as raised:
            await fleet.router.route(prompt="Hi")
        assert raised.value.details["attempts"] == [
            {"model": "small", "fault": "connect"},
            {"model": "large", "fault": "server_error"},
        ]
        assert "http://" not in str(raised.value)


async def test_without_fallback_there_is_one_attempt() -> None:
    """`fallback.enabled: false` means what it says."""
    down = {"small": FakeReply(fail=Fault.CONNECT)}
    async with Fleet(scripts=down, fallback=FallbackConfig(enabled=False)) as fleet:
        with pytest.raises(AttemptsExhaustedError):
            await fleet.router.route(prompt="Hi")
        assert fleet.calls("large") == 0


async def test_other_operations_go_to_models_that_serve_them() -> None:
    """An embedding request sees embedding models alone; with none, the error says so."""
    async with Fleet(SMALL, EMBED) as fleet:
        request = RouteRequest(operation=Operation.EMBEDDING, body={"model": "auto", "input": "x"})
        dispatched = await fleet.router.dispatch(request)
        assert dispatched.explanation.served_by == "embed"
    async with Fleet(SMALL) as fleet:
        with pytest.raises(RouteError):
            await fleet.router.dispatch(request)


async def test_a_chat_request_object_is_routed_with_everything_it_holds() -> None:
    """`request=` takes a ChatRequest; unknown fields go through."""
    async with Fleet() as fleet:
        asked = ChatRequest([ChatMessage("user", "Hi")], model="large", extra={"top_k": 3})
        _, explanation = await fleet.router.route(request=asked)
        (call,) = fleet.adapters[LARGE.id].calls
    assert explanation.served_by == "large"
    assert call.body["top_k"] == 3


async def test_content_is_in_the_trace_only_if_asked_for() -> None:
    """By default neither prompt nor answer is in any span."""
    for capture in (False, True):
        async with Fleet(telemetry=TelemetryConfig(capture_content=capture)) as fleet:
            async with fleet.router.stream(prompt="my secret wish") as stream:
                assert [chunk async for chunk in stream]
            await fleet.router.route(prompt="my secret wish")
            text = repr(fleet.sink.traces)
        assert ("my secret wish" in text) is capture
        assert ("Hello" in text) is capture


async def test_opening_and_closing_twice_is_harmless() -> None:
    """And a closed router has closed its adapters."""
    fleet = Fleet()
    await fleet.router.open()
    await fleet.router.open()
    await fleet.router.close()
    await fleet.router.close()
    assert all(adapter.closed for adapter in fleet.adapters.values())


def test_a_pipeline_that_cannot_be_built_says_everything_at_once() -> None:
    """Unknown strategy and unknown provider are two findings of one error."""
    with pytest.raises(ConfigError) as raised:
        Router(FleetConfig(models=(SMALL,), strategy="bset"), table=TABLE)
    assert "there is no select.bset" in str(raised.value)


async def test_the_requests_own_deadline_ends_it() -> None:
    """A 504 that says so, in the route and in the attempt it cut short; the replica is not blamed."""

    class Silent(FakeAdapter):
        async def send(self, call: Any) -> Any:
            assert self.time is not None
            self.time.advance(1)
            await asyncio.Event().wait()

    fleet = Fleet(SMALL)
    fleet.router.adapters[SMALL.id] = Silent(endpoint="http://small", model_id="small", time=fleet.clock)
    async with fleet:
        with pytest.raises(DeadlineExceededError, match=r"no answer within the request's own 0.01 s") as raised:
            await fleet.router.route(prompt="Hi", timeout_s=0.01)
        assert raised.value.trace is not None
        assert raised.value.trace.spans[-1].attributes[names.ERROR_TYPE] == "deadline"
        assert fleet.router.services.health.is_available("http://small")


@pytest.mark.parametrize("messages", [5, [5], {"a": 1}, [{"role": "user", "content": 5, "tool_calls": 5}]])
async def test_a_malformed_body_is_the_engines_to_refuse(messages: Any) -> None:
    """No stage trips over what a Python caller got wrong; the gateway checks bodies before they come here."""
    async with Fleet() as fleet:
        explanation = await fleet.router.simulate_request(RouteRequest(body={"messages": messages, "tools": None}))
    assert explanation.selected_model == "small"


@pytest.mark.parametrize("streams", [False, True])
async def test_a_request_leaves_nothing_for_the_garbage_collector(*, streams: bool) -> None:
    """What knows each other in a route lets go when it is over: its memory is used again by the next one."""

    async def ask(fleet: Fleet) -> None:
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        request = stream_request() if streams else RouteRequest(body=body)
        reply = (await fleet.router.dispatch(request)).answer.reply
        if reply.events is not None:
            async for _ in reply.events:
                pass

    async with Fleet(scripts={"small": [FakeReply(fail=Fault.OVERLOADED), FakeReply(text="Hello there.")]}) as fleet:
        for _ in range(20):
            await ask(fleet)
        gc.collect()
        gc.disable()
        try:
            for _ in range(100):
                await ask(fleet)
            assert gc.collect() < 100
        finally:
            gc.enable()
