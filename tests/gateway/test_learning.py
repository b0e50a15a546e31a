"""Learned strategies and routing by content, seen by a client of the gateway."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import orjson
import pytest

from kvfleet.builtin.judge import JudgeObserver
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FleetConfig, ModelConfig, StageConfig
from kvfleet.errors import ComponentError, Fault
from kvfleet.gateway.app import Gateway
from kvfleet.gateway.auth import Keys
from kvfleet.plugin.manager import discover
from kvfleet.router.arms import ArmStore
from kvfleet.router.learned import LearnedStrategy
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace
from tests.gateway.asgi import Answer, call

TABLE = discover()
FREE = {"cost_per_1k_input_tokens": 0.0, "cost_per_1k_output_tokens": 0.0}
FAST = ModelConfig(name="fast", endpoint="http://fast", provider="vllm", quality_score=0.5, tags={"domain": "coding"}, **FREE)  # type: ignore[arg-type]  # fmt: skip
SLOW = ModelConfig(name="slow", endpoint="http://slow", provider="vllm", quality_score=0.6, **FREE)  # type: ignore[arg-type]
SCRIPTS = {"fast": FakeReply(text="Yes.", latency_s=0.1), "slow": FakeReply(text="Yes.", latency_s=1.9)}
SHORT_NAMES = {"bandit": "epsilon_greedy", "learned": "ucb1", "thompson": "thompson_sampling"}
DOCUMENTED = [
    "cost_first",
    "latency_first",
    "quality_first",
    "hybrid_score",
    "cheap_cascade",
    "round_robin",
    "weighted",
    "random",
    "semantic",
    "domain",
    "epsilon_greedy",
    "ucb1",
    "thompson_sampling",
    "exp3",
]


@attrs.define
class Live:
    """A gateway over fake engines, and what it recorded."""

    app: Gateway
    traces: list[Trace] = attrs.field(factory=list)
    count: int = 0

    @property
    def router(self) -> Router:
        return self.app.router

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    @property
    def last(self) -> Explanation:
        return Explanation(self.traces[-1])

    def learner(self, name: str) -> LearnedStrategy:
        found = self.router.pipeline.strategies[name].component
        assert isinstance(found, LearnedStrategy)
        return found

    async def ask(self, prompt: str = "Hello", **headers: str) -> Answer:
        """One chat request; identified r1, r2, and so on."""
        self.count += 1
        names = {key.replace("_", "-"): value for key, value in headers.items()}
        body = {"model": "auto", "messages": [{"role": "user", "content": prompt}]}
        given = {"X-Request-ID": f"r{self.count}", **names}
        answer = await call(self.app, "POST", "/v1/chat/completions", body, headers=given)
        await self.router.settled()
        return answer

    async def rate(self, body: Any, **headers: str) -> Answer:
        return await call(self.app, "POST", "/v1/feedback", body, headers=headers)


@asynccontextmanager
async def live(
    strategy: str = "hybrid_score",
    *,
    models: tuple[ModelConfig, ...] = (FAST, SLOW),
    scripts: Mapping[str, FakeReply] = SCRIPTS,
    state_dir: Path | None = None,
    key: str = "",
    **config: Any,
) -> AsyncIterator[Live]:
    """A gateway that serves."""
    clock = FrozenClock()
    adapters = {
        m.id: FakeAdapter(endpoint=m.endpoint, model_id=m.name, time=clock, script=scripts.get(m.name, FakeReply()))
        for m in models
    }
    fleet = FleetConfig(models=models, strategy=strategy, **config)
    found = Live.__new__(Live)
    found.traces, found.count = [], 0
    router = Router(
        fleet, table=TABLE, clock=clock, adapters=adapters, sinks=[found], polls=False, seed=1, state_dir=state_dir
    )
    found.app = Gateway(router, keys=Keys.of(fleet.gateway, key, tenants=fleet.tenants))
    await found.app.start()
    try:
        yield found
    finally:
        await found.app.stop()


def arms(strategy: LearnedStrategy) -> dict[str, int]:
    """The rewards each model has."""
    return {name: arm["pulls"] for name, arm in strategy.stats()["arms"].items()}


def files_in(folder: Path) -> list[str]:
    """The names of the files there."""
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("name", [*DOCUMENTED, *SHORT_NAMES])
async def test_every_documented_value_of_the_strategy_header_works(name: str) -> None:
    """Long and short names are served; a short name means the long one's very object."""
    async with live() as gateway:
        answer = await gateway.ask(X_KVFleet_Strategy=name)
        assert (answer.status, answer.header("x-kvfleet-strategy")) == (200, SHORT_NAMES.get(name, name))
        strategies = gateway.router.pipeline.strategies
        assert strategies[name] is strategies[SHORT_NAMES.get(name, name)]


