"""What must hold of policy, asked of a running gateway."""

from __future__ import annotations

import importlib.util
import random
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kvfleet.adapters.call import Usage
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import (
    BudgetConfig,
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    PolicyRule,
    SemanticCacheConfig,
    TenantConfig,
)
from kvfleet.errors import Fault
from kvfleet.plugin.contract import Kind
from kvfleet.policy.pii import PIIDetector
from kvfleet.testing.fakes import FakeReply
from tests.page.living import live, question
from tests.page.printed import fleet
from tests.page.timing import takes_less_than_a_millisecond

ROOT = Path(__file__).parent.parent.parent
HOME = ModelConfig(name="home", endpoint="http://gpu-1:8000", provider="vllm", allowed_data_classes=("public", "internal", "confidential"))  # fmt: skip
CLOUD = ModelConfig(name="cloud", endpoint="https://cloud", provider="openai_compat", allowed_data_classes=("public",), quality_score=1.0)  # fmt: skip
BROKEN = FakeReply(fail=Fault.SERVER_ERROR)
TENANT = GatewayConfig(tenant_header="X-Tenant-ID")


@pytest.mark.parametrize(
    "strategy", ["hybrid_score", "quality_first", "cheap_cascade", "round_robin", "epsilon_greedy"]
)
async def test_a_fallback_passes_the_same_filters(strategy: str) -> None:
    """When the only model that may see it fails, nobody else gets it, whatever ranks them."""
    async with live(FleetConfig(models=(HOME, CLOUD)), scripts={"home": BROKEN}) as gateway:
        answer = await gateway.ask(X_KVFleet_Data_Class="confidential", X_KVFleet_Strategy=strategy)
        assert answer.status_code == 502
        assert {attempt.model for attempt in gateway.last.attempts} == {"home"}
        assert gateway.asked_of("cloud") == 0


ESCALATING = """\
models:
  - {name: home, endpoint: "http://gpu-1:8000", provider: vllm}
  - {name: cloud, endpoint: "https://cloud", allowed_data_classes: [public]}
pipeline: [classify.prompt, filter.policy, select.cheap_cascade, execute.escalate]
"""


async def test_an_escalation_passes_the_same_filters() -> None:
    """However little the answer can be trusted, nobody is asked for a better one who may not see the request."""
    async with live(fleet(ESCALATING), scripts={"home": FakeReply(text="")}) as gateway:
        assert await gateway.served(X_KVFleet_Data_Class="public") == "cloud"
        assert await gateway.served(X_KVFleet_Data_Class="confidential") == "home"
        assert gateway.asked_of("cloud") == 1


async def test_an_allowlist_passes_the_same_filters() -> None:
    """Who asks for a model by header or by name gets it only if policy lets it have the request."""
    async with live(FleetConfig(models=(HOME, CLOUD))) as gateway:
        by_header = await gateway.ask(X_KVFleet_Models="cloud", X_KVFleet_Data_Class="confidential")
        by_name = await gateway.ask({**question(), "model": "cloud"}, X_KVFleet_Data_Class="confidential")
        assert [answer.status_code for answer in (by_header, by_name)] == [403, 403]
        assert gateway.asked_of("cloud") == 0


async def test_a_cached_answer_passes_the_same_filters() -> None:
    """What the cloud answered to a public question is not given to a confidential one."""
    config = FleetConfig(
        models=(HOME, CLOUD), strategy="quality_first", semantic_cache=SemanticCacheConfig(enabled=True)
    )
    async with live(config) as gateway:
        body = question("What is the capital of France?", temperature=0)
        assert await gateway.served(body, X_KVFleet_Data_Class="public") == "cloud"
        assert (await gateway.ask(body, X_KVFleet_Data_Class="public")).headers["x-kvfleet-cache"] == "hit"
        assert await gateway.served(body, X_KVFleet_Data_Class="confidential") == "home"


