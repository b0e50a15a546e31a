"""Canaries: who gets them, when they grow, and when they go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.call import Usage
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FleetConfig, ModelConfig, StageConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.errors import ComponentError, ConfigError, Fault
from kvfleet.gateway.server import running
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Outcome
from kvfleet.router.arms import ArmStore
from kvfleet.router.canary import Arm, CanaryStatus, CanaryStrategy
from kvfleet.router.scoring import ScoringContext
from kvfleet.runtime import Router
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Span, SpanKind, Status, Trace
from tests.builtin.making import context, model, outcome

OLD, NEW = model("old", quality_score=0.9), model("new")
MODELS = (OLD, NEW)


def canary(
    clock: FrozenClock | None = None, state: Path | None = None, fleet: str = "default", **options: Any
) -> CanaryStrategy:
    """A canary with quick steps."""
    options = {"canary": "new", "steps": (0.1, 0.5, 1.0), "min_requests": 20, "hold_s": 60, **options}
    strategy = CanaryStrategy(**options)
    metrics = MetricsExporter(enabled=True)
    strategy.provision(Services(clock=clock or FrozenClock(), fleet=fleet, state_dir=state, metrics=metrics))
    return strategy


def call(target: ModelConfig, took_ms: float, fault: str = "") -> Span:
    """One attempt."""
    attributes = {names.ATTEMPT: 1, names.REPLICA: target.id, names.MODEL: target.name}
    span = Span("chat", 0, round(took_ms * 1e6), dict(attributes), kind=SpanKind.CLIENT)
    if fault:
        span.attributes[names.ERROR_TYPE] = fault
        span.status = Status.ERROR
    return span


def went(*calls: Span, served: ModelConfig | None) -> Outcome:
    """A route with these calls."""
    return outcome(context(MODELS), served, usage=Usage(1, 1), spans=[Span("kvfleet.route", 0), *calls])


async def tell(strategy: CanaryStrategy, target: ModelConfig, count: int, *, took_ms: float = 100.0) -> None:
    """So many answers."""
    for _ in range(count):
        await strategy.observe(went(call(target, took_ms), served=target))


async def fail(strategy: CanaryStrategy, target: ModelConfig, count: int, fault: str = Fault.SERVER_ERROR) -> None:
    """So many failures, each saved by the other model."""
    other = OLD if target is NEW else NEW
    for _ in range(count):
        await strategy.observe(went(call(target, 5, fault), call(other, 100.0), served=other))


def first(strategy: CanaryStrategy, **about: Any) -> str:
    """Who is ranked first."""
    return strategy.select(MODELS, ScoringContext(**about)).models[0].name


def chosen(strategy: CanaryStrategy, callers: Sequence[str]) -> set[str]:
    """The sessions that get the canary."""
    return {caller for caller in callers if first(strategy, session=caller) == "new"}


CALLERS = [f"session {i}" for i in range(2000)]


class TestSplit:
    """Who gets it."""

    def test_the_share_is_right(self) -> None:
        """About a tenth of the callers, and of requests without one."""
        assert 140 < len(chosen(canary(), CALLERS)) < 260
        assert 140 < sum(first(canary(), seed=seed) == "new" for seed in range(2000)) < 260

    @given(st.text(max_size=10), st.integers(0, 2**32))
    def test_a_caller_keeps_to_its_side(self, session: str, seed: int) -> None:
        """Whatever the seed."""
        if session:
            strategy = canary(steps=(0.5,))
            assert first(strategy, session=session, seed=seed) == first(strategy, session=session, seed=1)

    def test_it_sticks_by_what_was_asked_for(self) -> None:
        """A tenant's sessions are all on one side; by nothing, a session may change its side."""
        by_tenant = canary(sticky="tenant", steps=(0.5,))
        assert len({first(by_tenant, tenant_id="t", session=one) for one in CALLERS[:50]}) == 1
        by_none = canary(sticky="none", steps=(0.5,))
        assert len({first(by_none, session="s", seed=seed) for seed in range(50)}) == 2

    def test_who_has_it_keeps_it_as_it_grows(self) -> None:
        """Every step only adds callers."""
        strategy = canary()
        before = chosen(strategy, CALLERS)
        strategy.step = 1
        assert before < chosen(strategy, CALLERS)
        strategy.step = 2
        assert len(chosen(strategy, CALLERS)) == len(CALLERS)

    def test_another_salt_draws_others(self) -> None:
        """So two experiments do not have the same guinea pigs."""
        assert chosen(canary(salt="a"), CALLERS) != chosen(canary(salt="b"), CALLERS)

    def test_the_others_are_fallbacks_and_the_decision_says_which_side(self) -> None:
        """All candidates are ranked, the others by the weighted score."""
        for share, side in ((1.0, ["new", "old"]), (0.000001, ["old", "new"])):
            ranking = canary(steps=(share,)).select(MODELS, ScoringContext(seed=1))
            assert [m.name for m in ranking.models] == side
            assert ranking.mode == ("canary at 100%" if share == 1 else "baseline at 0%")

    @pytest.mark.parametrize("models", [(OLD,), (NEW,)])
    def test_with_one_side_alone_there_is_no_choice(self, models: tuple[ModelConfig, ...]) -> None:
        """As when a filter dropped the other, or a caller asked for it by name; also after a rollback."""
        strategy = canary()
        strategy.status = CanaryStatus.ROLLED_BACK
        ranking = strategy.select(models)
        assert (ranking.models, ranking.mode) == (models, "no choice")

    @pytest.mark.parametrize("steps", [(0.5, 0.1), (0.0,), (1.5,)])
    def test_steps_must_climb(self, steps: tuple[float, ...]) -> None:
        """From above 0 to 1 at most."""
        with pytest.raises(ValueError, match="steps must be"):
            CanaryStrategy(canary="new", steps=steps)

    def test_it_needs_a_canary(self) -> None:
        """A fleet file without one, or with one that does not exist, is refused."""
        for options in ({"steps": [0.1]}, {"canary": "nobody"}):
            with pytest.raises(ConfigError):
                Router(fleet(options), polls=False)


