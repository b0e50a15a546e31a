"""Tenant-Aware Routing & Budgets."""

from __future__ import annotations

import pytest

from tests.page.fleets import QUICKSTART
from tests.page.living import live
from tests.page.printed import fleet, run

TENANTS = """\
# In fleet.yaml
tenants:
  team-ml:
    name: ML Team
    preferred_models: [llama-3-70b, deepseek-coder]
    blocked_models: [gpt-4o-fallback]
    budget:
      enabled: true
      monthly_budget_usd: 500.0
      alert_threshold_pct: 80.0

  team-support:
    name: Support Team
    preferred_models: [llama-3-8b]
    allowed_data_classes: [public, internal]
    budget:
      enabled: true
      monthly_budget_usd: 100.0
"""

EXAMPLE = """
from kvfleet.policy.tenant import TenantManager
from kvfleet.config.schema import TenantConfig, BudgetConfig

manager = TenantManager(tenants={
    "team-ml": TenantConfig(
        name="ML Team",
        preferred_models=["llama-70b"],
        budget=BudgetConfig(enabled=True, monthly_budget_usd=500),
    ),
})

# Filter models for tenant
allowed = manager.filter_models_for_tenant("team-ml", ["llama-8b", "llama-70b", "gpt-4o"])
# → ["llama-70b"]

# Track spending
manager.record_request("team-ml", 0.05)
assert manager.check_budget("team-ml", 0.01)  # Under budget → True
"""

REST = """\
models:
  - {name: deepseek-coder, endpoint: "http://gpu-3:8000", provider: vllm}
  - {name: gpt-4o-fallback, cost_per_1k_output_tokens: 0.015}
gateway: {tenant_header: X-Tenant-ID}
"""
"""The model that the page's tenants name, a price for answers, and the header that says who asks."""


async def test_the_example() -> None:
    """The list as the comment has it, and the assertion."""
    ran = await run(EXAMPLE)
    assert ran["allowed"] == ["llama-70b"]
    assert not ran["manager"].check_budget("team-ml", 499.96)


async def test_live_requests_get_their_tenants_models() -> None:
    """Preferred ones, never blocked ones; and the trace says by which rule the others were left out."""
    async with live(fleet(QUICKSTART, TENANTS, REST)) as gateway:
        assert await gateway.served(X_Tenant_ID="team-support") == "llama-3-8b"
        assert await gateway.served(X_Tenant_ID="team-ml") in {"llama-3-70b", "deepseek-coder"}
        assert gateway.last.to_dict()["tenant"] == "team-ml"
        answer = await gateway.ask({"model": "gpt-4o-fallback", "messages": [{"role": "user", "content": "Hi"}]}, X_Tenant_ID="team-ml", X_KVFleet_Data_Class="public")  # fmt: skip
        assert answer.status_code == 403
        assert [drop.rule for drop in gateway.last.drops] == ["blocked_models"]
        assert gateway.asked_of("gpt-4o-fallback") == 0


async def test_a_tenant_that_nobody_knows_gets_nothing() -> None:
    """Nor does a request that names none: the configuration would have to say otherwise."""
    async with live(fleet(QUICKSTART, TENANTS, REST)) as gateway:
        for headers in ({}, {"X_Tenant_ID": "team-nobody"}):
            answer = await gateway.ask(**headers)
            assert answer.status_code == 403
            assert {drop.rule for drop in gateway.last.drops} >= {"unknown_tenant"}


async def test_a_budget_that_is_used_up_refuses() -> None:
    """429 with OpenAI's code, the trace says what was reserved, and the other tenant goes on."""
    priced = "models:\n" + "".join(
        f"  - {{name: {name}, cost_per_1k_input_tokens: 0.5, cost_per_1k_output_tokens: 0.5}}\n"
        for name in ("llama-3-8b", "llama-3-70b", "deepseek-coder")
    )
    poor = "tenants: {team-support: {budget: {monthly_budget_usd: 0.01}}}\n"
    async with live(fleet(QUICKSTART, TENANTS, REST, priced, poor)) as gateway:
        body = {"model": "auto", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
        codes = []
        for _ in range(4):
            answer = await gateway.ask(body, X_Tenant_ID="team-support")
            codes.append(answer.status_code if answer.status_code == 200 else answer.json()["error"]["code"])
        assert codes[0] == 200
        assert codes[-1] == "insufficient_quota"
        assert gateway.last.outcome == "refused"
        assert (await gateway.ask(body, X_Tenant_ID="team-ml")).status_code == 200
        assert gateway.last.cost_usd == pytest.approx(gateway.last.usage.total_tokens * 0.5 / 1000)