async def test_declared_data_classes_hold_without_a_policy() -> None:
    """No section says so; the model does."""
    async with live(FleetConfig(models=(HOME, CLOUD), strategy="quality_first")) as gateway:
        assert await gateway.served(X_KVFleet_Data_Class="public") == "cloud"
        assert await gateway.served() == "home"
        assert [(drop.model, drop.rule) for drop in gateway.last.drops] == [("cloud", "data_class_enforcement")]


@pytest.mark.parametrize(
    ("known", "is_private"),
    [({"provider": "openai_compat"}, False), ({"provider": "openai_compat", "private": True}, True), ({"provider": "vllm"}, True), ({"provider": "vllm", "private": False}, False)],
)  # fmt: skip
async def test_a_model_is_private_by_its_word_or_its_provider(known: dict[str, Any], is_private: bool) -> None:
    """With the usual data classes, which are no sign of it."""
    rule = PolicyRule(name="ours", condition="always", action="require_private")
    config = FleetConfig(
        models=(ModelConfig(name="m", endpoint="http://m", **known),), policy=PolicyConfig(enabled=True, rules=(rule,))
    )
    async with live(config) as gateway:
        assert (await gateway.ask()).status_code == (200 if is_private else 403)


async def test_the_region_comes_from_a_header_or_the_tenant() -> None:
    """The header goes first; and what the trace says was used."""
    rule = PolicyRule(name="eu", condition="region in [eu-west-1]", action="block", target_models=("cloud",))
    config = FleetConfig(
        models=(HOME, CLOUD),
        gateway=TENANT,
        tenants={"berlin": TenantConfig(region="eu-west-1")},
        policy=PolicyConfig(enabled=True, rules=(rule,)),
    )
    async with live(config) as gateway:
        headers = {"X_Tenant_ID": "berlin", "X_KVFleet_Data_Class": "public"}
        assert await gateway.served(**headers) == "home"
        assert gateway.last.to_dict()["region"] == "eu-west-1"
        assert {drop.rule for drop in gateway.last.drops} == {"eu"}
        await gateway.served(**headers, X_KVFleet_Region="us-east-1")
        assert (gateway.last.to_dict()["region"], gateway.last.drops) == ("us-east-1", ())


async def test_a_tenants_limits_hold() -> None:
    """Its data classes, its limit of latency and its limit of cost: each drops whom it must, by its own rule."""
    slow = ModelConfig(name="slow", endpoint="http://slow", provider="vllm", latency_p50_ms=5000)
    dear = ModelConfig(
        name="dear", endpoint="https://dear", cost_per_1k_input_tokens=9.0, cost_per_1k_output_tokens=9.0
    )
    config = FleetConfig(
        models=(HOME, slow, dear),
        gateway=TENANT,
        tenants={
            "quick": TenantConfig(max_latency_ms=1000),
            "poor": TenantConfig(max_cost_per_request=0.01),
            "open": TenantConfig(allowed_data_classes=("public",)),
        },
    )
    async with live(config) as gateway:
        await gateway.served(X_Tenant_ID="quick")
        assert {drop.model for drop in gateway.last.drops} == {"slow"}
        await gateway.served(X_Tenant_ID="poor")
        assert {drop.model for drop in gateway.last.drops} == {"dear"}
        assert (await gateway.ask(X_Tenant_ID="open", X_KVFleet_Data_Class="internal")).status_code == 403
        assert (await gateway.ask(X_Tenant_ID="open", X_KVFleet_Data_Class="public")).status_code == 200


PIECES = (
    "aA0@. ",
    "0123456789 -.",
    "4111 1111 1111 1112 ",
    "a@",
    "DE89370400440532013001 ",
    "word ",
    "é",
    "+1 ",
    "sk-a",
)


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("is_random", [False, True], ids=["repeated", "random"])
async def test_64_kb_of_anything_take_less_than_a_millisecond(piece: str, is_random: bool) -> None:
    """What the live path asks of a prompt, with the regular expressions of `kvfleet[re2]`."""
    letters = random.Random(1).choices(piece, k=65536) if is_random else [piece] * 65536
    text, detector = "".join(letters)[:65536], PIIDetector()

    async def detect() -> None:
        detector.detect_all([text])

    assert await takes_less_than_a_millisecond(detect)