class TestGuards:
    """When it goes."""

    async def test_failures_take_it_out(self) -> None:
        """As soon as both sides have enough; then it is not even a fallback."""
        strategy = canary()
        await tell(strategy, OLD, 20)
        await fail(strategy, NEW, 19)
        assert strategy.share == 0.1
        await fail(strategy, NEW, 1)
        assert (strategy.status, strategy.share) == (CanaryStatus.ROLLED_BACK, 0.0)
        assert [m.name for m in strategy.select(MODELS).models] == ["old"]
        assert "100.0% of its calls fail" in strategy.reason

    async def test_slow_answers_take_it_out(self) -> None:
        """Half as slow again at the 95th percentile is too much."""
        strategy = canary()
        await tell(strategy, OLD, 20, took_ms=100)
        await tell(strategy, NEW, 20, took_ms=151)
        assert strategy.status is CanaryStatus.ROLLED_BACK

    async def test_what_the_others_suffer_too_is_no_fault_of_its(self) -> None:
        """It is compared, not judged."""
        clock = FrozenClock()
        strategy = canary(clock)
        for target in (OLD, NEW):
            for _ in range(20):
                await strategy.observe(went(call(target, 900), served=target))
                await strategy.observe(went(call(target, 5, Fault.SERVER_ERROR), served=None))
        assert strategy.status is CanaryStatus.RUNNING

    async def test_one_failure_among_few_is_no_proof(self) -> None:
        """It is neither taken out nor promoted."""
        clock = FrozenClock()
        strategy = canary(clock)
        await tell(strategy, OLD, 30)
        await fail(strategy, NEW, 1)
        clock.advance(100)
        await tell(strategy, NEW, 20)
        assert (strategy.status, strategy.step) == (CanaryStatus.RUNNING, 0)

    async def test_the_caller_s_own_faults_do_not_count(self) -> None:
        """Nor do clients that left."""
        strategy = canary()
        await tell(strategy, OLD, 30)
        for fault in (Fault.CANCELLED, Fault.BAD_REQUEST):
            await strategy.observe(went(call(NEW, 5, fault), served=None))
        assert strategy.state()["own"]["requests"] == 0


class TestGrowth:
    """When it grows."""

    async def test_step_by_step_to_the_end(self) -> None:
        """Each step needs answers on both sides and its time; at all of the traffic, what was known counts on."""
        clock = FrozenClock()
        strategy = canary(clock)
        shares = []
        for _ in range(3):
            shares.append(strategy.share)
            if strategy.share < 1:
                await tell(strategy, OLD, 20)
            await tell(strategy, NEW, 20)
            assert strategy.share == shares[-1]
            clock.advance(60)
            await tell(strategy, NEW, 1)
        assert shares == [0.1, 0.5, 1.0]
        assert (strategy.status, strategy.share) == (CanaryStatus.PROMOTED, 1.0)

    async def test_it_can_still_fail_at_the_last_step(self) -> None:
        """Against what the others did before."""
        clock = FrozenClock()
        strategy = canary(clock, steps=(0.5, 1.0))
        await tell(strategy, OLD, 20)
        await tell(strategy, NEW, 19)
        clock.advance(60)
        await tell(strategy, NEW, 1)
        assert strategy.share == 1.0
        await tell(strategy, NEW, 20, took_ms=500)
        assert strategy.status is CanaryStatus.ROLLED_BACK


