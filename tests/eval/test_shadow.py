"""Shadow traffic as a library: the sample, the comparison, its bounds."""

from __future__ import annotations

import random
import re

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.base import ChatMessage, ChatRequest, ChatResponse
from kvfleet.clock import FrozenClock
from kvfleet.errors import Fault
from kvfleet.eval.asking import ask, call_for, similarity
from kvfleet.eval.shadow import ShadowTrafficManager, is_sampled
from kvfleet.testing.fakes import FakeAdapter, FakeReply

REQUEST = ChatRequest([ChatMessage("user", "What is the sky?")])
ANSWER = ChatResponse("The sky is blue.", model="llama-8b")


def fake(text: str = "", **reply: object) -> FakeAdapter:
    """An adapter that says this."""
    return FakeAdapter(model_id="m", script=FakeReply(text=text, **reply))  # type: ignore[arg-type]


async def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is printed: a manager, a sample, a comparison, and each shadow model's time."""
    request, response, adapters = REQUEST, ANSWER, {"new-model-v2": fake("The sky is grey.")}
    shadow = ShadowTrafficManager(
        sample_rate=0.1,
        shadow_models=["new-model-v2"],
        enabled=True,
    )
    shadow.sample_rate = 1.0  # the example's tenth would make this test a lottery
    if shadow.should_shadow():
        comparison = await shadow.execute_shadow(
            request=request,
            primary_model="llama-8b",
            primary_response=response,
            adapters=adapters,
        )
        for result in comparison.shadow_results:
            print(f"{result.model}: {result.latency_ms:.0f}ms")  # noqa: T201 - the page prints it
    assert re.fullmatch(r"new-model-v2: \d+ms\n", capsys.readouterr().out)
    assert comparison.shadow_results[0].similarity == 0.75


@given(st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_the_sample_is_a_function_of_the_seed(share: float, seed: int) -> None:
    """The same seed gives the same, nothing is sampled at 0 and everything at 1, and a greater share keeps the rest."""
    assert is_sampled(seed, share) == is_sampled(seed, share)
    assert not is_sampled(seed, 0.0)
    assert is_sampled(seed, 1.0)
    assert is_sampled(seed, min(1.0, share * 2)) or not is_sampled(seed, share)


def test_the_share_is_kept() -> None:
    """A tenth of random requests is a tenth."""
    manager = ShadowTrafficManager(0.1, ["m"], random=random.Random(1))
    assert 900 < sum(manager.should_shadow() for _ in range(10_000)) < 1100


@pytest.mark.parametrize("off", [{"enabled": False}, {"shadow_models": ()}, {"sample_rate": 0.0}])
def test_nothing_is_mirrored_when_off(off: dict[str, object]) -> None:
    """Without the switch, the models or a share there is no sample."""
    options: dict[str, object] = {"sample_rate": 1.0, "shadow_models": ["m"], **off}
    assert not ShadowTrafficManager(**options).should_shadow()  # type: ignore[arg-type]


async def test_a_shadow_model_that_fails_is_a_result() -> None:
    """Faults, broken adapters and missing ones do not disturb the others."""
    manager = ShadowTrafficManager(1.0, ["down", "broken", "absent", "well"])
    broken = FakeAdapter(script=FakeReply(answer={"no": "choices"}))
    adapters = {"down": fake(fail=Fault.OVERLOADED), "broken": broken, "well": fake("Fine.")}
    comparison = await manager.execute_shadow(REQUEST, "llama-8b", ANSWER, adapters, "r-1")
    told = {result.model: bool(result.error) for result in comparison.shadow_results}
    assert told == {"down": True, "broken": True, "absent": True, "well": False}
    assert manager.stats["failed"] == 3


async def test_outputs_are_kept_only_if_wanted_and_results_are_bounded() -> None:
    """The caller gets the answers; what is kept has none without `log_outputs`, and is no more than `most_results`."""
    manager = ShadowTrafficManager(1.0, ["m"], log_outputs=False, most_results=2)
    for number in range(3):
        told = await manager.execute_shadow(REQUEST, "llama-8b", ANSWER, {"m": fake("Hi.")}, f"r-{number}")
        assert told.shadow_results[0].response is not None
    kept = manager.get_comparisons()
    assert [comparison.request_id for comparison in kept] == ["r-1", "r-2"]
    assert all(c.primary_response is None and c.shadow_results[0].response is None for c in kept)
    assert [c.request_id for c in manager.get_comparisons(limit=1)] == ["r-2"]
    manager.clear_results()
    assert manager.get_comparisons() == []


async def test_a_call_has_a_limit_of_its_own_and_is_marked() -> None:
    """A shadow model that is too slow is an error; each call says what it is, and never asks for a stream."""
    adapter = fake("late", latency_s=31.0)
    manager = ShadowTrafficManager(1.0, ["m"], timeout_s=30.0)
    stream = ChatRequest(REQUEST.messages, stream=True)
    comparison = await manager.execute_shadow(stream, "llama-8b", None, {"m": adapter})
    assert comparison.shadow_results[0].error
    assert comparison.shadow_results[0].similarity is None
    call = adapter.calls[0]
    assert ("x-kvfleet-shadow", "1") in call.headers
    assert not call.stream
    assert "stream" not in call.body


async def test_an_adapter_that_hangs_is_given_up() -> None:
    """The limit holds for the whole answer, whatever the adapter does."""

    class Hanging(FakeAdapter):
        async def send(self, call: object) -> object:  # type: ignore[override]
            await anyio.sleep_forever()

    found = await ask(Hanging(), call_for(REQUEST, timeout_s=0.001), timeout_s=0.001, clock=FrozenClock())
    assert (found.response, found.fault) == (None, "timeout")


@given(st.text(max_size=200), st.text(max_size=200))
def test_similarity_is_a_share_and_symmetric(one: str, other: str) -> None:
    """0 to 1, the same from both sides, and 1 with itself."""
    assert 0 <= similarity(one, other) <= 1
    assert similarity(one, other) == similarity(other, one)
    assert similarity(one, one) == 1
