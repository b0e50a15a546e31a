"""execute.escalate through the whole engine: who is asked, what is given, what it costs, and what the trace says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Self

import orjson
import pytest

from kvfleet.adapters.call import Call, Operation, Usage
from kvfleet.clock import FrozenClock
from kvfleet.config.convert import structure
from kvfleet.config.schema import BudgetConfig, FleetConfig, TelemetryConfig
from kvfleet.errors import AttemptsExhaustedError, Fault
from kvfleet.pipeline.build import check
from kvfleet.plugin.contract import Outcome, RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Dispatch, Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation

TABLE = discover()
PRICE = {"cost_per_1k_input_tokens": 1.0, "cost_per_1k_output_tokens": 1.0}
NOTHING = FakeReply(text="I don't know.", usage=Usage(100, 10))
PARIS = FakeReply(text="It is Paris, the capital of France since long ago.", usage=Usage(100, 20))
ANY = [{"role": "user", "content": "What is the capital of France?"}]
NO_JUDGE = (
    "must be a judge's name, or a mapping with `use` and `with`; as in `- logprobs`, "
    "or `- {use: logprobs, with: {measure: percentile}}`"
)
Script = FakeReply | list[FakeReply] | Callable[[Call], FakeReply]


class Running:
    """A fleet whose models are asked in their order."""

    def __init__(self, scripts: Mapping[str, Script], *, models: Mapping[str, Any] | None = None, **given: Any) -> None:
        self.clock = FrozenClock()
        stages = [
            *given.pop("stages", ()),
            "select.static",
            {"use": "execute.escalate", "with": given.pop("options", {})},
        ]
        known = [
            {"name": name, "endpoint": f"http://{name}", **PRICE, **((models or {}).get(name, {}))} for name in scripts
        ]
        raw = {
            "models": known,
            "pipeline": ["classify.prompt", "classify.modality", *stages, "observe.metrics"],
            **given,
        }
        config, findings = structure(FleetConfig, raw)
        assert config is not None, findings
        self.config: FleetConfig = config
        self.adapters = {
            f"{name}@http://{name}": FakeAdapter(
                endpoint=f"http://{name}", model_id=name, time=self.clock, script=script
            )
            for name, script in scripts.items()
        }
        self.router = Router(config, table=TABLE, adapters=self.adapters, clock=self.clock, polls=False, seed=1)
        self.outcomes: list[Outcome] = []
        self.router._observing.finished = self.outcomes.append

    async def __aenter__(self) -> Self:
        await self.router.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.router.aclose()

    async def dispatch(self, *, stream: bool = False, **more: Any) -> Dispatch:
        """One chat request."""
        body = {"messages": ANY, "stream": stream, **more.pop("body", {})}
        return await self.router.dispatch(RouteRequest(body=body, raw=orjson.dumps(body), stream=stream, **more))

    async def ask(self, **more: Any) -> tuple[str, Explanation]:
        """What the caller reads, and the finished explanation."""
        dispatch = await self.dispatch(**more)
        reply = dispatch.answer.reply
        whole = reply.body if reply.events is None else b"".join([piece async for piece in reply.events])
        await self.router.settled()
        return said(whole), Explanation(self.outcomes[-1].trace)

    def calls(self, name: str) -> list[Call]:
        """What a model was asked."""
        return self.adapters[f"{name}@http://{name}"].calls

    def cancelled(self, name: str) -> int:
        """How many of a model's streams were cut off."""
        return self.adapters[f"{name}@http://{name}"].cancelled


