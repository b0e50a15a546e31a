"""observe.judge: a share of the answers is graded once they have left, and strategies learn it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import orjson
import pytest

from kvfleet.adapters.call import Call, Operation, Usage
from kvfleet.builtin.judge import JudgeObserver
from kvfleet.clock import FrozenClock
from kvfleet.config.convert import structure
from kvfleet.config.schema import FleetConfig
from kvfleet.errors import Fault, RouteError
from kvfleet.plugin.contract import RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.reader import TraceReader
from kvfleet.trace.render import render
from kvfleet.trace.spans import Span, Trace
from kvfleet.trace.store import TraceStore

TABLE = discover()
BY_MODEL = {"use": "model", "with": {"model": "judge"}}
ANY = [{"role": "user", "content": "What is the capital of France?"}]


class Running:
    """A fleet with a judge that is never chosen, over a strategy that learns."""

    def __init__(self, scripts: Mapping[str, Any], *, models: Mapping[str, Any] | None = None, **given: Any) -> None:
        self.clock = FrozenClock()
        options = {"sample_rate": 1.0, "judges": [BY_MODEL], **given.pop("options", {})}
        stages = [*given.pop("stages", ()), "select.ucb1", given.pop("execute", "execute.fallback")]
        price = {"cost_per_1k_input_tokens": 1.0, "cost_per_1k_output_tokens": 1.0}
        known = [
            {"name": name, "endpoint": f"http://{name}", **price, **((models or {}).get(name, {}))} for name in scripts
        ]
        raw = {
            "models": known,
            "pipeline": [
                "classify.prompt",
                {"use": "filter.shadow_only", "with": {"shadow_models": ["judge"]}},
                *stages,
                "observe.metrics",
                {"use": "observe.judge", "with": options},
            ],
        }
        config, findings = structure(FleetConfig, raw)
        assert config is not None, findings
        self.adapters = {
            f"{name}@http://{name}": FakeAdapter(
                endpoint=f"http://{name}", model_id=name, time=self.clock, script=script
            )
            for name, script in scripts.items()
        }
        self.traces: list[Trace] = []
        self.amended: list[tuple[Trace, Span]] = []
        sinks = [self, *given.pop("sinks", ())]
        self.router = Router(
            config, table=TABLE, adapters=self.adapters, clock=self.clock, polls=False, seed=1, sinks=sinks
        )

    def write(self, trace: Trace) -> None:
        """As a sink."""
        self.traces.append(trace)

    def amend(self, trace: Trace, span: Span) -> None:
        """As a sink."""
        self.amended.append((trace, span))

    async def __aenter__(self) -> Self:
        await self.router.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.router.aclose()

    @property
    def judge(self) -> JudgeObserver:
        """The stage."""
        found = next(stage.component for stage in self.router.pipeline.observe if stage.name == "judge")
        assert isinstance(found, JudgeObserver)
        return found

    async def ask(self, *, stream: bool = False, wait: bool = True, **more: Any) -> Explanation:
        """One request, read to its end, and graded."""
        body = {"model": "auto", "messages": ANY, "stream": stream, **more.pop("body", {})}
        given = {"request_id": f"r{len(self.traces) + 1}", **more}
        request = RouteRequest(body=body, raw=orjson.dumps(body), stream=stream, **given)
        dispatch = await self.router.dispatch(request)
        if dispatch.answer.reply.events is not None:
            async for _ in dispatch.answer.reply.events:
                pass
        await self.router.settled()
        if wait:
            await self.judge.settled()
        return Explanation(self.traces[-1])

    def calls(self, name: str) -> list[Call]:
        """What a model was asked."""
        return self.adapters[f"{name}@http://{name}"].calls

    def arms(self) -> Mapping[str, Any]:
        """What the strategy has learned."""
        arms: Mapping[str, Any] = self.router.pipeline.select.component.stats()["arms"]  # type: ignore[attr-defined]
        return arms


PARIS = FakeReply(text="It is Paris.", usage=Usage(10, 4))
SCRIPTS = {"small": PARIS, "judge": FakeReply(text="3", usage=Usage(50, 1))}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_graded_and_the_strategy_learns_it(stream: bool) -> None:
    """As by POST /v1/feedback: its reward is corrected; trace, metrics and state tell the grade and no content."""
    async with Running(SCRIPTS) as running:
        explanation = await running.ask(stream=stream)
        arm = running.arms()["small"]
        metrics = running.router.services.metrics.render().decode()
        state = running.router.state()["stages"]["observe.judge"]
        (call,) = running.calls("judge")
    assert (arm["ratings"], arm["mean_rating"]) == (1, 0.3)
    stage = explanation.stages[-1]
    assert (stage.key, stage.grade, stage.verdict) == ("observe.judge", 0.3, "model: judge gives it 0.3")
    assert explanation.trace.spans[-1].attributes[names.GRADE_TAUGHT] is True
    assert "grade 0.30 (model: judge gives it 0.3)" in render(explanation)
    assert 'kvfleet_judge_grade_count{model="small"} 1.0' in metrics
    assert 'kvfleet_judge_outcomes_total{outcome="graded"} 1.0' in metrics
    assert 'kvfleet_judge_cost_usd_total{model="judge"} 0.051' in metrics
    assert 'kvfleet_cost_usd_total{model="judge"}' not in metrics
    assert (state["graded"], state["taught"], state["last"][0]["score"]) == (1, 1, 0.3)
    assert state["last"][0]["request_id"] == "r1"
    assert dict(call.headers)["x-kvfleet-judge"] == "1"
    assert dict(call.headers)["x-request-id"] == "r1-judge"
    assert "It is Paris." in call.body["messages"][-1]["content"]
    assert not call.stream
    assert "Paris" not in repr([explanation.trace.spans, state, metrics])
    assert running.amended == [(explanation.trace, explanation.trace.stages[-1])]


async def test_grades_turn_the_traffic() -> None:
    """A model whose answers are found bad loses its requests to one that is slower."""

    def judge(call: Call) -> FakeReply:
        return FakeReply(text="1" if "cheap words" in call.body["messages"][-1]["content"] else "9")

    scripts = {
        "fast": FakeReply(text="cheap words", latency_s=0.1),
        "slow": FakeReply(text="good words", latency_s=0.5),
        "judge": judge,
    }
    free = {name: {"cost_per_1k_input_tokens": 0.0, "cost_per_1k_output_tokens": 0.0} for name in scripts}
    async with Running(scripts, models=free) as running:
        for _ in range(100):
            await running.ask()
        learned = running.arms()
    assert set(learned) == {"fast", "slow"}
    assert learned["slow"]["mean_reward"] > learned["fast"]["mean_reward"]


async def test_only_a_share_is_graded_and_the_same_one_each_time() -> None:
    """By the decision's seed."""
    async with Running(SCRIPTS, options={"sample_rate": 0.3}) as running:
        for seed in range(60):
            await running.ask(seed=seed * 7_919_317)
        drawn = sum(names.JUDGE_SAMPLED in trace.route.attributes for trace in running.traces)
        assert len(running.calls("judge")) == drawn
        assert 5 < drawn < 35


