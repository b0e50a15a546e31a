"""Fallback & Retry Chains."""

from __future__ import annotations

from kvfleet.errors import Fault
from kvfleet.testing.fakes import FakeReply
from tests.page.fleets import QUICKSTART
from tests.page.living import live, question
from tests.page.printed import fleet

SECTION = """\
fallback:
  enabled: true
  max_attempts: 3
  timeout_ms: 10000
  promote_on_timeout: true
  fallback_order: [llama-3-8b, llama-3-70b, gpt-4o-fallback]
"""

PUBLIC = {"X_KVFleet_Data_Class": "public"}


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