def said(whole: bytes) -> str:
    """The text of an answer, whole or streamed."""
    if whole.startswith(b"{"):
        content: str = orjson.loads(whole)["choices"][0]["message"]["content"]
        return content
    lines = [orjson.loads(line[6:]) for line in whole.splitlines() if line.startswith(b"data: {")]
    assert b"[DONE]" in whole
    return "".join(line["choices"][0]["delta"].get("content") or "" for line in lines if line["choices"])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_trusted_is_given_at_once(stream: bool) -> None:
    """The larger model is not asked, and the trace says how far the answer was trusted, and by whom."""
    async with Running({"small": PARIS, "large": PARIS}) as running:
        text, explanation = await running.ask(stream=stream)
        assert text == PARIS.text
        assert not running.calls("large")
    (attempt,) = explanation.attempts
    assert (attempt.confidence, explanation.served_by, explanation.escalated) == (1.0, "small", False)
    assert attempt.verdict.startswith("signs: nothing speaks against")
    assert explanation.trace.route.attributes[names.ESCALATION_STOPPED] == "confident"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_not_trusted_goes_on_to_the_next_model(stream: bool) -> None:
    """The caller reads the second answer alone; both confidences and the way are told; it was no fallback."""
    async with Running({"small": NOTHING, "large": PARIS}) as running:
        text, explanation = await running.ask(stream=stream)
    assert text == PARIS.text
    assert [(a.model, a.reason, a.fault, a.confidence) for a in explanation.attempts] == [
        ("small", "first", "", 0.1),
        ("large", "low_confidence", "", 1.0),
    ]
    assert explanation.attempts[0].verdict == "signs: it says that it has no answer"
    assert (explanation.selected_model, explanation.served_by) == ("small", "large")
    assert (explanation.escalated, explanation.fallback_triggered) == (True, False)
    assert "Escalated: small (0.10) → large (1.00)" in explanation.summary()
    assert explanation.to_dict()["escalated"]
    assert explanation.usage is not None
    assert explanation.usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_is_paid_for(stream: bool) -> None:
    """The route's cost, the budget and the metrics have both; beforehand both are reserved."""
    budget = {"enabled": True, "per_request_max_usd": None, "monthly_budget_usd": 100}
    stages = ("admit.budget",)
    async with Running({"small": NOTHING, "large": PARIS}, budget=budget, stages=stages) as running:
        _, explanation = await running.ask(stream=stream)
        (account,) = running.router.state()["stages"]["admit.budget"]["accounts"]
        metrics = running.router.services.metrics.render().decode()
    assert explanation.cost_usd == pytest.approx(0.110 + 0.120)
    assert (account["spent_usd"], account["reserved_usd"]) == (pytest.approx(0.230), 0.0)
    assert (account["requests"], account["completion_tokens"]) == (1, 30)
    held = next(s for s in explanation.trace.stages if s.name == "kvfleet.admit.budget").attributes
    assert held[names.BUDGET_RESERVED_USD] == pytest.approx(2 * (7 + 1024) / 1000, abs=0.02)
    assert 'kvfleet_escalations_total{from_model="small",to_model="large"} 1.0' in metrics
    assert 'kvfleet_cost_usd_total{model="small"} 0.11' in metrics
    assert 'kvfleet_cost_usd_total{model="large"} 0.12' in metrics
    assert 'kvfleet_confidence_count{model="small"} 1.0' in metrics
    assert "kvfleet_fallback_triggered_total{" not in metrics