async def test_an_unknown_strategy_is_refused_with_those_there_are() -> None:
    """Short names are listed too."""
    async with live() as gateway:
        answer = await gateway.ask(X_KVFleet_Strategy="bandits")
        assert answer.status == 400
        assert all(name in answer.json["error"]["message"] for name in (*DOCUMENTED, *SHORT_NAMES))


@pytest.mark.parametrize("name", ["epsilon_greedy", "ucb1", "thompson_sampling", "exp3", *SHORT_NAMES])
async def test_live_traffic_finds_the_better_model(name: str) -> None:
    """By `strategy:` under either name: after a while most requests go to the model that earns more."""
    async with live(name) as gateway:
        served = Counter([(await gateway.ask()).header("x-kvfleet-model") for _ in range(150)][50:])
        assert served["fast"] > 60
        learner = gateway.learner(name)
        assert sum(arms(learner).values()) == 150
        known = learner.stats()["arms"]
        # 0.4 for 100 ms of 2 s, 0.3 for the declared quality, 0.3 for a free answer.
        assert known["fast"]["mean_reward"] == pytest.approx(0.4 * 0.95 + 0.3 * 0.5 + 0.3)
        assert known["slow"]["mean_reward"] == pytest.approx(0.4 * 0.05 + 0.3 * 0.6 + 0.3)


async def test_the_trace_has_mode_and_propensity() -> None:
    """Whoever reads the record sees how the choice was drawn, and with which chance for each model."""
    async with live("epsilon_greedy") as gateway:
        for _ in range(30):
            await gateway.ask()
        stage = next(stage for stage in gateway.last.stages if stage.kind == "select")
        assert stage.mode in ("exploit", "explore")
        assert sum(stage.terms["propensity"]) == pytest.approx(1.0)
        assert sum(stage.terms["samples"]) == 29


async def test_a_failure_earns_nothing_and_the_fallback_its_own() -> None:
    """A model that cannot be reached learns 0; the one that answered instead learns what its answer was worth."""
    scripts = {"fast": FakeReply(fail=Fault.SERVER_ERROR), "slow": FakeReply(latency_s=1.0)}
    pipeline = _pipeline("select.epsilon_greedy", {"epsilon": 0.0, "max_exploration": 0.0})
    async with live("epsilon_greedy", models=(attrs.evolve(FAST, quality_score=0.9), SLOW), scripts=scripts, pipeline=pipeline) as gateway:  # fmt: skip
        assert (await gateway.ask()).header("x-kvfleet-model") == "slow"
        known = gateway.learner("bandit").stats()["arms"]
        assert known["fast"]["mean_reward"] == 0.0
        assert known["slow"]["mean_reward"] == pytest.approx(0.4 * 0.5 + 0.3 * 0.6 + 0.3)
        assert (await gateway.ask()).header("x-kvfleet-model") == "slow"
        assert len(gateway.last.attempts) == 1


async def test_a_request_that_is_wrong_teaches_nothing() -> None:
    """A backend's 400 says nothing of the model."""
    scripts = {"fast": FakeReply(fail=Fault.BAD_REQUEST), "slow": FakeReply(fail=Fault.BAD_REQUEST)}
    async with live("ucb1", scripts=scripts) as gateway:
        assert (await gateway.ask()).status == 400
        assert arms(gateway.learner("ucb1")) == {}


async def test_other_strategies_leave_the_arms_alone() -> None:
    """Requests under another header teach nothing, and the arms are there again afterwards."""
    async with live("ucb1") as gateway:
        for _ in range(5):
            await gateway.ask()
        before = gateway.learner("ucb1").stats()
        await gateway.ask(X_KVFleet_Strategy="quality_first")
        await gateway.ask(X_KVFleet_Strategy="exp3")
        assert gateway.learner("ucb1").stats() == before
        assert sum(arms(gateway.learner("exp3")).values()) == 1
        await gateway.ask(X_KVFleet_Strategy="learned")
        assert sum(arms(gateway.learner("ucb1")).values()) == 6


