"""The built-in stages in a live router: what a request that comes in meets."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Operation
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FleetConfig, ModelCapabilities, ModelConfig, StageConfig
from kvfleet.errors import AdmissionError, Fault, NoCandidatesError
from kvfleet.plugin.contract import RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Dispatch, Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.explanation import Explanation

TABLE = discover()
SYSTEM = {"role": "system", "content": "You are a helpful assistant, and you answer in verse. " * 10}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def replicated(name: str = "m", count: int = 3, **known: Any) -> ModelConfig:
    """A model on some replicas."""
    first, *more = [f"http://{name}-{i}" for i in range(count)]
    return ModelConfig(name=name, endpoint=first, replicas=tuple(more), **known)


def able(name: str, **capabilities: Any) -> ModelConfig:
    """A model with some capabilities."""
    return ModelConfig(name=name, endpoint=f"http://{name}", capabilities=ModelCapabilities(**capabilities))


def user(text: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": text}


class Fleet:
    """A router over fake engines."""

    def __init__(self, router: Router, clock: FrozenClock, engines: Mapping[str, FakeAdapter]) -> None:
        self.router, self.clock, self.engines = router, clock, engines

    async def ask(self, *messages: Any, body: Mapping[str, Any] | None = None, **request: Any) -> Dispatch:
        """One request, answered whole, and observed."""
        whole = {"model": "auto", "messages": list(messages), **(body or {})}
        dispatched = await self.router.dispatch(RouteRequest(body=whole, **request))
        if dispatched.answer.reply.events is not None:
            async for _ in dispatched.answer.reply.events:
                pass
        await self.router.settled()
        return dispatched

    async def served(self, *messages: Any, **more: Any) -> str:
        """The replica that answered."""
        model = (await self.ask(*messages, **more)).answer.served_by
        assert model is not None
        return model.endpoint

    def metric(self, name: str, **labels: str) -> float | None:
        """One sample."""
        return self.router.services.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def fleet(*models: ModelConfig, scripts: Mapping[str, Any] | None = None, **config: Any) -> AsyncIterator[Fleet]:
    """A running fleet; `scripts` by the endpoint's last part."""
    clock = FrozenClock()
    expanded = Router(FleetConfig(models=models), table=TABLE).models
    engines = {
        m.id: FakeAdapter(
            endpoint=m.endpoint,
            model_id=m.name,
            time=clock,
            script=(scripts or {}).get(
                m.endpoint.removeprefix("http://"), FakeReply(text="Hello there.", latency_s=0.1)
            ),
        )
        for m in expanded
    }
    router = Router(
        FleetConfig(models=models, **config), table=TABLE, clock=clock, adapters=engines, polls=False, seed=7
    )
    async with router:
        yield Fleet(router, clock, engines)


async def test_the_second_turn_lands_on_the_replica_that_has_the_first() -> None:
    """For many conversations, turn after turn, streamed or not."""
    async with fleet(replicated()) as running:
        for i in range(12):
            talk = [SYSTEM, user(f"Conversation {i}: hello, who are you?")]
            first = await running.served(*talk, stream=bool(i % 2), body={"stream": bool(i % 2)})
            for turn in range(3):
                talk += [{"role": "assistant", "content": "Hello there."}, user(f"Tell me more, {turn}.")]
                assert await running.served(*talk) == first
        assert (running.metric("kvfleet_cache_affinity_hits_total", type="prefix") or 0) >= 36


async def test_another_question_under_the_same_system_prompt_lands_there_too() -> None:
    """As long as that is cheaper than queueing."""
    async with fleet(replicated()) as running:
        first = await running.served(SYSTEM, user("What is a cat?"))
        assert {await running.served(SYSTEM, user(f"What is {word}?")) for word in "abcdef"} == {first}
        replica = next(m for m in running.router.models if m.endpoint == first)
        for _ in range(40):
            running.router.services.load.started(replica.id)
        assert await running.served(SYSTEM, user("What is a queue?")) != first


async def test_a_named_conversation_stays_under_every_strategy_that_ranks_models() -> None:
    """The model is the strategy's choice, the replica the conversation's."""
    async with fleet(replicated()) as running:
        for strategy in ("static", "cost_first", "quality_first", "cheap_cascade", "latency_first", "hybrid_score"):
            first = await running.served(user(f"Hello, {strategy}"), strategy=strategy, session=strategy)
            for turn in range(4):
                asked = user(f"Turn {turn} of {strategy}")
                assert await running.served(asked, strategy=strategy, session=strategy) == first