class TestLogprobs:
    """The tokens' probabilities: asked for, used, and not passed on."""

    @pytest.mark.parametrize("stream", [False, True])
    async def test_they_are_asked_for_and_taken_out_again(self, stream: bool) -> None:
        """The engine is asked; the caller, who did not ask, sees none."""
        unsure = FakeReply(text="It is Rome, surely it is Rome.", token_probability=0.4)
        sure = FakeReply(text="It is Paris, surely it is Paris.", token_probability=0.9)
        async with Running({"small": unsure, "large": sure}) as running:
            dispatch = await running.dispatch(stream=stream)
            reply = dispatch.answer.reply
            whole = reply.body if reply.events is None else b"".join([piece async for piece in reply.events])
            assert said(whole) == sure.text
            assert b"top_logprobs" not in whole
            assert running.calls("small")[0].body["logprobs"] is True
        first, second = dispatch.explanation.attempts
        assert (first.confidence, second.confidence) == (pytest.approx(0.4), pytest.approx(0.9))
        assert first.verdict.startswith("logprobs: probability 0.40, mean of ")

    @pytest.mark.parametrize("stream", [False, True])
    async def test_who_asked_for_them_gets_them(self, stream: bool) -> None:
        """And the request goes out as it came."""
        async with Running({"small": FakeReply(token_probability=0.9), "large": PARIS}) as running:
            dispatch = await running.dispatch(stream=stream, body={"logprobs": True, "top_logprobs": 2})
            reply = dispatch.answer.reply
            whole = reply.body if reply.events is None else b"".join([piece async for piece in reply.events])
            assert b'"logprob":' in whole
            assert running.calls("small")[0].body["top_logprobs"] == 2

    async def test_an_engine_that_refuses_them_is_asked_without(self) -> None:
        """Once with them, then without, and from then on never with them again."""

        def refusing(call: Call) -> FakeReply:
            return FakeReply(fail=Fault.BAD_REQUEST) if call.body.get("logprobs") else PARIS

        async with Running({"small": refusing, "large": PARIS}) as running:
            assert (await running.ask())[0] == PARIS.text
            text, explanation = await running.ask()
            assert (text, explanation.served_by) == (PARIS.text, "small")
            assert ["logprobs" in call.body for call in running.calls("small")] == [True, False, False]

    async def test_a_request_that_is_wrong_is_not_tried_elsewhere(self) -> None:
        """A refusal that has nothing to do with them comes back as it is."""
        async with Running({"small": FakeReply(fail=Fault.BAD_REQUEST), "large": PARIS}) as running:
            with pytest.raises(AttemptsExhaustedError) as raised:
                await running.ask()
            assert raised.value.status == 400
            assert not running.calls("large")

    async def test_completions_too(self) -> None:
        """Their probabilities have another shape."""
        body = {"prompt": "The capital of France is", "max_tokens": 8}
        scripts = {"small": FakeReply(token_probability=0.3), "large": FakeReply(token_probability=0.8)}
        async with Running(scripts) as running:
            dispatch = await running.router.dispatch(RouteRequest(operation=Operation.COMPLETION, body=body))
            assert running.calls("small")[0].body["logprobs"] == 1
            answer = orjson.loads(dispatch.answer.reply.body)
        assert answer["choices"][0]["logprobs"] is None
        assert [a.confidence for a in dispatch.explanation.attempts] == [pytest.approx(0.3), pytest.approx(0.8)]


