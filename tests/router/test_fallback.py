"""Chains of models for programs without a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest, ChatResponse, InferenceAdapter
from kvfleet.adapters.call import Call, Reply
from kvfleet.adapters.openai_compat import OpenAICompatAdapter
from kvfleet.builtin.execute import Fallback
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FallbackConfig, FleetConfig, ModelConfig
from kvfleet.errors import AttemptsExhaustedError, Fault
from kvfleet.plugin.contract import Answer, RouteRequest, RoutingContext
from kvfleet.router.fallback import EscalationChain, FallbackChain
from kvfleet.router.scoring import Ranking
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Span, Trace
from tests.gateway.upstream import upstream, whole

ASK = ChatRequest([ChatMessage("user", "Hello")], model="ignored")
ANSWER = b'{"id":"1","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Hi."},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'


def adapters(**scripts: FakeReply) -> dict[str, FakeAdapter]:
    """One adapter for each model."""
    return {
        name: FakeAdapter(endpoint=f"http://{name}", model_id=name, script=reply) for name, reply in scripts.items()
    }


def blank() -> Explanation:
    """An explanation of nothing yet."""
    return Explanation(Trace("0" * 32, [Span("kvfleet.route", 0)]))


async def test_the_first_model_that_answers_does() -> None:
    """As on the page: after a failure the next one; each is asked under its own name."""
    fleet = adapters(fast=FakeReply(fail=Fault.CONNECT), strong=FakeReply(text="Yes."), cloud=FakeReply())
    chain = FallbackChain(FallbackConfig(enabled=True, max_attempts=3, fallback_order=("strong", "cloud")))
    response = await chain.execute_with_fallback("fast", fleet, ASK)
    assert (response.content, response.endpoint) == ("Yes.", "http://strong")
    assert [one.calls[0].body["model"] for one in (fleet["fast"], fleet["strong"])] == ["fast", "strong"]
    assert not fleet["cloud"].calls


async def test_the_explanation_tells_the_way() -> None:
    """Attempts with their faults and tokens, and who answered."""
    fleet = adapters(a=FakeReply(fail=Fault.RATE_LIMITED), b=FakeReply())
    explanation = blank()
    chain = FallbackChain(clock=FrozenClock())
    await chain.execute_with_fallback("a", fleet, ASK, explanation, fallback_order=["b"])
    assert [(one.number, one.model, one.reason, one.fault) for one in explanation.attempts] == [
        (1, "a", "first", "rate_limited"),
        (2, "b", "rate_limited", ""),
    ]
    assert explanation.fallback_triggered
    assert explanation.fallback_chain == ("a@http://a", "b@http://b")
    assert (explanation.served_by, explanation.outcome) == ("b", "answered")
    assert explanation.usage is not None


async def test_a_simulated_decision_can_be_carried_out_by_hand() -> None:
    """Its explanation goes on where the simulation ended."""
    models = tuple(ModelConfig(name=name, provider="mock", options={"speed": 1000}) for name in ("a", "b"))
    async with Router(FleetConfig(models=models), polls=False) as router:
        explanation = await router.simulate(prompt="Hello")
        by_name = {model.name: router.adapters[model.id] for model in router.models}
        await FallbackChain().execute_with_fallback(explanation.selected_model, by_name, ASK, explanation)
    assert explanation.served_by == explanation.selected_model
    assert (explanation.outcome, len(explanation.attempts)) == ("answered", 1)
    assert not explanation.to_dict()["dry_run"]


async def test_nobody_beyond_the_chain_is_asked() -> None:
    """Without an order there is only the first, and with one only those it names, each once."""
    fleet = adapters(a=FakeReply(fail=Fault.CONNECT), b=FakeReply(fail=Fault.CONNECT), c=FakeReply())
    with pytest.raises(AttemptsExhaustedError, match="a did not answer"):
        await FallbackChain().execute_with_fallback("a", fleet, ASK)
    with pytest.raises(AttemptsExhaustedError, match="b did not answer after 2 attempts"):
        await FallbackChain().execute_with_fallback("a", fleet, ASK, fallback_order=["a", "b"])
    assert (len(fleet["a"].calls), len(fleet["b"].calls), len(fleet["c"].calls)) == (2, 1, 0)


async def test_switched_off_there_is_one_attempt() -> None:
    """`enabled: false` means no second one."""
    fleet = adapters(a=FakeReply(fail=Fault.CONNECT), b=FakeReply())
    chain = FallbackChain(FallbackConfig(enabled=False, fallback_order=("b",)))
    with pytest.raises(AttemptsExhaustedError):
        await chain.execute_with_fallback("a", fleet, ASK)
    assert not fleet["b"].calls


async def test_a_model_without_an_adapter_is_a_failed_attempt() -> None:
    """It is told, and the next one is asked."""
    explanation = blank()
    await FallbackChain().execute_with_fallback("a", adapters(b=FakeReply()), ASK, explanation, ["b"])
    assert (explanation.attempts[0].fault, explanation.attempts[0].message) == (
        "not_found",
        "there is no adapter for 'a'",
    )
    assert explanation.served_by == "b"


class Broken(FakeAdapter):
    """Raises what no adapter may."""

    async def send(self, call: Any) -> Reply:
        raise ZeroDivisionError("with the prompt in it")


async def test_an_adapter_that_breaks_is_a_failed_attempt() -> None:
    """What it raised is not repeated, for it may hold content."""
    fleet: dict[str, InferenceAdapter] = {"a": Broken(endpoint="http://a"), **adapters(b=FakeReply())}
    explanation = blank()
    await FallbackChain().execute_with_fallback("a", fleet, ASK, explanation, ["b"])
    assert explanation.attempts[0].message == "the adapter failed: ZeroDivisionError"


async def test_over_real_http() -> None:
    """A backend that refuses, one that never answers, and one that does."""
    async with upstream(whole(b"{}", b"503 Overloaded")) as full, upstream() as silent, upstream(whole(ANSWER)) as good:
        fleet = {
            "full": OpenAICompatAdapter(endpoint=full.url),
            "silent": OpenAICompatAdapter(endpoint=silent.url, timeout=0.2),
            "good": OpenAICompatAdapter(endpoint=f"{good.url}/v1"),
        }
        explanation = blank()
        chain = FallbackChain(FallbackConfig(timeout_ms=100, fallback_order=("silent", "good")))
        response = await chain.execute_with_fallback("full", fleet, ASK, explanation)
        for adapter in fleet.values():
            await adapter.aclose()
    assert response.content == "Hi."
    assert [one.fault for one in explanation.attempts] == ["overloaded", "timeout", ""]


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in (Fault.CANCELLED, Fault.DEADLINE)])
@pytest.mark.parametrize("promote", [True, False])
async def test_chain_and_pipeline_try_the_same(fault: Fault, promote: bool) -> None:
    """For every fault the chain makes the attempts that `execute.fallback` makes: one rule, not two."""
    fleet = adapters(a=FakeReply(fail=fault), b=FakeReply())
    with_chain = blank()
    chain = FallbackChain(FallbackConfig(promote_on_timeout=promote, fallback_order=("b",)))
    try:
        await chain.execute_with_fallback("a", fleet, ASK, with_chain)
    except AttemptsExhaustedError as error:
        of_chain: Any = (error.status, error.code)
    else:
        of_chain = "answered"
    assert (of_chain, [one.model for one in with_chain.attempts]) == await _by_pipeline(fleet, promote=promote)


async def _by_pipeline(fleet: Mapping[str, FakeAdapter], *, promote: bool) -> tuple[Any, list[str]]:
    tried: list[str] = []

    async def attempt(candidate: ModelConfig, **_: Any) -> Answer:
        tried.append(candidate.name)
        await fleet[candidate.name].chat(ASK)
        return Answer(Reply(body=b"{}"), candidate)

    models = [ModelConfig(name=name, endpoint=f"http://{name}") for name in fleet]
    ctx = RoutingContext(request=RouteRequest(body={}), candidates=())
    try:
        await Fallback(promote_on_timeout=promote).execute(ctx, Ranking(models, [1.0, 1.0]), attempt)
    except AttemptsExhaustedError as error:
        return (error.status, error.code), tried
    return "answered", tried


class TestEscalation:
    """The page's example, and what a scorer makes of answers."""

    async def test_the_first_answer_that_is_trusted_is_given(self) -> None:
        """A model that does not know is passed over; nobody after the one that does is asked."""
        fleet = adapters(small=FakeReply(text="I don't know."), large=FakeReply(text="Paris."), cloud=FakeReply())
        escalation = EscalationChain(chain=["small", "large", "cloud"], confidence_threshold=0.7)
        response, used_model = await escalation.execute_with_escalation(adapters=fleet, request=ASK)
        assert (response.content, used_model) == ("Paris.", "large")
        assert not fleet["cloud"].calls

    async def test_token_probabilities_are_asked_for_and_count(self) -> None:
        """An answer whose words are fine, and whose model was not sure of them; the request itself may say no."""
        unsure, sure = FakeReply(text="Rome.", token_probability=0.4), FakeReply(text="Paris.", token_probability=0.9)
        chain = EscalationChain(["small", "large"])
        assert (await chain.execute_with_escalation(adapters(small=unsure, large=sure), ASK))[1] == "large"
        ask = ChatRequest(ASK.messages, extra={"logprobs": False})
        assert (await chain.execute_with_escalation(adapters(small=unsure, large=sure), ask))[1] == "small"

    async def test_a_model_that_refuses_to_tell_them_is_asked_without(self) -> None:
        """Its answer counts by its words, and the refusal is paid for once."""
        said = {"seen": 0}

        def script(call: Call) -> FakeReply:
            said["seen"] += 1
            return FakeReply(fail=Fault.BAD_REQUEST) if "logprobs" in call.body else FakeReply(text="Paris.")

        fleet = {"small": FakeAdapter(endpoint="http://small", model_id="small", script=script)}
        chain = EscalationChain(["small"])
        for seen in (2, 3):
            assert (await chain.execute_with_escalation(fleet, ASK))[0].content == "Paris."
            assert said["seen"] == seen

    async def test_a_scorer_of_ones_own_gets_what_was_asked_for(self) -> None:
        """Nothing is added to the request for it."""
        fleet = adapters(small=FakeReply())
        await EscalationChain(["small"]).execute_with_escalation(fleet, ASK, lambda response: 1.0)
        assert "logprobs" not in fleet["small"].calls[0].body

    @pytest.mark.parametrize(("scores", "given"), [((0.5, 0.6), "b"), ((0.6, 0.5), "a"), ((0.5, 0.5), "b")])
    async def test_if_none_is_trusted_the_best_is_given(self, scores: tuple[float, float], given: str) -> None:
        """Of equals the later one, whom the chain holds to be the better model; the scorer may be async."""
        by_model = dict(zip(("a", "b"), scores, strict=True))

        async def scorer(response: ChatResponse) -> float:
            return by_model[response.model]

        chain = EscalationChain(["a", "b"])
        fleet = adapters(a=FakeReply(), b=FakeReply())
        assert (await chain.execute_with_escalation(fleet, ASK, scorer))[1] == given

    async def test_a_failure_moves_on_and_costs_no_answer(self) -> None:
        """Whoever answered before is given if those after it fail."""
        fleet = adapters(a=FakeReply(fail=Fault.CONNECT), b=FakeReply(text=""), c=FakeReply(fail=Fault.OVERLOADED))
        response, name = await EscalationChain(["a", "b", "c"]).execute_with_escalation(fleet, ASK)
        assert (response.content, name) == ("", "b")
        with pytest.raises(AttemptsExhaustedError, match="c did not answer after 2 attempts"):
            await EscalationChain(["a", "c"]).execute_with_escalation(fleet, ASK)

    def test_a_chain_of_nobody_is_refused(self) -> None:
        """And a threshold that is none."""
        with pytest.raises(ValueError, match="chain"):
            EscalationChain([])
        with pytest.raises(ValueError, match="confidence_threshold"):
            EscalationChain(["a"], 1.5)
