"""The replay's driver: the live router on a virtual clock, before simulated engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.adapters.base import EngineLoad
from kvfleet.config.expand import expand
from kvfleet.config.overload import OverloadConfig
from kvfleet.config.schema import AliasConfig, FallbackConfig, GatewayConfig, StageConfig, TelemetryConfig
from kvfleet.config.simulation import EngineOptions, SimulatedFleet
from kvfleet.plugin.contract import Kind, RouteRequest
from kvfleet.replay.fleet import spec_of
from kvfleet.replay.traces import RequestTrace, TracedRequest
from kvfleet.replay.virtual import VirtualLoop
from kvfleet.runtime import Dispatch
from kvfleet.sim.engine import Engine
from kvfleet.sim.events import Event, Finished, FirstToken, Job
from kvfleet.telemetry.load import FleetLoad
from tests.replay.fleets import fleet, replayed, sessions, shared_prefix


def test_every_request_is_answered_and_nothing_is_left_behind() -> None:
    """What was sent is finished; no request stays in an engine or in the books of load."""
    run = replayed(shared_prefix())
    result = run.run()
    assert [one.error for one in result.served] == [""] * 200
    assert [one.output_tokens for one in result.served] == [one.output_tokens for one in result.trace.requests]
    books = [run.router.services.load.of(replica) for replica in result.replicas]
    assert [(book.in_flight, len(book.open), len(book.prefilling)) for book in books if book] == [(0, 0, 0)] * 4
    reserved = [amount for book in books if book for amount in (book.queued_tokens, book.held_tokens)]
    assert reserved == pytest.approx([0.0] * 8, abs=1e-6)
    assert [(host.engine.load().running, host.engine.load().waiting) for host in run.hosts.values()] == [(0, 0)] * 4


@pytest.mark.parametrize("strategy", ["hybrid_score", "random", "thompson_sampling"])
def test_a_seed_decides_everything(strategy: str) -> None:
    """Two replays with one seed are equal to the last digit."""
    trace = shared_prefix()
    one, other = (replayed(trace, fleet(strategy=strategy), seed=7).run() for _ in range(2))
    assert one.served == other.served


def test_another_seed_decides_otherwise() -> None:
    """The seed reaches the strategies."""
    trace = shared_prefix()
    one, other = (replayed(trace, fleet(strategy="random"), seed=seed).run() for seed in (1, 2))
    assert [s.replica for s in one.served] != [s.replica for s in other.served]


def test_the_decisions_are_those_that_the_router_simulates_in_the_same_state() -> None:
    """Just before each request is sent, `simulate` names the replica that then answers it."""
    run = replayed(shared_prefix(120, rate_per_s=200.0), fleet(strategy="hybrid_score"))
    foreseen: list[str] = []
    dispatch = run.router.dispatch

    async def foresee(request: RouteRequest, **options: Any) -> Dispatch:
        request = attrs.evolve(request, seed=3)
        foreseen.append((await run.router.simulate_request(request)).selected_replica)
        return await dispatch(request, **options)

    run.router.dispatch = foresee  # type: ignore[method-assign]
    result = run.run()
    assert foreseen == [one.replica for one in result.served]
    assert len(set(foreseen)) == 4


def test_one_request_takes_exactly_as_long_as_in_the_engine_alone() -> None:
    """Router and adapters add no time, and take none away."""
    options = EngineOptions(preset="a100-8b")
    request = TracedRequest(at_s=0.0, prompt_tokens=5000, output_tokens=50, blocks=tuple(range(9)))
    trace = RequestTrace(name="one", block_tokens=512, requests=(request,))
    served = replayed(trace, fleet(1), fleet=SimulatedFleet(default=options)).run().served[0]
    engine = Engine(spec_of(options, 512))
    engine.submit(Job(request.blocks, 5000, 50), 0.0)
    times = {type(event): event.at_s for event in engine.advance(1000.0)}
    assert (served.ttft_s, served.end_s) == pytest.approx((times[FirstToken], times[Finished]))


def test_a_repeated_prompt_is_found_in_the_cache_of_the_replica_that_has_it() -> None:
    """Affinity learns from what the engine reports, as it does live."""
    request = TracedRequest(at_s=0.0, prompt_tokens=5120, output_tokens=5, blocks=tuple(range(1, 11)))
    again = TracedRequest(at_s=60.0, prompt_tokens=5120, output_tokens=5, blocks=tuple(range(1, 11)))
    trace = RequestTrace(name="two", block_tokens=512, requests=(request, again))
    first, second = replayed(trace).run().served
    assert second.replica == first.replica
    assert (first.cached_tokens, second.cached_tokens) == (0, 4608)  # the last block is computed for the first token
    assert second.ttft_s < first.ttft_s / 3


def test_in_a_closed_loop_a_turn_waits_for_the_answer_before_it_and_its_think_time() -> None:
    """And the first turn of each conversation comes at its own time."""
    trace = sessions()
    result = replayed(trace).run()
    assert result.is_closed_loop
    ended: dict[str, float] = {}
    for asked, got in sorted(zip(trace.requests, result.served, strict=True), key=lambda pair: pair[1].at_s):
        due_s = asked.at_s if asked.think_s is None else ended[asked.session] + asked.think_s
        assert got.at_s == pytest.approx(due_s)
        ended[asked.session] = got.end_s


def test_in_an_open_loop_everything_is_sent_at_its_time_however_slow_the_engines() -> None:
    """Twice the speed is half the time."""
    trace = sessions()
    slow = SimulatedFleet(default=EngineOptions(preset="l4-8b"))
    result = replayed(trace, fleet=slow, is_closed_loop=False, speed=2.0).run()
    assert not result.is_closed_loop
    assert [one.at_s for one in result.served] == pytest.approx([one.at_s / 2 for one in trace.requests])


def test_time_limits_and_retries_are_those_of_a_live_route() -> None:
    """An engine too slow for the pipeline's patience loses its request to another one, and is told to stop."""
    engines = {"http://engine-0:8000": EngineOptions(speed=0.001)}
    config = fleet(2, "round_robin", fallback=FallbackConfig(timeout_ms=2000))
    run = replayed(shared_prefix(20, rate_per_s=1.0), config, fleet=SimulatedFleet(engines=engines))
    result = run.run()
    assert {one.replica for one in result.served} == {"m@http://engine-1:8000"}
    late = [one for one in result.served if one.attempts == 2]
    assert late
    assert all(one.ttft_s > 2.0 for one in late)
    assert run.router.services.health.breaker_state("http://engine-0:8000") == "open"
    assert run.hosts["m@http://engine-0:8000"].engine.load().running == 0