class TestStreams:
    """What is held back of a stream, and what becomes of the rest."""

    LONG = FakeReply(text=" ".join(f"word{i}" for i in range(200)), usage=Usage(100, 200))

    async def test_the_beginning_decides_and_the_rest_flows(self) -> None:
        """The caller's first piece is the beginning, and the engine is still writing then."""
        async with Running({"small": self.LONG, "large": PARIS}, options={"beginning_tokens": 8}) as running:
            dispatch = await running.dispatch(stream=True)
            events = dispatch.answer.reply.events
            assert events is not None
            first = await anext(events)
            assert first.count(b"word") == 8
            assert dispatch.trace.stages[-1].end_ns == 0
            rest = b"".join([piece async for piece in events])
            assert said(first + rest) == self.LONG.text
            assert running.cancelled("small") == 0

    async def test_a_rejected_one_is_cut_off_once_the_next_has_begun(self) -> None:
        """Its engine stops; what it wrote so far is paid for, about."""
        unsure = FakeReply(text=self.LONG.text, token_probability=0.2)
        scripts = {"small": unsure, "large": self.LONG}
        async with Running(scripts, options={"beginning_tokens": 8}) as running:
            text, explanation = await running.ask(stream=True)
            assert text == self.LONG.text
            assert (running.cancelled("small"), running.cancelled("large")) == (1, 0)
            (unused,) = running.outcomes[-1].unused
        assert unused.usage is not None
        assert 8 <= unused.usage.completion_tokens <= 12
        assert [a.is_discarded for a in explanation.attempts] == [True, False]
        assert explanation.cost_usd == pytest.approx(0.3 + (unused.cost_usd or 0))

    async def test_it_goes_on_if_nobody_better_answers(self) -> None:
        """The stream that was not trusted is better than none, from its first word."""
        unsure = FakeReply(text=self.LONG.text, token_probability=0.2)
        scripts = {"small": unsure, "large": FakeReply(fail=Fault.OVERLOADED)}
        async with Running(scripts, options={"beginning_tokens": 8}) as running:
            text, explanation = await running.ask(stream=True)
            assert (text, running.cancelled("small")) == (self.LONG.text, 0)
        assert (explanation.served_by, explanation.outcome) == ("small", "answered")

    async def test_one_that_breaks_before_it_is_decided_on_is_a_failed_attempt(self) -> None:
        """Nobody has seen anything of it, so another model may answer."""
        broken = FakeReply(text=self.LONG.text, fail=Fault.DISCONNECTED, fail_after=3)
        async with Running({"small": broken, "large": PARIS}) as running:
            text, explanation = await running.ask(stream=True)
        assert text == PARIS.text
        assert [(a.model, a.fault) for a in explanation.attempts] == [("small", "disconnected"), ("large", "")]
        assert explanation.fallback_triggered

    async def test_a_whole_one_can_be_waited_for(self) -> None:
        """With `streams: whole` a judge that needs all of it can tell; the answer is then replayed."""
        schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}}
        options = {"judges": ["json_schema"], "streams": "whole"}
        scripts: dict[str, Script] = {"small": FakeReply(text="x"), "large": FakeReply(text="y")}
        async with Running(scripts, options=options) as running:
            text, explanation = await running.ask(stream=True, body=wanted)
            assert orjson.loads(text)["city"]
            assert [a.confidence for a in explanation.attempts] == [1.0]
        assert explanation.attempts[0].verdict == "json_schema: it is JSON of the schema"

    async def test_too_much_is_not_held_back(self) -> None:
        """Then what there is is judged, and the rest flows."""
        options = {"streams": "whole", "most_held_bytes": 2048}
        async with Running({"small": self.LONG, "large": PARIS}, options=options) as running:
            dispatch = await running.dispatch(stream=True)
            events = dispatch.answer.reply.events
            assert events is not None
            first = await anext(events)
            assert 2048 <= len(first) < 4096
            assert said(first + b"".join([piece async for piece in events])) == self.LONG.text

    async def test_a_client_that_leaves_ends_everything(self) -> None:
        """The stream that was given is cut off."""
        async with Running({"small": self.LONG, "large": PARIS}) as running:
            dispatch = await running.dispatch(stream=True)
            await dispatch.answer.reply.close()
            await running.router.settled()
            assert running.cancelled("small") == 1
            assert running.outcomes[-1].trace.route.attributes[names.OUTCOME] == "cancelled"