async def test_a_person_s_rating_is_not_replaced() -> None:
    """Whoever rated the answer before the judge did knows better; the grade is shown all the same."""
    event = asyncio.Event()

    class Slow(FakeAdapter):
        async def send(self, call: Call) -> Any:
            await event.wait()
            return await FakeAdapter.send(self, call)

    running = Running(SCRIPTS)
    running.router.adapters["judge@http://judge"] = Slow(
        endpoint="http://judge", model_id="judge", script=FakeReply(text="3")
    )
    async with running:
        await running.ask(wait=False)
        running.router.feedback("r1", 1.0)
        event.set()
        await running.judge.settled()
        assert running.arms()["small"]["mean_rating"] == 1.0
        assert Explanation(running.traces[0]).stages[-1].grade == 0.3
        assert running.traces[0].spans[-1].attributes[names.GRADE_TAUGHT] is False
        running.router.feedback("r1", 0.5)
        assert running.arms()["small"]["mean_rating"] == 0.5


async def test_grades_need_not_be_taught() -> None:
    """`teaches: false` only shows them."""
    async with Running(SCRIPTS, options={"teaches": False}) as running:
        await running.ask()
        assert running.arms()["small"]["ratings"] == 0


async def test_what_a_filter_keeps_from_the_judge_stays_from_it() -> None:
    """Then nobody can tell, and the trace says why."""
    models = {"judge": {"allowed_data_classes": ["public"]}}
    async with Running(SCRIPTS, models=models, stages=["filter.policy"]) as running:
        explanation = await running.ask(data_class="confidential")
        assert not running.calls("judge")
        assert running.arms()["small"]["ratings"] == 0
    stage = explanation.stages[-1]
    assert stage.grade is None
    assert stage.verdict.startswith("model: it could not ask: judge may not see the request: ")
    assert stage.verdict.endswith("[filter.policy]")
    assert "cannot tell" in render(explanation)