async def test_an_explanation_moves_nothing() -> None:
    """A dry run neither learns nor counts as a choice."""
    async with live("ucb1") as gateway:
        await gateway.ask()
        before = gateway.learner("ucb1").stats()
        body = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}
        for _ in range(20):
            assert (await call(gateway.app, "POST", "/v1/route/explain", body)).status == 200
        assert gateway.learner("ucb1").stats() == before
        assert gateway.learner("ucb1")._pending == {}  # type: ignore[attr-defined]


async def test_it_never_explores_into_a_policy_drop() -> None:
    """However eager to explore, it sees only whom the policy lets through."""
    public = attrs.evolve(SLOW, allowed_data_classes=("public",))
    pipeline = _pipeline("select.epsilon_greedy", {"epsilon": 1.0, "decay": 1.0})
    async with live("epsilon_greedy", models=(FAST, public), pipeline=pipeline) as gateway:
        secret = Counter(
            [(await gateway.ask(X_KVFleet_Data_Class="confidential")).header("x-kvfleet-model") for _ in range(60)]
        )
        assert secret == {"fast": 60}
        assert [d.model for d in gateway.last.drops] == ["slow"]
        open_ = Counter(
            [(await gateway.ask(X_KVFleet_Data_Class="public")).header("x-kvfleet-model") for _ in range(60)]
        )
        assert open_["slow"] > 15


class TestFeedback:
    async def test_a_rating_corrects_the_reward(self) -> None:
        """The answer's supposed quality is replaced by its score; by request or by trace; the second rating counts."""
        async with live("ucb1") as gateway:
            answer = await gateway.ask()
            model, trace = answer.header("x-kvfleet-model"), answer.header("x-kvfleet-trace")
            assert model is not None
            before = gateway.learner("ucb1").stats()["arms"][model]["mean_reward"]
            declared = {"fast": 0.5, "slow": 0.6}[model]
            rated = await gateway.rate({"request_id": "r1", "score": 1.0, "comment": "lovely"})
            assert (rated.status, rated.json) == (200, {"object": "feedback", "model": model, "score": 1.0})
            arm = gateway.learner("ucb1").stats()["arms"][model]
            assert arm["mean_reward"] == pytest.approx(before + 0.3 * (1 - declared))
            await gateway.rate({"trace_id": trace, "score": 0})
            arm = gateway.learner("ucb1").stats()["arms"][model]
            assert arm["mean_reward"] == pytest.approx(before - 0.3 * declared)
            assert (arm["pulls"], arm["ratings"], arm["mean_rating"]) == (1, 1, 0.0)

    async def test_ratings_turn_the_traffic(self) -> None:
        """A model that is rated badly loses against one that is slower."""
        scripts = {"fast": FakeReply(latency_s=0.1), "slow": FakeReply(latency_s=0.3)}
        async with live("epsilon_greedy", scripts=scripts) as gateway:
            for _ in range(150):
                model = (await gateway.ask()).header("x-kvfleet-model")
                await gateway.rate({"request_id": f"r{gateway.count}", "score": 0.1 if model == "fast" else 0.9})
            served = Counter([(await gateway.ask()).header("x-kvfleet-model") for _ in range(50)])
            assert served["slow"] > 35

    async def test_an_unknown_request_is_a_404(self) -> None:
        """Never seen, or decided by a strategy that does not learn: it says so."""
        async with live() as gateway:
            await gateway.ask()
            for one in ("r1", "stranger"):
                answer = await gateway.rate({"request_id": one, "score": 0.5})
                assert (answer.status, answer.json["error"]["code"]) == (404, "unknown_request")
                assert "no strategy that learns remembers an answer" in answer.json["error"]["message"]

    @pytest.mark.parametrize(
        ("body", "what"),
        [
            (b"{", "not JSON"),
            ([], "must be a JSON object"),
            ({"request_id": "a"}, "`score` must be a number from 0 to 1"),
            ({"request_id": "a", "score": 1.5}, "`score` must be a number from 0 to 1"),
            ({"request_id": "a", "score": True}, "`score` must be a number from 0 to 1"),
            ({"score": 1}, "give either `request_id` or `trace_id`"),
            ({"request_id": "a", "trace_id": "b", "score": 1}, "give either `request_id` or `trace_id`"),
            ({"request_id": "a", "score": 1, "stars": 5}, "unknown field 'stars'"),
        ],
    )
    async def test_a_wrong_body_is_a_400(self, body: Any, what: str) -> None:
        """What is wrong is said."""
        async with live("ucb1") as gateway:
            answer = await gateway.rate(body)
            assert answer.status == 400
            assert what in answer.json["error"]["message"]

    async def test_it_needs_the_key(self) -> None:
        """Who may not ask may not rate."""
        async with live("ucb1", key="s3cret") as gateway:
            assert (await gateway.rate({"request_id": "r1", "score": 1})).status == 401

    async def test_it_is_counted(self) -> None:
        """Ratings and rewards are metrics."""
        async with live("static") as gateway:
            await gateway.ask(X_KVFleet_Strategy="exp3", X_KVFleet_Models="fast")
            await gateway.rate({"request_id": "r1", "score": 1})
            shown = gateway.router.services.metrics.render().decode()
            assert 'kvfleet_feedback_total{model="fast"} 1.0' in shown
            assert 'kvfleet_reward_count{model="fast",strategy="exp3"} 1.0' in shown