def test_a_request_that_nobody_can_take_fails_with_its_reason() -> None:
    """A prompt longer than every context is refused by the engine, and told."""
    trace = RequestTrace(
        name="long", block_tokens=512, requests=(TracedRequest(at_s=0.0, prompt_tokens=300_000, output_tokens=5),)
    )
    served = replayed(trace).run().served[0]
    assert (served.error, served.replica, served.first_s) == ("context_length_exceeded", "", None)


def test_stages_that_need_a_text_are_left_out_and_named() -> None:
    """What only keeps records does not run either, but is not missed."""
    config = fleet(semantic_cache=fleet().semantic_cache.__class__(enabled=True))
    assert replayed(shared_prefix(5), config).run().left_out == ("answer.semantic_cache",)


def test_an_executor_that_judges_texts_gives_way_to_one_that_does_not() -> None:
    """The request is answered by the first choice."""
    uses = ("classify.prompt", "select.random", "execute.escalate")
    config = fleet(pipeline=tuple(StageConfig(use=use) for use in uses))
    result = replayed(shared_prefix(5), config).run()
    assert result.left_out == ("execute.escalate",)
    assert [(one.error, one.attempts) for one in result.served] == [("", 1)] * 5


@pytest.mark.parametrize(
    "strategy", ["round_robin", "random", "least_requests", "power_of_two", "consistent_hash", "session"]
)
@pytest.mark.parametrize("tells", [False, True])
def test_who_has_a_prompt_is_not_found_out_if_nobody_asks(strategy: str, *, tells: bool) -> None:
    """A pipeline that is written out finds it out all the same, and nothing else comes of it."""
    config = fleet(4, strategy)
    whole = attrs.evolve(config, pipeline=expand(config))
    lean, full = (replayed(sessions(10), one, tells=tells, seed=5) for one in (config, whole))
    assert not any(stage.kind is Kind.AFFINITY for stage in lean.router.pipeline.stages)
    assert any(stage.kind is Kind.AFFINITY for stage in full.router.pipeline.stages)
    assert lean.run().served == full.run().served


def test_who_has_a_prompt_is_found_out_for_whoever_may_ask() -> None:
    """A strategy that does, a tenant's strategy that does, and a queue that knows how long prompts take."""
    alias = fleet(aliases={"fast": AliasConfig(strategy="expected_latency")}, strategy="random")
    queue = fleet(2, "random", overload=OverloadConfig(max_in_flight_per_replica=4))
    for config in (fleet(2, "block_cost"), alias, queue):
        stages = replayed(sessions(1), config).router.pipeline.stages
        assert any(stage.kind is Kind.AFFINITY for stage in stages)