class TestTheEnd:
    """When nobody is trusted, or nobody else may be asked."""

    @pytest.mark.parametrize(
        ("first", "second", "given"), [(0.6, 0.5, "small"), (0.5, 0.6, "large"), (0.5, 0.5, "large")]
    )
    async def test_the_best_is_given_and_the_later_of_equals(self, first: float, second: float, given: str) -> None:
        """Only whole answers can be gone back to."""
        scripts = {"small": FakeReply(token_probability=first), "large": FakeReply(token_probability=second)}
        async with Running(scripts) as running:
            _, explanation = await running.ask()
        assert explanation.served_by == given
        assert explanation.trace.route.attributes[names.ESCALATION_STOPPED] == "nobody_left"
        assert len(explanation.attempts) == 2

    async def test_an_answer_before_a_failure_counts(self) -> None:
        """The failure is told, and the answer is given."""
        async with Running({"small": NOTHING, "large": FakeReply(fail=Fault.SERVER_ERROR)}) as running:
            text, explanation = await running.ask()
        assert (text, explanation.served_by, explanation.attempts[1].fault) == (NOTHING.text, "small", "server_error")

    async def test_no_more_than_max_attempts(self) -> None:
        """The third model is not asked."""
        scripts = {"a": NOTHING, "b": NOTHING, "c": PARIS}
        async with Running(scripts, options={"max_attempts": 2}) as running:
            text, explanation = await running.ask()
            assert not running.calls("c")
        assert (text, explanation.served_by) == (NOTHING.text, "b")
        assert explanation.trace.route.attributes[names.ESCALATION_STOPPED] == "max_attempts"

    async def test_another_replica_of_the_same_model_is_not_asked_for_more(self) -> None:
        """It would say the same; a failed one is replaced by it."""
        replicas = {"small": {"replicas": ["http://small-2"]}}
        scripts = {"small": NOTHING, "large": PARIS}
        running = Running(scripts, models=replicas)
        twin = FakeAdapter(endpoint="http://small-2", model_id="small", time=running.clock, script=NOTHING)
        running.router.adapters["small@http://small-2"] = twin
        async with running:
            _, explanation = await running.ask()
        assert [a.model for a in explanation.attempts] == ["small", "large"]
        assert len(twin.calls) + len(running.calls("small")) == 1

    async def test_the_deadline_gives_what_there_is(self) -> None:
        """There is no time for the larger model: the answer at hand is given, not an error."""
        slow = FakeReply(text="I don't know.", latency_s=9.9)
        async with Running({"small": slow, "large": PARIS}) as running:
            text, explanation = await running.ask(timeout_s=10.0)
            assert not running.calls("large")
        assert (text, explanation.outcome) == ("I don't know.", "answered")
        assert explanation.trace.route.attributes[names.ESCALATION_STOPPED] == "deadline"

    async def test_the_deadline_ends_a_call_under_way(self) -> None:
        """The larger model is given up in time, and nobody is blamed."""

        class Asleep(FakeAdapter):
            async def send(self, call: Call) -> Any:
                await asyncio.sleep(60)

        running = Running({"small": NOTHING, "large": PARIS})
        running.router.adapters["large@http://large"] = Asleep(endpoint="http://large", model_id="large")
        async with running:
            text, explanation = await running.ask(timeout_s=0.5)
            assert running.router.services.health.is_available("http://large")
        assert (text, explanation.outcome, explanation.served_by) == (NOTHING.text, "answered", "small")
        assert (explanation.attempts[1].fault, explanation.attempts[1].message) == (
            "cancelled",
            "the call was given up",
        )

    async def test_what_one_request_may_cost_holds_for_all_answers_together(self) -> None:
        """A third answer would be too much beside the two before it; each alone passes the filter."""
        budget = {"enabled": True, "per_request_max_usd": 0.3}
        scripts = {"a": NOTHING, "b": NOTHING, "c": PARIS}
        async with Running(scripts, budget=budget, stages=("filter.budget", "admit.budget")) as running:
            text, explanation = await running.ask(body={"max_tokens": 100})
        assert (text, [a.model for a in explanation.attempts]) == (NOTHING.text, ["a", "b"])
        assert explanation.trace.route.attributes[names.ESCALATION_STOPPED] == "cost_limit"

    async def test_the_tenants_limit_is_the_pipelines(self) -> None:
        """`max_cost_per_request`: two small answers fit, and a third does not."""
        tenants = {"t": {"max_cost_per_request": 0.35}}
        scripts = {"a": NOTHING, "b": NOTHING, "c": PARIS}
        options = {"max_attempts": 3}
        async with Running(scripts, tenants=tenants, stages=("filter.tenant",), options=options) as running:
            _, explanation = await running.ask(body={"max_tokens": 200}, tenant="t")
        assert [a.model for a in explanation.attempts] == ["a", "b"]
        assert explanation.trace.route.attributes[names.ESCALATION_STOPPED] == "cost_limit"

    async def test_nobody_answers(self) -> None:
        """Then it is an error, as by execute.fallback."""
        scripts = {"a": FakeReply(fail=Fault.RATE_LIMITED), "b": FakeReply(fail=Fault.RATE_LIMITED)}
        async with Running(scripts) as running:
            with pytest.raises(AttemptsExhaustedError) as raised:
                await running.ask()
        assert (raised.value.status, len(raised.value.details["attempts"])) == (429, 2)