def test_the_order_of_types_is_stable() -> None:
    """However the finds are ordered in the text."""
    finds = ["user@example.com", "123-45-6789", "4111 1111 1111 1111", "10.0.0.1", "DE89370400440532013000"]
    chance = random.Random(2)
    orders = {tuple(PIIDetector().detect(" and ".join(chance.sample(finds, len(finds)))).pii_types) for _ in range(20)}
    assert len(orders) == 1


def test_a_presidio_plugin_can_be_installed() -> None:
    """It brings `classify.presidio`, which gives the same fact, and imports nothing heavy before it is used."""
    project = ROOT / "plugins" / "kvfleet-presidio"
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    (module,) = about["entry-points"]["kvfleet"].values()
    folder = project / "src" / module
    spec = importlib.util.spec_from_file_location(
        module, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made
    try:
        spec.loader.exec_module(made)
        (component,) = made.kvfleet_components()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == module]:
            del sys.modules[name]
    assert (component.kind, component.name) == (Kind.CLASSIFY, "presidio")
    assert [fact.name for fact in component.gives] == ["pii"]
    assert "presidio_analyzer" not in sys.modules


async def test_budgets_are_priced_by_all_three_kinds_of_tokens() -> None:
    """Input, output and cached: what is booked is what the answer cost, to the tenth of a cent."""
    model = ModelConfig(
        name="m",
        endpoint="https://m",
        cost_per_1k_input_tokens=1.0,
        cost_per_1k_output_tokens=2.0,
        cost_per_1k_cached_input_tokens=0.1,
    )
    usage = Usage(prompt_tokens=100, completion_tokens=10, total_tokens=110, cached_tokens=60)
    budget = BudgetConfig(enabled=True, monthly_budget_usd=10, per_request_max_usd=None)
    config = FleetConfig(models=(model,), gateway=TENANT, tenants={"a": TenantConfig(budget=budget)})
    async with live(config, scripts={"m": FakeReply(usage=usage)}) as gateway:
        await gateway.served(question(max_tokens=10), X_Tenant_ID="a")
        assert gateway.last.cost_usd == pytest.approx(0.04 * 1.0 + 0.06 * 0.1 + 0.01 * 2.0)
        assert gateway.metric("kvfleet_budget_spend_usd_total", account="tenant/a") == pytest.approx(
            gateway.last.cost_usd
        )


async def test_budgets_begin_anew_with_the_month() -> None:
    """Used up until it ends; then there is money again. At the threshold an alert is counted, once."""
    model = ModelConfig(name="m", endpoint="https://m", cost_per_1k_input_tokens=1.0, cost_per_1k_output_tokens=1.0)
    usage = Usage(prompt_tokens=50, completion_tokens=50, total_tokens=100)
    budget = BudgetConfig(enabled=True, monthly_budget_usd=0.25, per_request_max_usd=None)
    config = FleetConfig(models=(model,), gateway=TENANT, tenants={"a": TenantConfig(budget=budget)})
    clock = FrozenClock()
    async with live(config, scripts={"m": FakeReply(usage=usage)}, clock=clock) as gateway:
        body = question(max_tokens=50)
        statuses = [(await gateway.ask(body, X_Tenant_ID="a")).status_code for _ in range(4)]
        assert statuses == [200, 200, 429, 429]
        assert gateway.metric("kvfleet_budget_alerts_total", account="tenant/a") == 1
        clock.advance(32 * 86_400)
        assert (await gateway.ask(body, X_Tenant_ID="a")).status_code == 200


async def test_an_unknown_tenant_gets_what_the_configuration_says() -> None:
    """By default nothing."""
    async with live(FleetConfig(models=(HOME,), gateway=TENANT, tenants={"a": TenantConfig()})) as gateway:
        assert (await gateway.ask(X_Tenant_ID="stranger")).status_code == 403
        assert gateway.asked_of("home") == 0
