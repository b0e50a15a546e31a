"""Fallback & Retry Chains."""

from __future__ import annotations

from kvfleet.adapters.base import ChatMessage, ChatRequest
from kvfleet.errors import Fault
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Span, Trace
from tests.page.fleets import QUICKSTART
from tests.page.living import live, question
from tests.page.printed import fleet, run

SECTION = """\
fallback:
  enabled: true
  max_attempts: 3
  timeout_ms: 10000
  promote_on_timeout: true
  fallback_order: [llama-3-8b, llama-3-70b, gpt-4o-fallback]
"""

EXAMPLE = """
from kvfleet.router.fallback import FallbackChain, EscalationChain
from kvfleet.config.schema import FallbackConfig

# Automatic fallback on failure
chain = FallbackChain(FallbackConfig(
    enabled=True,
    max_attempts=3,
    timeout_ms=5000,
    fallback_order=["fast-model", "strong-model", "cloud-fallback"],
))

# Confidence-based escalation
escalation = EscalationChain(
    chain=["llama-8b", "llama-70b", "gpt-4o"],
    confidence_threshold=0.7,
)
response, used_model = await escalation.execute_with_escalation(
    adapters=adapters,
    request=request,
)
"""

PUBLIC = {"X_KVFleet_Data_Class": "public"}


REQUEST = ChatRequest([ChatMessage("user", "What is it?")])


def says(**texts: str | Fault) -> dict[str, FakeAdapter]:
    """An adapter for each model, that says this or fails so."""
    replies = {
        name: FakeReply(fail=one) if isinstance(one, Fault) else FakeReply(text=one) for name, one in texts.items()
    }
    return {name.replace("_", "-"): FakeAdapter(model_id=name, script=reply) for name, reply in replies.items()}


async def test_an_answer_that_cannot_be_trusted_escalates() -> None:
    """The first model says nothing, the second refuses, the third answers; each was asked once."""
    adapters = says(
        llama_8b="", llama_70b="I'm sorry, but I can't help with that.", gpt_4o="It is forty-two, as computed."
    )
    ran = await run(EXAMPLE, adapters=adapters, request=REQUEST)
    assert (ran["used_model"], ran["response"].content) == ("gpt-4o", "It is forty-two, as computed.")
    assert [len(adapter.calls) for adapter in adapters.values()] == [1, 1, 1]


async def test_an_answer_that_can_be_trusted_stays() -> None:
    """Nobody dearer is asked."""
    adapters = says(llama_8b="It is forty-two, as computed.", llama_70b="No.", gpt_4o="No.")
    ran = await run(EXAMPLE, adapters=adapters, request=REQUEST)
    assert ran["used_model"] == "llama-8b"
    assert [len(adapter.calls) for adapter in adapters.values()] == [1, 0, 0]


async def test_the_chain_falls_back_on_failure() -> None:
    """The page makes it and asks nobody; asked, it goes along its order, and the explanation has the way."""
    trusted = says(llama_8b="It is forty-two, as computed.")
    chain = (await run(EXAMPLE, adapters=trusted, request=REQUEST))["chain"]
    adapters = says(fast_model=Fault.SERVER_ERROR, strong_model=Fault.OVERLOADED, cloud_fallback="Here.")
    explanation = Explanation(Trace("0" * 32, [Span("kvfleet.route", 0)]))
    response = await chain.execute_with_fallback("fast-model", adapters, REQUEST, explanation)
    assert response.content == "Here."
    assert [(attempt.model, attempt.fault) for attempt in explanation.attempts] == [
        ("fast-model", "server_error"),
        ("strong-model", "overloaded"),
        ("cloud-fallback", ""),
    ]
    assert explanation.served_by == "cloud-fallback"


async def test_live_requests_fall_back_in_the_order_given() -> None:
    """From the first choice along the list, and the trace tells the path and each fault."""
    scripts = {
        "llama-3-8b": FakeReply(fail=Fault.SERVER_ERROR),
        "llama-3-70b": FakeReply(fail=Fault.OVERLOADED),
        "gpt-4o-fallback": FakeReply(text="At your service."),
    }
    async with live(fleet(QUICKSTART, SECTION), scripts=scripts) as gateway:
        assert await gateway.served(**PUBLIC) == "gpt-4o-fallback"
        told = [(attempt.model, attempt.fault) for attempt in gateway.last.attempts]
        assert told == [("llama-3-8b", "server_error"), ("llama-3-70b", "overloaded"), ("gpt-4o-fallback", "")]
        assert gateway.last.to_dict()["fallback_chain"] == ["llama-3-8b", "llama-3-70b", "gpt-4o-fallback"]


async def test_a_timeout_promotes_the_next_one() -> None:
    """A stream whose first token takes longer than `timeout_ms` is given to the next model; without the switch, to none."""
    scripts = {"llama-3-8b": FakeReply(latency_s=11.0)}
    stays = "fallback: {promote_on_timeout: false}\n"
    async with live(fleet(QUICKSTART, SECTION), scripts=scripts) as gateway:
        await gateway.ask(question(stream=True))
        assert [(attempt.model, attempt.fault) for attempt in gateway.last.attempts] == [("llama-3-8b", "timeout"), ("llama-3-70b", "")]  # fmt: skip
    async with live(fleet(QUICKSTART, SECTION, stays), scripts=scripts) as gateway:
        assert (await gateway.ask(question(stream=True))).status_code == 504
        assert len(gateway.last.attempts) == 1


async def test_no_more_than_max_attempts_are_made() -> None:
    """However many models there are; and with `enabled: false` one."""
    broken = dict.fromkeys(("llama-3-8b", "llama-3-70b", "gpt-4o-fallback"), FakeReply(fail=Fault.SERVER_ERROR))
    for more, count in (("fallback: {max_attempts: 2}\n", 2), ("fallback: {enabled: false}\n", 1)):
        async with live(fleet(QUICKSTART, SECTION, more), scripts=broken) as gateway:
            assert (await gateway.ask(**PUBLIC)).status_code == 502
            assert len(gateway.last.attempts) == count