@given(st.lists(st.booleans(), max_size=60))
def test_the_likely_error_rate_is_never_above_the_seen_one(answers: list[bool]) -> None:
    """It is its lower bound, from 0 to 1."""
    arm = Arm()
    for ok in answers:
        arm.add(1.0 if ok else None)
    assert 0.0 <= arm.least_error_rate <= arm.error_rate + 1e-9 <= 1.0 + 1e-9


class TestKeeping:
    """Over a restart."""

    async def test_a_rollback_outlives_the_process(self, tmp_path: Path) -> None:
        """And another salt begins anew, as does another fleet."""
        one = canary(state=tmp_path)
        await one.aopen()
        await tell(one, OLD, 20)
        await fail(one, NEW, 20)
        await one.aclose()
        again = canary(state=tmp_path)
        await again.aopen()
        assert (again.status, again.reason) == (CanaryStatus.ROLLED_BACK, one.reason)
        anew = canary(state=tmp_path, salt="second try")
        await anew.aopen()
        assert anew.status is CanaryStatus.RUNNING
        elsewhere = canary(state=tmp_path, fleet="another")
        await elsewhere.aopen()
        assert elsewhere.status is CanaryStatus.RUNNING

    async def test_so_do_its_step_and_its_numbers(self, tmp_path: Path) -> None:
        """Counting goes on where it ended."""
        clock = FrozenClock()
        one = canary(clock, tmp_path)
        await one.aopen()
        await tell(one, OLD, 20)
        await tell(one, NEW, 19)
        clock.advance(60)
        await tell(one, NEW, 1)
        await tell(one, NEW, 5)
        await one.aclose()
        again = canary(clock, tmp_path)
        await again.aopen()
        assert again.state() == one.state()
        assert (again.step, again.state()["own"]["requests"]) == (1, 5)

    async def test_a_change_is_kept_at_once(self, tmp_path: Path) -> None:
        """A crash after a rollback does not bring it back."""
        one = canary(state=tmp_path)
        await one.aopen()
        await tell(one, OLD, 20)
        await fail(one, NEW, 20)
        again = canary(state=tmp_path)
        await again.aopen()
        assert again.status is CanaryStatus.ROLLED_BACK

    async def test_a_state_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        """With its place."""
        strategy = canary(state_path=str(tmp_path / "x.sqlite"))
        ArmStore(tmp_path / "x.sqlite").save("canary new ", {"new": {"status": "odd"}})
        with pytest.raises(ComponentError, match="not from this version"):
            await strategy.aopen()


class Sink:
    """Keeps finished traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


def fleet(options: dict[str, Any]) -> FleetConfig:
    """Two models under a canary."""
    uses = ("classify.prompt", "classify.modality", "filter.capabilities")
    stages = [StageConfig(use=use) for use in uses]
    stages += [StageConfig(use="select.canary", options=options), StageConfig(use="execute.fallback")]
    telemetry = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
    return FleetConfig(models=MODELS, pipeline=tuple(stages), telemetry=telemetry)


async def test_through_a_running_gateway() -> None:
    """A canary that fails is taken out by itself; no client sees an error, and the traces say which side each was on."""
    config = fleet({"canary": "new", "steps": [0.5], "min_requests": 5, "sticky": "none"})
    adapters = {
        OLD.id: FakeAdapter(model_id="old"),
        NEW.id: FakeAdapter(model_id="new", script=FakeReply(fail=Fault.SERVER_ERROR)),
    }
    sink = Sink()
    router = Router(config, adapters=adapters, sinks=(sink,), polls=False, seed=7)
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        for _ in range(60):
            answer = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
            assert answer.status_code == 200
            await serving.router.settled()
        state = serving.router.state()["stages"]["select.canary"]
        metrics = (await client.get("/metrics")).text
    assert (state["status"], state["share"]) == ("rolled_back", 0.0)
    modes = [choice.mode for trace in sink.traces if (choice := Explanation(trace).choice) is not None]
    assert {"canary at 50%", "baseline at 50%"} == set(modes[:10])
    assert set(modes[-20:]) == {"rolled back"}
    assert 'kvfleet_canary_changes_total{model="new",to="rolled_back"} 1.0' in metrics
    assert 'kvfleet_canary_requests_total{model="new",outcome="failed",side="canary"}' in metrics