class TestPolicy:
    """Whoever is asked has passed the filters, judges too."""

    async def test_nobody_is_asked_whom_a_filter_drops(self) -> None:
        """However little the answer is trusted."""
        models = {"large": {"allowed_data_classes": ["public"]}}
        scripts = {"small": NOTHING, "large": PARIS, "house": PARIS}
        async with Running(scripts, models=models, stages=("filter.policy",)) as running:
            _, explanation = await running.ask(data_class="confidential")
            assert not running.calls("large")
        assert explanation.served_by == "house"

    async def test_a_judge_that_may_not_see_the_request_does_not(self) -> None:
        """Then it cannot tell, and the trace says why; the answer is given."""
        models = {"judge": {"allowed_data_classes": ["public"]}}
        options = {"judges": [{"use": "model", "with": {"model": "judge"}}], "fallback_order": ["large"]}
        scripts: dict[str, Script] = {"small": NOTHING, "large": PARIS, "judge": FakeReply(text="2")}
        stages = ("filter.policy",)
        async with Running(scripts, models=models, stages=stages, options=options) as running:
            text, explanation = await running.ask(data_class="confidential")
            assert not running.calls("judge")
            text_public, public = await running.ask(data_class="public")
            assert running.calls("judge")
        assert (text, explanation.attempts[0].confidence) == (NOTHING.text, None)
        assert "judge may not see the request: " in explanation.attempts[0].verdict
        assert "[filter.policy]" in explanation.attempts[0].verdict
        assert (text_public, public.served_by) == (PARIS.text, "large")

    async def test_the_callers_list_of_models_holds_for_judges(self) -> None:
        """A judge that is not on it is not asked."""
        options = {"judges": [{"use": "model", "with": {"model": "judge"}}]}
        scripts: dict[str, Script] = {"small": PARIS, "large": PARIS, "judge": FakeReply(text="9")}
        async with Running(scripts, options=options) as running:
            _, explanation = await running.ask(models=frozenset({"small", "large"}))
            assert not running.calls("judge")
        assert "not on the request's list of allowed models" in explanation.attempts[0].verdict

    @pytest.mark.parametrize("stream", [False, True])
    async def test_personal_data_is_taken_out_for_all_of_them(self, stream: bool) -> None:
        """Answers and verdicts: models that are not private see placeholders, and the caller its own values."""
        asked = [{"role": "user", "content": "Write to ada@example.com, please."}]

        def repeat(call: Call) -> FakeReply:
            return FakeReply(text=call.body["messages"][-1]["content"], token_probability=0.9)

        options = {
            "judges": ["logprobs", {"use": "model", "with": {"model": "judge"}}],
            "redact": True,
            "streams": "whole",
        }
        scripts: dict[str, Script] = {"small": repeat, "large": PARIS, "judge": FakeReply(text="9")}
        async with Running(scripts, options=options) as running:
            text, explanation = await running.ask(stream=stream, body={"messages": asked})
            sent = repr([running.calls(name) for name in ("small", "judge")])
            assert running.calls("judge")
        assert text == "Write to ada@example.com, please."
        assert "ada@example.com" not in sent
        assert "[EMAIL_1]" in sent
        assert (explanation.served_by, explanation.attempts[0].confidence) == ("small", pytest.approx(0.9))