async def test_the_callers_list_of_models_holds_for_the_judge() -> None:
    """Who may answer is also who may see."""
    async with Running(SCRIPTS) as running:
        explanation = await running.ask(models=frozenset({"small"}))
        assert not running.calls("judge")
    assert "allowed models" in explanation.stages[-1].verdict


async def test_what_leaves_the_house_for_judgement_is_redacted() -> None:
    """Through the pipeline's execute stage."""
    models = {"small": {"private": True}, "judge": {"private": False}}
    asked = [{"role": "user", "content": "Write to ada@example.com, please."}]
    scripts = {**SCRIPTS, "small": FakeReply(text="I wrote to ada@example.com.")}
    async with Running(scripts, models=models, execute="execute.redacting") as running:
        explanation = await running.ask(body={"messages": asked})
        (call,) = running.calls("judge")
    assert "ada@example.com" not in repr(call.body)
    assert "[EMAIL_1]" in call.body["messages"][-1]["content"]
    assert explanation.stages[-1].grade == 0.3


@pytest.mark.parametrize(
    ("says", "verdict"),
    [
        (FakeReply(text="fine"), "model: judge gave no number"),
        (FakeReply(fail=Fault.OVERLOADED), "model: it could not ask: injected fault: overloaded"),
    ],
)
async def test_a_judge_that_cannot_tell_teaches_nothing(says: FakeReply, verdict: str) -> None:
    """A judge that fails costs no answer."""
    async with Running({**SCRIPTS, "judge": says}) as running:
        explanation = await running.ask()
        assert running.arms()["small"]["ratings"] == 0
    assert explanation.stages[-1].verdict == verdict
    assert explanation.outcome == "answered"


async def test_what_is_no_answer_in_words_is_not_graded() -> None:
    """Errors, answers from memory, embeddings."""
    async with Running({**SCRIPTS, "small": FakeReply(fail=Fault.BAD_REQUEST)}) as running:
        with pytest.raises(RouteError):
            await running.ask()
        assert running.judge.state()["graded"] == 0
    kind = {"capabilities": {"model_type": "embedding"}}
    async with Running(SCRIPTS, models={"small": kind}) as running:
        await running.router.dispatch(RouteRequest(operation=Operation.EMBEDDING, body={"input": "x"}))
        await running.router.settled()
        assert not running.calls("judge")


async def test_no_more_are_taken_than_can_wait() -> None:
    """What does not fit is counted, and no request waits for it; what is under way is cancelled at close."""
    running = Running(SCRIPTS, options={"max_concurrent": 1, "max_queue": 1})

    class Asleep(FakeAdapter):
        async def send(self, call: Call) -> Any:
            await asyncio.sleep(60)

    running.router.adapters["judge@http://judge"] = Asleep(endpoint="http://judge", model_id="judge")
    async with running:
        for _ in range(4):
            await running.ask(wait=False)
        state = running.judge.state()
        assert (state["in_flight"], state["waiting"], state["queue_full"]) == (1, 1, 2)
    assert running.judge.state()["in_flight"] == 0


async def test_the_stored_trace_has_the_grade(tmp_path: Path) -> None:
    """`kvfleet trace show` finds it, though the trace was kept before it was known."""
    store = TraceStore(tmp_path / "traces.sqlite")
    store.open()
    async with Running(SCRIPTS, sinks=[store]) as running:
        await running.ask(wait=False)
        assert store.flush()
        await running.judge.settled()
        await running.ask()
        assert store.flush()
    store.close()
    with TraceReader(tmp_path / "traces.sqlite") as reader:
        found = [Explanation(reader.get(name)) for name in ("r1", "r2")]
    assert [one.stages[-1].grade for one in found] == [0.3, 0.3]