class TestJudge:
    """`observe.judge` behind a running gateway."""

    async def test_grades_turn_the_traffic(self) -> None:
        """A model whose answers a judge model finds bad loses against one that is slower; nobody rated anything."""
        async with judged({"fast": FakeReply(text="No idea what you mean.", latency_s=0.1), "slow": FakeReply(text="Yes.", latency_s=0.3)}) as gateway:  # fmt: skip
            for _ in range(150):
                await gateway.ask()
                await graded(gateway)
            served = Counter([(await gateway.ask()).header("x-kvfleet-model") for _ in range(50)])
            assert served["slow"] > 35
            known = gateway.learner("epsilon_greedy").stats()["arms"]
            assert (known["fast"]["mean_rating"], known["slow"]["mean_rating"]) == (0.0, 1.0)
            shown = (await call(gateway.app, "GET", "/metrics")).body.decode()
            assert 'kvfleet_judge_outcomes_total{outcome="graded"}' in shown
            assert 'kvfleet_feedback_total{model="fast"}' not in shown

    async def test_a_person_is_right(self) -> None:
        """What a client rated is not overruled by a judge."""
        async with judged({"fast": FakeReply(text="No idea what you mean.", latency_s=0.1)}) as gateway:
            await gateway.ask()
            await gateway.rate({"request_id": "r1", "score": 0.9})
            await graded(gateway)
            assert gateway.learner("epsilon_greedy").stats()["arms"]["fast"]["mean_rating"] == pytest.approx(0.9)

    async def test_a_stream_is_graded_too(self) -> None:
        """What was streamed is put together for the judge."""
        async with judged({"fast": FakeReply(text="Yes, it is Paris.", latency_s=0.1)}) as gateway:
            body = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
            assert (await call(gateway.app, "POST", "/v1/chat/completions", body)).status == 200
            await graded(gateway)
            stage = next(stage for stage in gateway.last.stages if stage.name == "judge")
            assert stage.grade == 1.0
            assert "Paris" not in str(gateway.traces[-1])


def judged(scripts: Mapping[str, FakeReply]) -> AbstractAsyncContextManager[Live]:
    """A gateway whose every answer is graded, by a model that likes all but ignorance."""
    judge = ModelConfig(name="judge", endpoint="http://judge", provider="vllm", **FREE)  # type: ignore[arg-type]
    known = {"fast": FAST, "slow": SLOW}
    stages = (
        StageConfig(use="filter.shadow_only", options={"shadow_models": ["judge"]}),
        *_pipeline("select.epsilon_greedy", {"min_samples": 5}),
        StageConfig(
            use="observe.judge",
            options={"sample_rate": 1.0, "judges": [{"use": "model", "with": {"model": "judge"}}]},
        ),
    )
    return live(
        models=(*(known[name] for name in scripts), judge),
        scripts={
            **scripts,
            "judge": lambda call: FakeReply(text="0" if b"No idea" in orjson.dumps(call.body) else "10"),
        },
        pipeline=stages,
    )


async def graded(gateway: Live) -> None:
    """Wait until every grade is given."""
    await gateway.router.settled()
    found = next(stage.component for stage in gateway.router.pipeline.observe if stage.name == "judge")
    assert isinstance(found, JudgeObserver)
    await found.settled()


