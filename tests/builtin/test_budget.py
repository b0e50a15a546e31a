"""Budgets as stages: what is held, what is booked, and what the trace says of it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from kvfleet.adapters.call import Usage
from kvfleet.builtin.budget import BudgetAdmission, BudgetFilter, ledger_path
from kvfleet.builtin.policy import TenantFilter
from kvfleet.clock import FrozenClock
from kvfleet.config.convert import structure
from kvfleet.config.schema import BudgetConfig, FleetConfig, ModelConfig, TenantConfig
from kvfleet.errors import AdmissionError, ConfigError, Fault, RouteError
from kvfleet.pipeline.build import check
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Lease, Refusal
from kvfleet.plugin.manager import discover
from kvfleet.policy.budget import month_of, nano
from kvfleet.policy.ledger import read_month
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from tests.builtin.making import context, model, outcome, user

CHEAP = model("cheap", cost_per_1k_input_tokens=1.0, cost_per_1k_output_tokens=2.0)
DEAR = model("dear", cost_per_1k_input_tokens=10.0, cost_per_1k_output_tokens=20.0)
TALK = [user("x" * 400)]  # about 100 tokens
TABLE = discover()


def budget(**limits: Any) -> BudgetConfig:
    """An enabled budget, without the usual limit of one request."""
    return BudgetConfig(enabled=True, **{"per_request_max_usd": None, **limits})


def admission(clock: FrozenClock | None = None, *, state_dir: Path | None = None, **options: Any) -> BudgetAdmission:
    """A provisioned admission."""
    made = BudgetAdmission(**options)
    made.provision(Services(clock=clock or FrozenClock(), models=(CHEAP, DEAR), state_dir=state_dir))
    return made


async def let_in(stage: BudgetAdmission, *, tenant: str = "a", models: Any = (CHEAP, DEAR), **body: Any) -> Lease:
    """A reservation that must be there."""
    got = await stage.admit(context(models, TALK, tenant=tenant, body={"max_tokens": 100, **body}))
    assert not isinstance(got, Refusal)
    return got


async def test_the_dearest_candidate_left_is_reserved_and_the_real_cost_is_booked() -> None:
    """Cached tokens at their price; the trace says what is held."""
    stage = admission(tenants={"a": budget(monthly_budget_usd=10)})
    lease: Any = await let_in(stage)
    assert dict(lease.attributes) == {
        names.BUDGET_ACCOUNTS: ("tenant/a",),
        names.BUDGET_RESERVED_USD: 3.0,  # 100 · 0.01 + 100 · 0.02
        names.BUDGET_REMAINING_USD: 7.0,
    }
    ctx = context((CHEAP,), TALK, tenant="a")
    lease.release(outcome(ctx, CHEAP, usage=Usage(90, 10, 100, 40), cost_usd=0.11))
    (statement,) = stage.statements()
    assert statement["spent_usd"] == 0.11
    assert statement["reserved_usd"] == 0.0
    assert (statement["prompt_tokens"], statement["completion_tokens"], statement["cached_tokens"]) == (90, 10, 40)


async def test_several_answers_are_several_times_the_tokens() -> None:
    """`n` counts, and without `max_tokens` the usual length does."""
    stage = admission(tenants={"a": budget()}, answer_tokens=50)
    lease: Any = await let_in(stage, models=(CHEAP,), n=3)
    assert lease.attributes[names.BUDGET_RESERVED_USD] == pytest.approx(0.1 + 0.6)
    lease = await let_in(stage, models=(CHEAP,), max_tokens=None)
    assert lease.attributes[names.BUDGET_RESERVED_USD] == pytest.approx(0.1 + 0.1)


@pytest.mark.parametrize(
    ("served_by", "usage", "error", "spent"),
    [
        (None, None, RouteError("failed"), 0.0),
        (None, None, None, 0.0),  # answered from memory
        (CHEAP, None, RouteError("the client left"), 0.0),
        (CHEAP, Usage(100, 50), RouteError("the answer broke off"), 0.2),
        (CHEAP, None, None, 0.3),  # no tokens reported: as expected, at the price of who answered
        (model("half", cost_per_1k_input_tokens=1.0), Usage(100, 50), None, 0.15),
        (model("unknown"), Usage(100, 50), None, 0.0),
    ],
)
async def test_what_is_booked_at_the_end(
    served_by: ModelConfig | None, usage: Usage | None, error: RouteError | None, spent: float
) -> None:
    """Nothing for what failed unless its engine reported tokens; never the reservation itself."""
    stage = admission(budget=budget(monthly_budget_usd=10))
    lease = await let_in(stage)
    lease.release(outcome(context((), TALK), served_by, usage=usage, error=error))
    (statement,) = stage.statements()
    assert (statement["spent_usd"], statement["reserved_usd"]) == (pytest.approx(spent), 0.0)
    assert statement["unpriced"] == int(served_by is not None and served_by.name == "unknown")


async def test_a_tenant_is_held_to_its_own_budget_and_the_fleets() -> None:
    """One tenant's spending leaves less for all; a tenant without a budget has the fleet's."""
    stage = admission(budget=budget(monthly_budget_usd=5), tenants={"a": budget(monthly_budget_usd=4)})
    await let_in(stage)
    got = await stage.admit(context((DEAR,), TALK, tenant="b", body={"max_tokens": 100}))
    assert isinstance(got, Refusal)
    assert got.reason == "the rest of the budget fleet is held by requests"
    await let_in(stage, tenant="b", models=(CHEAP,))


async def test_without_a_budget_nothing_is_held() -> None:
    """Disabled ones are none."""
    stage = admission(tenants={"a": BudgetConfig(monthly_budget_usd=0)})
    (await let_in(stage)).release(outcome(context(), None))
    assert stage.statements() == []


async def test_a_dry_run_holds_nothing_and_says_what_would_be() -> None:
    """A refusal too."""
    stage = admission(tenants={"a": budget(monthly_budget_usd=1)})
    got = await stage.admit(context((CHEAP,), TALK, tenant="a", dry_run=True, body={"max_tokens": 100}))
    assert not isinstance(got, Refusal)
    got = await stage.admit(context((DEAR,), TALK, tenant="a", dry_run=True, body={"max_tokens": 100}))
    assert isinstance(got, Refusal)
    assert got.code == "insufficient_quota"
    assert (stage.statements()[0]["reserved_usd"], stage.statements()[0]["refused"]) == (0.0, 0)


async def test_the_alert_is_logged_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    """At the threshold."""
    stage = admission(budget=budget(monthly_budget_usd=10))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            lease = await let_in(stage)
            lease.release(outcome(context(), CHEAP, usage=Usage(1, 1), cost_usd=3.0))
    assert [r.getMessage() for r in caplog.records] == ["budget_alert account=fleet month=2023-11 spent_pct=90.0"]


async def test_what_was_spent_survives_a_restart_and_what_was_held_does_not(tmp_path: Path) -> None:
    """A reservation of a process that died holds nothing any more."""
    clock = FrozenClock()
    options: dict[str, Any] = {
        "tenants": {"a": budget(monthly_budget_usd=5)},
        "fleet": "my fleet",
        "state_dir": tmp_path,
    }
    first = admission(clock, **options)
    await first.aopen()
    (await let_in(first)).release(outcome(context(), CHEAP, usage=Usage(1, 1), cost_usd=1.5))
    await let_in(first)  # never ends
    await first.aclose()
    await first.aclose()
    second = admission(clock, **options)
    await second.aopen()
    (statement,) = second.statements()
    assert (statement["spent_usd"], statement["reserved_usd"]) == (1.5, 0.0)
    await second.aclose()
    assert read_month(ledger_path(tmp_path, "my fleet"), month_of(clock.time_ns()))["tenant/a"].nano_usd == nano(1.5)


def test_a_model_whose_price_nobody_knows_is_a_finding() -> None:
    """Unless the budget allows it: unknown is not free."""
    unknown = ModelConfig(name="secret-model", endpoint="https://api.example")
    refusing = FleetConfig(models=(unknown,), budget=BudgetConfig(enabled=True))
    (finding,) = check(refusing, TABLE)
    assert finding.code == "unknown-price"
    assert finding.message == "nobody knows the price of secret-model, so no budget (fleet) can hold it"
    allowing = FleetConfig(models=(unknown,), budget=BudgetConfig(enabled=True, unknown_price="allow"))
    assert check(allowing, TABLE) == []
    listed = ModelConfig(name="known", endpoint="https://api.example", model_id="gpt-4o")
    assert check(FleetConfig(models=(listed,), budget=BudgetConfig(enabled=True)), TABLE) == []


def test_candidates_too_dear_for_one_request_are_dropped() -> None:
    """By the tighter of the fleet's and the tenant's limits."""
    stage = BudgetFilter(
        budget=budget(per_request_max_usd=5.0), tenants={"a": budget(per_request_max_usd=1.0), "b": BudgetConfig()}
    )
    stage.provision(Services(models=(CHEAP, DEAR)))

    def dropped(tenant: str) -> list[tuple[str, str]]:
        ctx = context((CHEAP, DEAR), TALK, tenant=tenant, body={"max_tokens": 100})
        return [(drop.candidate.name, drop.reason) for drop in stage.filter(ctx)]

    assert dropped("a") == [("dear", "the request may cost $3.00 there, and $1.00 is the most for one")]
    assert dropped("b") == []


def test_a_tenants_limits_of_cost_and_latency_hold() -> None:
    """Each drop says which; an unknown cost is not within a limit."""
    slow = model("slow", latency_p50_ms=900, cost_per_1k_input_tokens=0.0, cost_per_1k_output_tokens=0.0)
    unknown = model("unknown")
    stage = TenantFilter(tenants={"a": TenantConfig(max_cost_per_request=1.0, max_latency_ms=800)})
    ctx = context((CHEAP, DEAR, slow, unknown), TALK, tenant="a", body={"max_tokens": 100})
    assert [(drop.candidate.name, drop.rule) for drop in stage.filter(ctx)] == [
        ("dear", "max_cost_per_request"),
        ("slow", "max_latency_ms"),
        ("unknown", "max_cost_per_request"),
    ]


def fleet(**more: Any) -> FleetConfig:
    """A fleet from plain data."""
    raw = {
        "models": [
            {
                "name": "big",
                "endpoint": "http://big:8000",
                "cost_per_1k_input_tokens": 1.0,
                "cost_per_1k_output_tokens": 1.0,
                "cost_per_1k_cached_input_tokens": 0.1,
            }
        ],
        **more,
    }
    config, findings = structure(FleetConfig, raw)
    assert config is not None, findings
    return config


async def test_a_live_route_is_held_booked_and_traced() -> None:
    """The cost in the trace, with cached tokens at their price, is what the budget books."""
    tenants = {"a": {"budget": {"enabled": True, "monthly_budget_usd": 2.0, "per_request_max_usd": 9}}}
    config = fleet(tenants=tenants)
    reply = FakeReply(usage=Usage(1000, 100, 1100, 500))
    adapter = FakeAdapter(model_id="big", script=reply)
    async with Router(config, adapters={"big@http://big:8000": adapter}, polls=False, clock=FrozenClock()) as router:
        _, explanation = await router.route(prompt="Hello", tenant_id="a", max_tokens=100)
        assert explanation.cost_usd == pytest.approx(0.5 + 0.05 + 0.1)
        held = next(stage for stage in explanation.trace.stages if stage.name == "kvfleet.admit.budget")
        assert held.attributes[names.BUDGET_ACCOUNTS] == ("tenant/a",)
        (account,) = router.state()["stages"]["admit.budget"]["accounts"]
        assert (account["spent_usd"], account["reserved_usd"]) == (pytest.approx(0.65), 0.0)
        with pytest.raises(AdmissionError) as raised:
            await router.route(prompt="x" * 400, tenant_id="a", max_tokens=1500)
    assert (raised.value.status, raised.value.code) == (429, "insufficient_quota")


async def test_requests_at_once_never_spend_more_than_there_is() -> None:
    """Of twenty, those are let in whose money is there; failed ones give theirs back."""
    config = fleet(budget={"enabled": True, "monthly_budget_usd": 0.55, "alert_threshold_pct": 100})
    adapter = FakeAdapter(model_id="big", script=FakeReply(usage=Usage(2, 98, 100)))
    async with Router(config, adapters={"big@http://big:8000": adapter}, polls=False) as router:

        async def ask() -> bool:
            try:
                await router.route(prompt="Hello", max_tokens=98)
            except AdmissionError:
                return False
            return True

        done = await asyncio.gather(*(ask() for _ in range(20)))
        (account,) = router.state()["stages"]["admit.budget"]["accounts"]
    assert sum(done) == 5
    assert (account["spent_usd"], account["reserved_usd"], account["refused"]) == (pytest.approx(0.5), 0.0, 15)


async def test_a_failed_route_and_a_client_that_leaves_give_everything_back() -> None:
    """Nothing stays held."""
    config = fleet(budget={"enabled": True, "per_request_max_usd": 9})
    broken = FakeAdapter(model_id="big", script=FakeReply(fail=Fault.SERVER_ERROR))
    async with Router(config, adapters={"big@http://big:8000": broken}, polls=False) as router:
        with pytest.raises(RouteError):
            await router.route(prompt="Hello")
        (account,) = router.state()["stages"]["admit.budget"]["accounts"]
        assert (account["spent_usd"], account["reserved_usd"]) == (0.0, 0.0)
    async with Router(config, adapters={"big@http://big:8000": FakeAdapter(model_id="big")}, polls=False) as router:
        async with router.stream(prompt="Hello") as stream:
            async for _ in stream:
                break
        (account,) = router.state()["stages"]["admit.budget"]["accounts"]
        assert account["reserved_usd"] == 0.0


def test_a_budget_that_no_stage_applies_is_a_finding() -> None:
    """Written, and yet not held: that must not happen in silence."""
    from kvfleet.config.checks import check_stages

    config = fleet(budget={"enabled": True}, pipeline=["select", "execute"])
    assert [finding.code for finding in check_stages(config)] == ["unused-section"]


def test_the_budget_that_refuses_is_named() -> None:
    """Where several are written."""
    stage = BudgetAdmission(tenants={"a": BudgetConfig(enabled=True)})
    with pytest.raises(ConfigError) as raised:
        stage.provision(Services(models=(model("unknown"),)))
    assert "no budget (tenant/a) can hold it" in raised.value.findings[0].message