@pytest.mark.parametrize("strategy", ["hybrid_score", "static", "weighted", "random", "round_robin", "least_requests"])
async def test_every_replica_is_used(strategy: str) -> None:
    """Requests that have nothing in common spread over the replicas, whatever the strategy."""
    async with fleet(replicated(), strategy=strategy) as running:
        hit = Counter([await running.served(user(f"{i}")) for i in range(60)])
        assert len(hit) == 3


async def test_requests_at_once_spread() -> None:
    """While the first replica is busy, the next request goes to another."""
    async with fleet(replicated()) as running:
        open_streams = []
        for i in range(9):
            body = {"messages": [user(f"{i}")], "stream": True}
            open_streams.append(await running.router.dispatch(RouteRequest(body=body, stream=True)))
        hit = Counter(d.answer.served_by.endpoint for d in open_streams if d.answer.served_by)
        assert set(hit.values()) == {3}
        for dispatched in open_streams:
            await dispatched.answer.reply.close()


async def test_an_engine_that_is_busy_for_others_is_avoided() -> None:
    """Its own count of requests feeds the default score."""
    async with fleet(replicated()) as running:
        busy = "http://m-0"
        running.router.services.load.report(busy, EngineLoad(running=40, waiting=40), running.clock.now_s())
        assert busy not in {await running.served(user(f"{i}")) for i in range(20)}


async def test_weighted_shares_hold_through_the_router() -> None:
    """Nine to one, by the models' weights."""
    models = (replicated("often", 2, weight=9.0), replicated("seldom", 1, weight=1.0))
    async with fleet(*models, strategy="weighted") as running:
        hit = Counter([(await running.served(user(f"{i}"))).split("-")[0] for i in range(300)])
        assert hit["http://seldom"] / 300 == pytest.approx(0.1, abs=0.06)


async def test_tools_go_to_who_can_use_them() -> None:
    """And if nobody can, the error says so for each model."""
    async with fleet(able("plain"), able("able", supports_tools=True)) as running:
        for _ in range(5):
            assert await running.served(user("Weather?"), body={"tools": TOOLS}) == "http://able"
    async with fleet(able("plain"), able("other")) as running:
        with pytest.raises(NoCandidatesError, match="plain: does not support tools") as caught:
            await running.ask(user("Weather?"), body={"tools": TOOLS})
        assert caught.value.status == 400
        assert caught.value.details["excluded"]["other"] == {
            "by": "filter.capabilities",
            "rule": "tools",
            "reason": "does not support tools",
        }
        assert running.metric("kvfleet_drops_total", stage="filter.capabilities", rule="tools") is None
        await running.router.settled()
        assert running.metric("kvfleet_drops_total", stage="filter.capabilities", rule="tools") == 2


async def test_each_operation_goes_to_its_type_of_model() -> None:
    """Embedding requests meet embedding models alone."""
    async with fleet(able("chat"), able("embed", model_type="embedding")) as running:
        body = {"model": "auto", "input": "Hello"}
        dispatched = await running.router.dispatch(RouteRequest(operation=Operation.EMBEDDING, body=body))
        assert dispatched.answer.served_by is not None
        assert dispatched.answer.served_by.name == "embed"
        assert await running.served(user("Hello")) == "http://chat"


async def test_a_replica_that_fails_leaves_and_comes_back() -> None:
    """After three failures it is out, with a reason; after a minute one request tries it, and it is in again."""
    broken = FakeReply(fail=Fault.SERVER_ERROR)
    scripts = {"m-0": [broken, broken, broken, FakeReply(latency_s=0.1)]}
    async with fleet(replicated("m", 2), scripts=scripts, strategy="round_robin") as running:
        for i in range(6):
            assert await running.served(user(f"{i}")) == "http://m-1"
        calls = len(running.engines["m@http://m-0"].calls)
        assert calls == 3
        explanation = (await running.ask(user("again"))).explanation
        assert "circuit open after 3 failed calls, last server_error" in str(explanation.to_dict())
        assert running.metric("kvfleet_breaker_state", model="m", endpoint="http://m-0") == 2
        assert len(running.engines["m@http://m-0"].calls) == calls
        running.clock.advance(60)
        assert "http://m-0" in {await running.served(user(f"{i}")) for i in range(3)}
        assert running.metric("kvfleet_breaker_state", model="m", endpoint="http://m-0") == 0