class TestState:
    @pytest.mark.parametrize("name", ["epsilon_greedy", "ucb1", "thompson_sampling", "exp3"])
    async def test_it_outlives_a_restart(self, name: str, tmp_path: Path) -> None:
        """What was learned and rated is there again, whole, and the file is its owner's alone."""
        async with live(name, state_dir=tmp_path) as gateway:
            for _ in range(20):
                await gateway.ask()
            await gateway.rate({"request_id": "r3", "score": 0.9})
            before = gateway.learner(name).stats()
        async with live(name, state_dir=tmp_path) as gateway:
            assert gateway.learner(name).stats() == before
        assert (tmp_path / "learned-default.sqlite").stat().st_mode & 0o777 == 0o600

    async def test_it_is_saved_while_it_runs(self, tmp_path: Path) -> None:
        """Every ten seconds of traffic, so that a crash loses little."""
        async with live("ucb1", state_dir=tmp_path) as gateway:
            for _ in range(100):  # ten seconds at least: an answer takes a tenth or more
                await gateway.ask()
            assert ArmStore(tmp_path / "learned-default.sqlite").load("ucb1")["fast"]["pulls"] > 10

    async def test_nothing_is_written_by_who_does_not_learn(self, tmp_path: Path) -> None:
        """A fleet under another strategy makes no file."""
        async with live(state_dir=tmp_path) as gateway:
            await gateway.ask()
        assert files_in(tmp_path) == []

    async def test_a_file_that_is_something_else_is_not_touched(self, tmp_path: Path) -> None:
        """The gateway does not start, and says what to do."""
        path = tmp_path / "learned-default.sqlite"
        path.write_text("my diary")
        with pytest.raises(ComponentError, match=r"cannot be used: .*name another file under state_path"):
            async with live("ucb1", state_dir=tmp_path):
                pass
        assert path.read_text() == "my diary"

    async def test_the_path_may_be_given(self, tmp_path: Path) -> None:
        """`state_path` names a file, without any state directory."""
        pipeline = _pipeline("select.ucb1", {"state_path": str(tmp_path / "deep" / "arms.db")})
        async with live("ucb1", pipeline=pipeline) as gateway:
            await gateway.ask()
        assert files_in(tmp_path / "deep") == ["arms.db"]


def _pipeline(select: str, options: Mapping[str, Any]) -> tuple[StageConfig, ...]:
    uses = ("classify.prompt", "classify.modality", "filter.policy", "filter.health", "score.latency")
    return (
        *(StageConfig(use=use) for use in uses),
        StageConfig(use=select, options=options),
        StageConfig(use="execute.fallback"),
    )


class TestContent:
    async def test_the_domain_strategy_sees_the_prompt(self) -> None:
        """Coding goes to the mapped model, and the trace has the domain."""
        models = {"coding": "slow", "medical": "fast"}
        async with live("domain", domain_models=models) as gateway:
            assert (await gateway.ask("Debug this Python function")).header("x-kvfleet-model") == "slow"
            stage = next(stage for stage in gateway.last.stages if stage.name == "domain" and stage.kind == "classify")
            assert dict(stage.facts) == {"domain": "coding"}
            assert (await gateway.ask("A patient has a fever")).header("x-kvfleet-model") == "fast"

    async def test_the_semantic_strategy_sees_the_prompt(self) -> None:
        """A model tagged for coding answers what is about code, and not what is not."""
        async with live("semantic") as gateway:
            assert (await gateway.ask("Debug this Python function")).header("x-kvfleet-model") == "fast"

    @pytest.mark.parametrize("name", ["semantic", "domain"])
    async def test_a_header_s_strategy_sees_the_prompt_too(self, name: str) -> None:
        """Without a classifier in the pipeline the strategy reads the prompt itself."""
        async with live() as gateway:
            answer = await gateway.ask("Debug this Python function", X_KVFleet_Strategy=name)
            assert answer.header("x-kvfleet-model") == "fast"
            stage = next(stage for stage in gateway.last.stages if stage.kind == "select")
            assert stage.mode == "domain coding"

    async def test_only_what_the_user_asked_last_counts(self) -> None:
        """A system prompt full of law does not make a question about code a legal one."""
        talk = [
            {"role": "system", "content": "You know the law: statutes, torts, contracts, courts, judges and juries."},
            {"role": "user", "content": "Debug this Python function"},
        ]
        async with live("semantic") as gateway:
            await call(gateway.app, "POST", "/v1/chat/completions", {"model": "auto", "messages": talk})
            assert "domain coding" in [stage.mode for stage in gateway.last.stages]
