"""`observe.shadow` in a live router: under the same policy, off the answer's path, bounded, and what it keeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from kvfleet.adapters.call import Call, Reply
from kvfleet.clock import FrozenClock
from kvfleet.config.loader import load_config
from kvfleet.config.schema import (
    FleetConfig,
    ModelCapabilities,
    ModelConfig,
    PolicyConfig,
    ShadowConfig,
    StageConfig,
    TenantConfig,
)
from kvfleet.errors import AttemptsExhaustedError, BackendError, ConfigError, Fault, NoCandidatesError
from kvfleet.eval.shadow_store import ShadowRow, ShadowStore
from kvfleet.plugin.contract import RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.explanation import Explanation

TABLE = discover()
LIVE = ModelConfig(name="live", endpoint="http://live", provider="vllm", quality_score=0.9)
NEXT = ModelConfig(name="next", endpoint="http://next", provider="vllm", quality_score=0.1)
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
SHADOW = {"enabled": True, "shadow_models": ("next",), "sample_rate": 1.0, "exclusive": True}


def fleet(shadow: Mapping[str, Any] = {}, models: tuple[ModelConfig, ...] = (LIVE, NEXT), **known: Any) -> FleetConfig:
    """A fleet with one live model, and one that is mirrored to."""
    return FleetConfig(models=models, shadow=ShadowConfig(**{**SHADOW, **shadow}), **known)


def staged(**options: Any) -> FleetConfig:
    """The same with a stage of these options."""
    options = {"shadow_models": ["next"], "sample_rate": 1.0, **options}
    stages = ("classify.prompt", "classify.modality", "filter.policy", "filter.shadow_only", "filter.capabilities")
    made = [StageConfig(use=use) for use in (*stages, "select.quality_first", "execute.fallback")]
    made[3] = StageConfig(use="filter.shadow_only", options={"shadow_models": ["next"]})
    return FleetConfig(models=(LIVE, NEXT), pipeline=(*made, StageConfig(use="observe.shadow", options=options)))


@attrs.define
class World:
    """A router, and what stands behind it."""

    router: Router
    adapters: Mapping[str, FakeAdapter]

    async def ask(self, text: str = "Hello", **request: Any) -> Explanation:
        """Send a request, and wait until what follows from it has been done."""
        body = {"model": "auto", "messages": [{"role": "user", "content": text}], **request.pop("body", {})}
        dispatched = await self.router.dispatch(RouteRequest(body=body, **request))
        if (events := dispatched.answer.reply.events) is not None:
            async for _ in events:
                pass
        await self.settled()
        return dispatched.explanation

    async def settled(self) -> None:
        """Wait for the observers, and for the mirrored calls."""
        await self.router.settled()
        await self.stage.settled()

    @property
    def stage(self) -> Any:
        """The component itself."""
        return next(one.component for one in self.router.pipeline.observe if one.name == "shadow")

    @property
    def mirrored(self) -> list[Call]:
        """The calls that the shadow model got."""
        return self.adapters["next"].calls


@asynccontextmanager
async def living(config: FleetConfig, folder: Path | None = None, **adapters: FakeAdapter) -> AsyncIterator[World]:
    """A router whose engines are fakes."""
    known = {m.name: adapters.get(m.name) or FakeAdapter(model_id=m.name, endpoint=m.endpoint) for m in config.models}
    by_id = {m.id: known[m.name] for m in config.models}
    router = Router(config, table=TABLE, clock=FrozenClock(), adapters=by_id, polls=False, seed=1, state_dir=folder)
    async with router:
        yield World(router, known)


def kept(folder: Path) -> list[ShadowRow]:
    """What the store holds, the oldest first."""
    store = ShadowStore(folder / "shadow.sqlite")
    rows = store.last(100)
    store.close()
    return rows[::-1]


class Hanging(FakeAdapter):
    """An engine that never answers, and notices when it is left."""

    async def send(self, call: Call) -> Reply:
        self.calls.append(call)
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled += 1
        raise AssertionError("unreachable")


class TestUnderPolicy:
    async def test_an_answered_request_is_mirrored_and_its_trace_says_so(self) -> None:
        """The shadow model gets the same messages, marked, and the caller's answer is the live model's."""
        async with living(fleet()) as world:
            explanation = await world.ask("What is the sky?", request_id="r-1")
            assert (explanation.served_by, explanation.to_dict()["shadow_models"]) == ("live", ["next"])
            (call,) = world.mirrored
            assert call.body["messages"] == [{"role": "user", "content": "What is the sky?"}]
            assert {("x-kvfleet-shadow", "1"), ("x-request-id", "r-1-shadow")} <= set(call.headers)

    async def test_a_shadow_model_near_its_rate_limit_is_not_called(self) -> None:
        """What is left of it is for live requests; mirrored calls count for it, and the trace says why there are none."""
        told = {"ratelimit": "limit=60, remaining=5, reset=60"}
        async with living(fleet(), next=FakeAdapter(model_id="next", script=FakeReply(headers=told))) as world:
            await world.ask()
            limits = world.router.services.limits.tracker.of(("http://next", "next", ""))
            assert (limits.minute.requests, limits.in_flight) == (1, 0)
            assert limits.minute.tokens > 0
            explanation = await world.ask()
            assert len(world.mirrored) == 1
            (why,) = explanation.trace.route.attributes["kvfleet.shadow.excluded"]  # type: ignore[misc]
            assert why.startswith("next: held back at 92% of its limit of requests")
            assert why.endswith("[rate limits]")

    async def test_a_shadow_model_that_asks_to_wait_is_left_alone(self) -> None:
        """Mirrored calls obey as live ones do."""
        refusal = FakeReply(fail=Fault.RATE_LIMITED, retry_after_s=30.0)
        async with living(fleet(), next=FakeAdapter(model_id="next", script=refusal)) as world:
            await world.ask()
            await world.ask()
            assert len(world.mirrored) == 1

    async def test_a_shadow_model_that_policy_excludes_is_not_called(self) -> None:
        """A confidential request is not mirrored to a model that is cleared for public data only; the trace says why."""
        public = attrs.evolve(NEXT, allowed_data_classes=("public",))
        async with living(fleet(models=(LIVE, public), policy=PolicyConfig(enabled=True))) as world:
            explanation = await world.ask(data_class="confidential")
            assert world.mirrored == []
            (why,) = explanation.trace.route.attributes["kvfleet.shadow.excluded"]  # type: ignore[misc]
            assert why.startswith("next: ")
            assert why.endswith("[filter.policy]")
            assert explanation.to_dict()["shadow_models"] == []
            await world.ask(data_class="public")
            assert len(world.mirrored) == 1

    async def test_personal_data_stays_off_a_shadow_model_that_is_not_private(self) -> None:
        """What classifiers found of the request counts for the mirror too."""
        cloud = attrs.evolve(NEXT, private=False)
        policy = PolicyConfig(enabled=True, pii_detection=True)
        async with living(fleet(models=(LIVE, cloud), policy=policy)) as world:
            await world.ask("Write to ada.lovelace@example.com")
            assert world.mirrored == []
            await world.ask("Write to nobody")
            assert len(world.mirrored) == 1

    async def test_a_tenants_blocked_model_is_not_mirrored_to(self) -> None:
        """Nor one that the tenant may not use."""
        tenants = {"a": TenantConfig(blocked_models=("next",)), "b": TenantConfig()}
        async with living(fleet(tenants=tenants)) as world:
            await world.ask(tenant="a")
            assert world.mirrored == []
            await world.ask(tenant="b")
            assert len(world.mirrored) == 1

    async def test_a_model_that_cannot_do_what_is_asked_is_not_mirrored_to(self) -> None:
        """Capabilities count as for a candidate."""
        able = attrs.evolve(LIVE, capabilities=ModelCapabilities(supports_tools=True))
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        async with living(fleet(models=(able, NEXT))) as world:
            await world.ask(body={"tools": tools})
            assert world.mirrored == []

    async def test_the_callers_list_of_models_holds_for_the_mirror(self) -> None:
        """A request that allows only one model is not shown to another; one that names a model may be."""
        async with living(fleet()) as world:
            explanation = await world.ask(models=frozenset({"live"}))
            assert world.mirrored == []
            assert "allowed models" in str(explanation.trace.route.attributes["kvfleet.shadow.excluded"])
            await world.ask(model="live")
            assert len(world.mirrored) == 1

    async def test_a_filter_that_fails_excludes_everybody(self) -> None:
        """Without an answer from the policy nothing is mirrored."""
        async with living(fleet(policy=PolicyConfig(enabled=True))) as world:
            stage = next(one for one in world.router.pipeline.stages if one.key == "filter.policy")

            def broken(ctx: Any) -> Any:
                if ctx.candidates[0].name == "next":
                    raise RuntimeError("broken")
                return ()

            guard = world.router.services.excluded
            broken_stage = attrs.evolve(stage, run=broken)
            world.router.services.excluded = attrs.evolve(guard, stages=(broken_stage,))  # type: ignore[misc,type-var]
            explanation = await world.ask()
            assert world.mirrored == []
            assert "the filter failed [filter.policy]" in str(explanation.trace.route.attributes)

    async def test_what_the_execute_stage_takes_out_is_taken_out_of_the_mirror(self, tmp_path: Path) -> None:
        """A pipeline that redacts for models that are not private redacts for shadow models that are not."""
        stages = ("classify.prompt", "select.static", "execute.redacting")
        options = {"shadow_models": ["next", "home"], "sample_rate": 1.0, "log_outputs": True}
        cloud, home = (
            attrs.evolve(NEXT, private=False),
            ModelConfig(name="home", endpoint="http://home", provider="vllm"),
        )
        shadow = StageConfig(use="observe.shadow", options=options)
        config = FleetConfig(
            models=(LIVE, cloud, home),
            pipeline=(*[StageConfig(use=use) for use in stages], shadow),
            default_model="live",
        )
        echo = FakeAdapter(model_id="next", script=lambda call: FakeReply(text=call.body["messages"][0]["content"]))
        async with living(config, tmp_path, next=echo) as world:
            await world.ask("Write to ada.lovelace@example.com", model="live")
            assert "ada.lovelace" not in str(world.mirrored[0].body)
            assert "ada.lovelace" in str(world.adapters["home"].calls[0].body)
        (row,) = (one for one in kept(tmp_path) if one.shadow == "next")
        assert row.shadow_output == "Write to ada.lovelace@example.com"


class TestRouting:
    async def test_exclusive_models_get_no_live_request(self) -> None:
        """Not even one that asks for them, and not as a fallback."""
        failing = FakeAdapter(model_id="live", script=FakeReply(fail=Fault.SERVER_ERROR))
        async with living(fleet(), live=failing) as world:
            with pytest.raises(NoCandidatesError) as caught:
                await world.ask(model="next")
            assert caught.value.details["excluded"]["next"]["by"] == "filter.shadow_only"
            with pytest.raises(AttemptsExhaustedError):
                await world.ask()
            assert world.mirrored == []

    async def test_without_the_option_they_stay_in_ordinary_routing(self) -> None:
        """Only the file's word takes them out; and a model is not compared with itself."""
        async with living(fleet({"exclusive": False})) as world:
            explanation = await world.ask(model="next")
            assert explanation.served_by == "next"
            assert len(world.mirrored) == 1
            assert explanation.to_dict()["shadow_models"] == []

    @pytest.mark.parametrize("off", [{"enabled": False}, {"sample_rate": 0.0}])
    async def test_what_is_off_mirrors_nothing(self, off: dict[str, Any]) -> None:
        """Neither without the switch nor at a share of 0; an exclusive model stays out all the same."""
        async with living(fleet(off)) as world:
            await world.router.dispatch(RouteRequest(body=HELLO))
            await world.router.settled()
            assert world.mirrored == []
            assert [drop.model for drop in (await world.router.simulate(prompt="Hi")).drops] == ["next"]

    async def test_a_simulation_mirrors_nothing(self) -> None:
        """A dry run calls nobody."""
        async with living(fleet()) as world:
            await world.router.simulate(prompt="Hello")
            await world.settled()
            assert world.mirrored == []

    def test_a_section_that_no_stage_applies_is_a_finding(self, tmp_path: Path) -> None:
        """A pipeline of one's own must name the stages."""
        path = tmp_path / "f.yaml"
        path.write_text(
            "models: [{name: a, endpoint: http://a}, {name: b, endpoint: http://b}]\n"
            "shadow: {enabled: true, shadow_models: [b], exclusive: true}\n"
            "pipeline: [select, execute]\n"
        )
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        remedies = [finding.remedy for finding in caught.value.findings]
        assert remedies == [f"add `- {use}`, or remove the section" for use in ("filter.shadow_only", "observe.shadow")]