class TestJudges:
    """Judges that ask: their calls are attempts of the route."""

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_model_that_judges_is_traced_and_paid_for(self, stream: bool) -> None:
        """It sees question and answer; its tokens are on the bill; it is neither a fallback nor an escalation."""
        options = {"judges": [{"use": "model", "with": {"model": "judge"}}], "streams": "whole"}
        verdicts = [FakeReply(text="3", usage=Usage(50, 1)), FakeReply(text="9", usage=Usage(60, 1))]
        scripts: dict[str, Script] = {"small": NOTHING, "large": PARIS, "judge": verdicts}
        async with Running(scripts, options=options) as running:
            text, explanation = await running.ask(stream=stream)
            (first, second) = running.calls("judge")
        assert text == PARIS.text
        assert "What is the capital of France?" in first.body["messages"][-1]["content"]
        assert NOTHING.text in first.body["messages"][-1]["content"]
        assert PARIS.text in second.body["messages"][-1]["content"]
        assert [(a.model, a.reason) for a in explanation.attempts] == [
            ("small", "first"),
            ("judge", "judge"),
            ("large", "low_confidence"),
            ("judge", "judge"),
        ]
        assert [a.confidence for a in explanation.attempts] == [0.3, None, 0.9, None]
        assert explanation.attempts[0].verdict == "model: judge gives it 0.3"
        assert explanation.cost_usd == pytest.approx(0.110 + 0.051 + 0.120 + 0.061)
        assert explanation.fallback_chain == ("small@http://small", "large@http://large")
        assert not explanation.fallback_triggered
        assert explanation.usage is not None
        assert explanation.usage.completion_tokens == 20

    async def test_the_last_resort_is_not_judged_at_a_price(self) -> None:
        """Nobody could answer instead."""
        options = {"judges": ["signs", {"use": "model", "with": {"model": "judge"}}], "max_attempts": 2}
        scripts: dict[str, Script] = {"small": PARIS, "large": PARIS, "judge": FakeReply(text="1")}
        async with Running(scripts, options=options) as running:
            _, explanation = await running.ask()
            assert len(running.calls("judge")) == 1
        assert [(a.model, a.confidence) for a in explanation.attempts if a.verdict] == [("small", 0.1), ("large", 1.0)]

    async def test_a_cheap_judge_that_has_seen_enough_saves_the_dear_one(self) -> None:
        """They are asked first, whatever their order."""
        options = {"judges": [{"use": "model", "with": {"model": "judge"}}, "signs"]}
        scripts: dict[str, Script] = {"small": NOTHING, "large": PARIS, "judge": FakeReply(text="9")}
        async with Running(scripts, options=options) as running:
            await running.ask()
            assert len(running.calls("judge")) == 1  # of the second answer alone

    @pytest.mark.parametrize(
        ("more", "confidence"),
        [(PARIS.text, 1.0), ("It is Rome, the capital of Italy since long ago.", pytest.approx(0.8))],
    )
    async def test_self_consistency_asks_the_same_model_again(self, more: str, confidence: Any) -> None:
        """The samples are attempts at the same replica, at a temperature of their own."""
        options = {"judges": [{"use": "self_consistency", "with": {"samples": 2}}]}
        scripts: dict[str, Script] = {"small": [PARIS, FakeReply(text=more)], "large": PARIS}
        async with Running(scripts, options=options) as running:
            _, explanation = await running.ask(body={"seed": 4})
            samples = running.calls("small")[1:]
        assert [(a.model, a.reason) for a in explanation.attempts] == [("small", "first"), *[("small", "sample")] * 2]
        assert explanation.attempts[0].confidence == confidence
        assert [(call.body["temperature"], "seed" in call.body) for call in samples] == [(0.7, False)] * 2

    @pytest.mark.parametrize(("if_unknown", "served"), [("accept", "small"), ("escalate", "large")])
    async def test_an_answer_of_which_nobody_can_tell(self, if_unknown: str, served: str) -> None:
        """Is given, or not, as the pipeline says; the trace says that nobody could."""
        options = {"judges": ["logprobs"], "if_unknown": if_unknown}
        async with Running({"small": PARIS, "large": PARIS}, options=options) as running:
            _, explanation = await running.ask()
        assert explanation.served_by == served
        assert (explanation.attempts[0].confidence, explanation.attempts[0].verdict) == (
            None,
            "logprobs: the engine told no probabilities",
        )

    async def test_calls_of_tools_are_answers(self) -> None:
        """Though they have no words."""
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
        body = {"tools": [tool], "tool_choice": "required"}
        async with Running({"small": PARIS, "large": PARIS}) as running:
            dispatch = await running.dispatch(body=body)
            streamed = await running.dispatch(body=body, stream=True)
            assert streamed.answer.reply.events is not None
            assert b"look" in b"".join([piece async for piece in streamed.answer.reply.events])
            assert not running.calls("large")
        assert b"tool_calls" in dispatch.answer.reply.body