def test_admission_refuses_as_it_does_live() -> None:
    """A full gateway says so at once, and what it let in is released again."""
    config = fleet(2, gateway=GatewayConfig(max_concurrent=3))
    trace = RequestTrace.of("crowd", 64, [TracedRequest(at_s=0.0, prompt_tokens=100, output_tokens=9)] * 5)
    late = RequestTrace.of("late", 64, [*trace.requests, TracedRequest(at_s=60, prompt_tokens=100, output_tokens=9)])
    served = replayed(late, config).run().served
    assert [one.error for one in served] == ["", "", "", "rate_limit_exceeded", "rate_limit_exceeded", ""]
    assert [one.attempts for one in served] == [1, 1, 1, 0, 0, 1]


@settings(max_examples=15, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=20),
    sizes=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 300)), min_size=20, max_size=20),
    cache_tokens=st.sampled_from([16_384, 65_536]),
)
def test_whatever_comes_is_finished(gaps: list[float], sizes: list[tuple[int, int]], cache_tokens: int) -> None:
    """No pattern of arrivals and sizes loses a request, preemptions in small caches included."""
    at_s, requests = 0.0, []
    for gap, (prompt, output) in zip(gaps, sizes, strict=False):
        at_s += gap
        blocks = tuple(1000 * (prompt % 3) + i for i in range(prompt // 64))
        requests.append(TracedRequest(at_s=at_s, prompt_tokens=prompt, output_tokens=output, blocks=blocks))
    trace = RequestTrace.of("any", 64, requests)
    small = SimulatedFleet(default=EngineOptions(cache_tokens=cache_tokens))
    run = replayed(trace, fleet(2), fleet=small)
    result = run.run()
    assert [(one.error, one.output_tokens) for one in result.served] == [
        ("", one.output_tokens) for one in trace.requests
    ]
    assert sum(run.router.services.load.in_flight(model.id) for model in run.router.models) == 0


def test_an_error_in_a_timer_ends_the_replay() -> None:
    """Nothing goes on as if an engine had not broken."""

    class Broken(Engine):
        def advance(self, now_s: float) -> list[Event]:
            raise ZeroDivisionError

    run = replayed(shared_prefix(10))
    for host in run.hosts.values():
        host.engine = Broken(host.engine.spec)
    with pytest.raises(ZeroDivisionError):
        run.run()


def test_hours_pass_in_no_time() -> None:
    """The loop jumps to what is due next."""
    trace = shared_prefix(3)
    config = fleet()
    run = replayed(trace, config)
    with asyncio.Runner(loop_factory=partial(VirtualLoop, run.clock)) as runner:
        runner.run(asyncio.sleep(86_400))
    assert run.clock.now_s() == pytest.approx(87_400)


def test_engines_tell_their_load_as_often_as_a_gateway_asks() -> None:
    """Each in its turn, by the configuration's interval."""
    config = fleet(2, telemetry=TelemetryConfig(load_poll_interval_seconds=2.0))
    trace = RequestTrace.of("two", 64, [TracedRequest(at_s=at_s, prompt_tokens=10, output_tokens=1) for at_s in (0, 9)])
    run = replayed(trace, config)
    told: list[tuple[float, str]] = []
    report = run.router.services.load.report

    def listen(endpoint: str, load: EngineLoad, now_s: float) -> None:
        told.append((now_s - 1000.0, endpoint[-6:-5]))
        report(endpoint, load, now_s)

    run.router.services.load = _Listening(run.router.services.load, listen)  # type: ignore[assignment]
    run.run()
    assert told == [(pytest.approx(float(i)), str(i % 2)) for i in range(10)]


class _Listening:
    """A fleet's load that somebody listens to."""

    def __init__(self, load: FleetLoad, report: Callable[[str, EngineLoad, float], None]) -> None:
        self.load, self.report = load, report

    def __getattr__(self, name: str) -> Any:
        return getattr(self.load, name)


@pytest.mark.parametrize("asks_for_it", [False, True])
def test_scores_are_computed_as_they_are_live(*, asks_for_it: bool) -> None:
    """Those that the strategy reads, or all if the file has a `pipeline:` that asks for them."""
    config = fleet(strategy="expected_latency")
    if asks_for_it:
        config = attrs.evolve(config, pipeline=expand(config))
    pipeline = replayed(shared_prefix(4), config).router.pipeline
    planned = pipeline.plan(pipeline.select, dict.fromkeys(Kind, (len, False)))
    scores = [stage.name for _, stage, _ in planned if stage.kind is Kind.SCORE]
    assert (scores == ["latency"]) is not asks_for_it
    assert "latency" in scores