class TestBounds:
    async def test_the_answer_does_not_wait_for_the_mirror(self) -> None:
        """An engine that never answers holds up neither the answer nor the observers, and close cancels it."""
        hanging = Hanging(model_id="next")
        async with living(fleet(), next=hanging) as world:
            dispatched = await world.router.dispatch(RouteRequest(body=HELLO))
            assert dispatched.answer.served_by is not None
            await world.router.settled()
            await asyncio.sleep(0)
            assert (len(hanging.calls), hanging.cancelled) == (1, 0)
            assert world.stage.state()["in_flight"] == 1
        assert hanging.cancelled == 1
        assert world.router.services.load.in_flight(NEXT.id) == 0

    async def test_calls_in_flight_and_waiting_are_bounded_and_refusals_are_told(self) -> None:
        """Two in flight, one waiting; the fourth is not mirrored, and its trace and a metric say so."""
        hanging = Hanging(model_id="next")
        async with living(staged(max_concurrent=2, max_queue=1), next=hanging) as world:
            traces = []
            for _ in range(4):
                traces.append((await world.router.dispatch(RouteRequest(body=HELLO))).explanation)
                await world.router.settled()
                await asyncio.sleep(0)
            assert len(hanging.calls) == 2
            assert [bool(one.to_dict()["shadow_models"]) for one in traces] == [True, True, True, False]
            assert "too many requests wait" in str(traces[-1].trace.route.attributes["kvfleet.shadow.excluded"])
            state = world.stage.state()
            assert (state["in_flight"], state["waiting"], state["queue_full"]) == (2, 1, 1)
            assert b'kvfleet_shadow_skipped_total{reason="queue_full"} 1.0' in world.router.services.metrics.render()

    async def test_what_waits_is_done_in_turn(self) -> None:
        """One call at a time, and every one of them."""
        async with living(staged(max_concurrent=1)) as world:
            for _ in range(5):
                await world.router.dispatch(RouteRequest(body=HELLO))
            await world.settled()
            assert len(world.mirrored) == 5
            assert world.stage.state()["mirrored"] == 5