async def test_if_every_breaker_is_open_the_error_says_why_and_until_when() -> None:
    """503, with each replica's reason and the time until the first may be tried, and nobody is called."""
    async with fleet(replicated("m", 2)) as running:
        for endpoint in ("http://m-0", "http://m-1"):
            for _ in range(3):
                running.router.services.health.record_failure(endpoint, Fault.CONNECT)
            running.clock.advance(10)
        with pytest.raises(NoCandidatesError, match="circuit open after 3 failed calls, last connect") as caught:
            await running.ask(user("Hello"))
        assert (caught.value.status, caught.value.retry_after_s) == (503, 40)
        assert caught.value.trace is not None
        health = next(one for one in Explanation(caught.value.trace).stages if one.key == "filter.health")
        assert health.retry_after_s == 40
        assert not any(engine.calls for engine in running.engines.values())


async def test_one_too_many_is_refused_with_a_word_about_when() -> None:
    """429, before any engine is asked, and the place is free again when the stream ends."""
    stages = ("classify.prompt", "admit.concurrency", "select.random", "execute.fallback", "observe.metrics")
    pipeline = tuple(
        StageConfig(use=use, options={"max_concurrent": 1} if use.startswith("admit") else {}, path=("pipeline", i))
        for i, use in enumerate(stages)
    )
    async with fleet(replicated("m", 1), pipeline=pipeline) as running:
        await running.ask(user("One"))
        body = {"messages": [user("Two")], "stream": True}
        held = await running.router.dispatch(RouteRequest(body=body, stream=True))
        with pytest.raises(AdmissionError) as caught:
            await running.ask(user("Three"))
        assert (caught.value.status, caught.value.retry_after_s) == (429, pytest.approx(0.1))
        await held.answer.reply.close()
        await running.ask(user("Four"))
        assert running.metric("kvfleet_admissions_refused_total", stage="admit.concurrency") == 1


def cached(*stages: str) -> tuple[StageConfig, ...]:
    """A pipeline with an exact cache."""
    every = (
        "classify.prompt",
        *stages,
        "answer.exact_cache",
        "select.round_robin",
        "execute.fallback",
        "observe.metrics",
    )
    return tuple(StageConfig(use=use, path=("pipeline", i)) for i, use in enumerate(every))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_question_is_answered_from_memory(stream: bool) -> None:
    """Without asking an engine, and a stream as the stream it was; another tenant's is not given."""
    async with fleet(replicated("m", 2), pipeline=cached()) as running:
        body = {"temperature": 0, "stream": stream}

        async def told(**request: Any) -> bytes:
            asked = RouteRequest(body={"messages": [user("Two and two?")], **body}, stream=stream, **request)
            reply = (await running.router.dispatch(asked)).answer.reply
            content = reply.body if reply.events is None else b"".join([event async for event in reply.events])
            await running.router.settled()
            return content

        first = await told()
        assert first
        assert await told() == first
        assert sum(len(engine.calls) for engine in running.engines.values()) == 1
        await told(tenant="other")
        assert sum(len(engine.calls) for engine in running.engines.values()) == 2
        assert running.metric("kvfleet_answers_total", stage="answer.exact_cache", hit="true") == 1
        assert running.metric("kvfleet_route_requests_total", strategy="round_robin", status="success") == 3


async def test_simulated_and_live_decisions_agree() -> None:
    """With the same seed and state, the same replica and the same scores; and simulating moves nothing."""
    async with fleet(replicated(), strategy="round_robin") as running:
        for i in range(6):
            request = RouteRequest(body={"messages": [user(f"{i}")]}, seed=i)
            dry = [await running.router.simulate_request(request) for _ in range(3)]
            live = (await running.router.dispatch(request)).explanation
            assert {one.selected_endpoint for one in dry} == {live.selected_endpoint}
    async with fleet(replicated(), able("other", supports_tools=True)) as running:
        for i in range(6):
            request = RouteRequest(body={"messages": [SYSTEM, user(f"{i}")]}, seed=i)
            dry_run = await running.router.simulate_request(request)
            live = (await running.router.dispatch(request)).explanation
            await running.router.settled()
            assert dry_run.selected_endpoint == live.selected_endpoint
            assert dry_run.choice is not None
            assert live.choice is not None
            assert dry_run.choice.by_replica == live.choice.by_replica


async def test_a_first_request_is_no_cache_hit() -> None:
    """A replica chosen for a prompt nobody has seen is not shown as having it."""
    async with fleet(replicated()) as running:
        first = (await running.ask(SYSTEM, user("Hello"))).explanation
        assert "Cache affinity: MISS" in first.summary()
        again = (await running.ask(SYSTEM, user("Hello"))).explanation
        assert "Cache affinity: HIT" in again.summary()