class TestWhatIsNotJudged:
    """Where there is nothing to judge for."""

    async def test_a_single_model_is_asked_as_it_is(self) -> None:
        """Its answer is forwarded byte by byte, and no judge is asked."""
        async with Running({"small": NOTHING, "large": PARIS}) as running:
            _, explanation = await running.ask(model="small")
            (call,) = running.calls("small")
        assert call.raw
        assert names.CONFIDENCE_ATTEMPTS not in explanation.trace.route.attributes

    async def test_embeddings(self) -> None:
        """They fall back as ever."""
        kind = {"capabilities": {"model_type": "embedding"}}
        scripts: dict[str, Script] = {"a": FakeReply(fail=Fault.CONNECT), "b": FakeReply()}
        async with Running(scripts, models={"a": kind, "b": kind}) as running:
            request = RouteRequest(operation=Operation.EMBEDDING, body={"input": "x"})
            dispatch = await running.router.dispatch(request)
        assert dispatch.explanation.served_by == "b"
        assert dispatch.explanation.fallback_triggered


def test_wrong_judges_are_findings() -> None:
    """Each at its place, with what to do."""
    judges = [
        "logporbs",
        3,
        {"use": "logprobs", "with": {"measure": "median"}},
        {"use": "model", "with": {"model": "x"}},
    ]
    raw = {
        "models": [{"name": "a", "provider": "mock"}],
        "pipeline": ["select.static", {"use": "execute.escalate", "with": {"judges": judges}}],
    }
    config, _ = structure(FleetConfig, raw)
    assert config is not None
    told = [str(finding) for finding in check(config, TABLE)]
    assert told == [
        "pipeline[1].with.judges[0].use: there is no judge 'logporbs'; did you mean logprobs?",
        "pipeline[1].with.judges[1]: " + NO_JUDGE,
        "pipeline[1].with.judges[2].with.measure: 'median' is not allowed here; did you mean mean?",
        "pipeline[1].with.judges[3].with.model: no model is called 'x'; known: a",
    ]


async def test_the_state_counts() -> None:
    """For the dashboard: judged, unknown, escalated."""
    async with Running({"small": [NOTHING, PARIS], "large": PARIS}) as running:
        await running.ask()
        await running.ask()
        assert running.router.state()["stages"]["execute.escalate"] == {"judged": 3, "unknown": 0, "escalated": 1}


async def test_a_strategy_that_learns_gives_nothing_for_an_answer_that_did_not_suffice() -> None:
    """Its model earns 0, and the one that answered its own reward."""
    raw_models = {"small": NOTHING, "large": PARIS}
    running = Running(raw_models, options={"fallback_order": ["small", "large"]})
    running.router = Router(
        FleetConfig(
            models=running.config.models,
            pipeline=tuple(
                stage if not stage.use.startswith("select") else type(stage)(use="select.ucb1")
                for stage in running.config.pipeline
            ),
            telemetry=TelemetryConfig(),
            budget=BudgetConfig(),
        ),
        table=TABLE,
        adapters=running.adapters,
        clock=running.clock,
        polls=False,
        seed=1,
    )
    running.router._observing.finished = running.outcomes.append
    async with running:
        for _ in range(6):
            await running.ask()
        arms: Any = running.router.pipeline.select.component.stats()["arms"]  # type: ignore[attr-defined]
    assert arms["small"]["mean_reward"] == 0
    assert arms["large"]["mean_reward"] > 0.5