class TestResults:
    async def test_a_comparison_has_measures_and_no_content(self, tmp_path: Path) -> None:
        """Latency, cost, length, tenant and trace; texts only if the file asks for them."""
        priced = attrs.evolve(NEXT, cost_per_1k_input_tokens=1.0, cost_per_1k_output_tokens=2.0)
        async with living(fleet(models=(LIVE, priced)), tmp_path) as world:
            explanation = await world.ask("What is the sky?", request_id="r-1", tenant="")
            metrics = world.router.services.metrics.render().decode()
        (row,) = kept(tmp_path)
        assert (row.request_id, row.trace_id, row.primary, row.shadow) == ("r-1", explanation.trace_id, "live", "next")
        assert row.shadow_tokens == 5
        assert row.shadow_usd == pytest.approx(0.001 * (row.shadow_tokens * 2 + 8), abs=0.01)
        assert (row.prompt, row.primary_output, row.shadow_output, row.similarity) == ("", "", "", None)
        assert b"sky" not in (tmp_path / "shadow.sqlite").read_bytes()
        assert 'kvfleet_shadow_requests_total{model="next"} 1.0' in metrics
        assert 'kvfleet_shadow_outcomes_total{model="next",outcome="ok"} 1.0' in metrics
        assert "kvfleet_shadow_cost_usd_total" in metrics

    async def test_outputs_are_kept_and_compared_if_asked_for(self, tmp_path: Path) -> None:
        """Of a stream too, whose events are put together; the mirror itself is no stream."""
        live = FakeAdapter(model_id="live", script=FakeReply(text="The sky is blue."))
        other = FakeAdapter(model_id="next", script=FakeReply(text="The sky is grey."))
        config = fleet({"log_outputs": True, "compare_outputs": True})
        async with living(config, tmp_path, live=live, next=other) as world:
            await world.ask("What is the sky?")
            await world.ask("What is the sky?", stream=True, body={"stream": True})
            assert [call.stream for call in world.mirrored] == [False, False]
        for row in kept(tmp_path):
            assert (row.prompt, row.primary_output) == ("What is the sky?", "The sky is blue.")
            assert (row.shadow_output, row.similarity) == ("The sky is grey.", 0.75)

    async def test_a_shadow_model_that_fails_is_kept_with_its_error(self, tmp_path: Path) -> None:
        """And the live model's health, and the caller, know nothing of it."""
        failing = FakeAdapter(model_id="next", script=FakeReply(fail=Fault.OVERLOADED))
        async with living(fleet(), tmp_path, next=failing) as world:
            explanation = await world.ask()
            assert explanation.outcome == "answered"
            assert len(explanation.attempts) == 1
        (row,) = kept(tmp_path)
        assert row.error
        assert row.shadow_tokens is None

    @pytest.mark.parametrize(("judge", "said"), [("sure", 1.0), ("later", 0.5), ("mad", None), ("fails", None)])
    async def test_a_judge_has_its_say(self, tmp_path: Path, judge: str, said: float | None) -> None:
        """A function, or a coroutine; one that fails, or says something out of range, is no judgement."""
        config = staged(judge=f"tests.builtin.test_shadow:{judge}")
        async with living(config, tmp_path) as world:
            await world.ask("What is the sky?")
        assert [row.judgement for row in kept(tmp_path)] == [said]

    def test_a_judge_that_is_not_there_is_a_finding(self) -> None:
        """At build, not at the first request."""
        with pytest.raises(ConfigError, match="there is no judge 'nowhere:judge'"):
            Router(staged(judge="nowhere:judge"), table=TABLE)

    async def test_without_a_place_nothing_is_written(self) -> None:
        """A router that keeps no state, as in tests, mirrors and counts all the same."""
        async with living(fleet()) as world:
            await world.ask()
            assert world.stage.state()["mirrored"] == 1

    async def test_a_place_that_cannot_be_written_costs_comparisons_alone(self, tmp_path: Path) -> None:
        """They are counted, and the answer is given."""
        place = tmp_path / "file"
        place.write_text("in the way")
        async with living(fleet(), place) as world:
            assert (await world.ask()).outcome == "answered"
            assert world.stage.state()["not_stored"] == 1


def sure(prompt: str, given: str, other: str) -> float:
    """A judge."""
    assert prompt == "What is the sky?"
    return float(given == other)


async def later(prompt: str, given: str, other: str) -> float:
    """A judge that waits."""
    return 0.5


def mad(prompt: str, given: str, other: str) -> float:
    """A judge without measure."""
    return 7.0


def fails(prompt: str, given: str, other: str) -> float:
    """A judge that breaks."""
    raise BackendError(Fault.TIMEOUT, "no judgement")
