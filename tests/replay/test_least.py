"""What no router can be below."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.config.simulation import EngineOptions, SimulatedFleet
from kvfleet.replay.generate import AgentSessions, Bursts, SharedPrefix
from kvfleet.replay.least import least_ttft_s
from kvfleet.replay.measures import figures
from kvfleet.replay.slo import SLO
from kvfleet.replay.traces import RequestTrace, TracedRequest
from kvfleet.sim.spec import EngineSpec
from tests.replay.fleets import fleet, replayed

SPEC = EngineSpec(token_budget=256, block_tokens=10, step_s=0.04, prefill_s_per_token=0.001)
MADE = {
    "shared": SharedPrefix(requests=40, prompts=4),
    "agents": AgentSessions(sessions=6, turns=4, agents=2),
    "bursts": Bursts(requests=40),
}


def asked(at_s: float, *blocks: int, tokens: int = 0, session: str = "", answer: tuple[int, ...] = ()) -> TracedRequest:
    """A request of whole blocks, and an end of its own."""
    size = tokens or 10 * len(blocks) + 5
    think_s = 1.0 if session and at_s else None
    return TracedRequest(
        at_s=at_s, prompt_tokens=size, output_tokens=5, blocks=blocks, answer_blocks=answer, session=session,
        think_s=think_s,
    )  # fmt: skip


def least(*requests: TracedRequest, waits: bool = False) -> list[float]:
    """In milliseconds."""
    found = least_ttft_s(RequestTrace.of("t", 10, requests), [SPEC], waits=waits)
    return [round(1000 * one) for one in found]


def test_what_was_asked_or_answered_before_is_there_and_the_rest_takes_an_idle_engine_its_steps() -> None:
    """Two steps for more than the budget; of a prompt that is known wholly, the last block is computed."""
    long = tuple(range(100, 130))
    assert least(asked(0, 1, 2, answer=(3,)), asked(1, 1, 2, 3, 4), asked(2, 1, 9)) == [65, 55, 55]
    assert least(asked(0, *long), asked(1, *long, tokens=300)) == [80 + 305, 50]


def test_the_fastest_engine_counts() -> None:
    """Whoever gets the request: nobody is faster."""
    trace = RequestTrace.of("t", 10, [asked(0, 1)])
    fast = EngineSpec(token_budget=256, block_tokens=10, step_s=0.04, prefill_s_per_token=0.001, speed=2.0)
    assert least_ttft_s(trace, [SPEC, fast], waits=False) == [pytest.approx(0.0275)]


def test_where_turns_wait_another_session_may_always_have_been_first() -> None:
    """In a closed loop the order depends on the router; in an open one the trace gives it."""
    first, later = asked(0, 1, 2, session="a"), asked(1, 1, 3, session="b")
    assert least(first, later) == [65, 55]
    assert least(first, later, waits=True) == [55, 55]


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=4)
@given(
    strategy=st.sampled_from(["expected_latency", "round_robin", "prefix_threshold"]),
    speed=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 99),
    is_closed_loop=st.booleans(),
)
def test_nobody_begins_sooner(name: str, strategy: str, speed: float, seed: int, *, is_closed_loop: bool) -> None:
    """Whatever the traffic and whoever routes."""
    trace = MADE[name].generate(seed)
    engines = SimulatedFleet(default=EngineOptions(), engines={"http://engine-0:8000": EngineOptions(speed=0.5)})
    options = {"fleet": engines, "seed": seed, "speed": speed, "is_closed_loop": is_closed_loop}
    result = replayed(trace, fleet(strategy=strategy), **options).run()
    assert all(one.ttft_s > one.least_ttft_s - 1e-9 for one in result.served if one.is_whole)
    found = figures(result.served, result.replicas, SLO())
    assert 0 < found["least_ttft_mean"] < found["ttft_mean"]
