"""The policy filters, as stages."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from kvfleet.builtin.facts import DOMAIN, PII, PROMPT, ROUTE
from kvfleet.builtin.policy import PolicyFilter, ResidencyFilter, TenantFilter, kvfleet_components
from kvfleet.config.convert import structure
from kvfleet.config.findings import did_you_mean
from kvfleet.config.schema import ModelConfig, PolicyRule, TenantConfig
from kvfleet.errors import ComponentError, ConfigError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Drop, Kind, RouteRequest, RoutingContext
from kvfleet.policy.engine import ACTIONS
from kvfleet.policy.pii import PIIDetectionResult
from kvfleet.policy.residency import ResidencyRule
from kvfleet.router.routes import RouteMatch
from kvfleet.router.semantic import PromptDomain

LOCAL = ModelConfig(name="local", endpoint="http://gpu:8000", provider="vllm", region="eu-west-1")
CLOUD = ModelConfig(name="cloud", endpoint="https://api.example.com", region="us-east-1")
OPEN = ModelConfig(name="open", endpoint="https://open.example.com", allowed_data_classes=("public",))
FLEET = (LOCAL, CLOUD, OPEN)
FOUND_PII = {PII: PIIDetectionResult(["ssn"])}


def find(kind: Kind, name: str) -> Component:
    """The built-in actions, as the table gives them."""
    if name not in ACTIONS:
        raise ComponentError(f"there is no {kind} {name!r}; {did_you_mean(name, ACTIONS)}")
    return Component(kind, name, ACTIONS[name])


def policy(*rules: PolicyRule, pii: bool = False) -> PolicyFilter:
    """The filter, wired."""
    stage = PolicyFilter(rules=rules, pii=pii)
    stage.provision(Services(models=FLEET, find=find))
    return stage


def ctx(request: RouteRequest | None = None, **known: Any) -> RoutingContext:
    """A request, as the stage sees it."""
    return RoutingContext(**{"request": request or RouteRequest(body={}), "candidates": FLEET, **known})


def dropped(stage: Any, context: RoutingContext) -> dict[str, tuple[str, str]]:
    """Who is dropped, why, and by which rule."""
    return {drop.candidate.name: (drop.reason, drop.rule) for drop in stage.filter(context)}


def test_all_three_must_hold() -> None:
    """A pipeline cannot skip them when they fail."""
    assert {component.key: component.must_hold for component in kvfleet_components()} == {
        "filter.policy": True,
        "filter.residency": True,
        "filter.tenant": True,
    }


def test_declared_data_classes_hold_without_rules() -> None:
    """What a model declares is enough."""
    assert dropped(policy(), ctx()) == {"open": ("not cleared for internal data", "data_class_enforcement")}
    assert dropped(policy(), ctx(data_class="public")) == {}
    assert set(dropped(policy(), ctx(data_class="restricted"))) == {"local", "cloud", "open"}


def test_nobody_is_cleared_for_a_class_that_does_not_exist() -> None:
    """A mistake of the caller does not open anything."""
    assert set(dropped(policy(), ctx(data_class="secret"))) == {"local", "cloud", "open"}


def test_a_replica_nobody_knew_is_checked_as_well() -> None:
    """What is precomputed speaks of the fleet; another candidate is judged by what it declares."""
    new = attrs.evolve(OPEN, name="new")
    assert list(policy().filter(ctx(candidates=(LOCAL, new)))) == [
        Drop(new, "not cleared for internal data", "data_class_enforcement")
    ]
    assert list(policy().filter(ctx(candidates=(attrs.evolve(CLOUD, name="new"),)))) == []


def test_personal_data_stays_on_private_models() -> None:
    """If the policy looks for it, and if there is any."""
    why = ("personal data stays on private models", "pii_detection")
    found = dropped(policy(pii=True), ctx(facts=FOUND_PII, data_class="public"))
    assert found == {"cloud": why, "open": why}
    assert dropped(policy(pii=True), ctx(facts={PII: PIIDetectionResult()}, data_class="public")) == {}


def test_rules_read_the_request() -> None:
    """Tags, headers, tenant, region, personal data and the prompt's length."""
    rule = PolicyRule(
        name="r",
        condition="tags.team == red and headers.x-purpose == audit and tenant == t and region == eu and 'ssn' in pii_types",
        action="require_model",
        target_models=("local",),
    )
    request = RouteRequest(body={}, tags={"team": "red"}, condition_headers={"x-purpose": "audit"})
    context = ctx(request, tenant="t", region="eu", facts=FOUND_PII)
    why = (f"{rule.condition}: only local", "r")
    assert dropped(policy(rule), context)["cloud"] == why
    assert "cloud" not in dropped(policy(rule), attrs.evolve(context, tenant="u"))


def test_rules_read_what_classifiers_found() -> None:
    """The domain and the route; where nobody looked neither is anything."""
    rule = PolicyRule(name="r", condition="route == billing and domain == legal", action="block")
    found = {ROUTE: RouteMatch("billing", 0.7, "billing"), DOMAIN: PromptDomain("legal")}
    assert set(dropped(policy(rule), ctx(facts=found))) == {"local", "cloud", "open"}
    assert set(dropped(policy(rule), ctx(facts={**found, ROUTE: RouteMatch()}))) == {"open"}
    assert set(dropped(policy(rule), ctx())) == {"open"}


@pytest.mark.parametrize(
    ("condition", "pii", "facts"),
    [
        ("always", False, ()),
        ("always", True, (PII,)),
        ("has_pii", False, (PII,)),
        ("'ssn' in pii_types and tokens > 5", False, (PII, PROMPT)),
        ("tags.tokens == has_pii", False, ()),
        ("route == billing and domain != legal", False, (DOMAIN, ROUTE)),
        ("tags.route == billing", False, ()),
    ],
)
def test_the_rules_say_which_facts_they_need(condition: str, pii: bool, facts: tuple[Any, ...]) -> None:
    """So the build tells when nobody looks for personal data; a tag of the same name is no fact."""
    rule = PolicyRule(name="r", condition=condition, action="block")
    assert PolicyFilter(rules=(rule,), pii=pii).required_facts() == facts


def test_mistakes_in_rules_are_findings_at_their_place() -> None:
    """All of them, where the options are read."""
    rules = [
        {"name": "a", "condition": "data_clas == public", "action": "block"},
        {"name": "b", "condition": "always", "action": "require_model"},
        {"name": "b", "condition": "has_pii ==", "action": "allow"},
    ]
    made, findings = structure(PolicyFilter, {"rules": rules}, path=("policy",))
    assert made is None
    assert [str(finding) for finding in findings] == [
        "policy.rules[0].condition: unknown name 'data_clas'; did you mean data_class? (column 1)",
        "policy.rules[1].target_models: require_model needs models; add `target_models:`",
        "policy.rules[2].condition: the condition ends where a value should stand (column 11)",
        "policy.rules[2].name: duplicate rule 'b'; give each rule its own name",
    ]


def test_an_unknown_action_is_a_finding_at_its_rule() -> None:
    """It can be told only when the actions are known: a plugin may bring others."""
    stage = PolicyFilter(rules=(PolicyRule(name="a", condition="always", action="blok"),))
    with pytest.raises(ConfigError) as raised:
        stage.provision(Services(find=find))
    assert [(str(finding), finding.code) for finding in raised.value.findings] == [
        ("rules[0].action: there is no action 'blok'; did you mean block?", "unknown-action")
    ]


def test_actions_come_from_plugins_as_well() -> None:
    """Whatever the table has under the rule's action is applied; strangers and repeats it names change nothing."""

    @attrs.frozen
    class DropFirst:
        """Excludes the first candidate, and says so twice."""

        def apply(self, candidates: Any, rule: PolicyRule, context: Any) -> Any:
            """Exclude it."""
            return [(candidates[0], "first"), (candidates[0], "first"), (attrs.evolve(LOCAL, name="stranger"), "who?")]

    stage = PolicyFilter(rules=(PolicyRule(name="r", condition="always", action="drop_first"),))
    stage.provision(Services(models=FLEET, find=lambda kind, name: Component(kind, name, DropFirst)))
    assert list(stage.filter(ctx(data_class="public"))) == [Drop(LOCAL, "first", "r")]


EU = ResidencyRule(
    name="eu", source_regions=("eu-west-1",), allowed_model_regions=("eu-west-1",), blocked_providers=("bedrock",)
)


def test_residency_drops_who_may_not_see_a_regions_data() -> None:
    """Naming the rule; a model of no region is in none."""
    assert dropped(ResidencyFilter(rules=(EU,)), ctx(region="eu-west-1")) == {
        "cloud": ("data from eu-west-1 may not go to us-east-1", "eu"),
        "open": ("data from eu-west-1 may not go to an unknown region", "eu"),
    }
    assert dropped(ResidencyFilter(rules=(EU,)), ctx(region="us-east-1")) == {}


TENANTS = {
    "ml": TenantConfig(preferred_models=("local",), blocked_models=("cloud",)),
    "open": TenantConfig(allowed_data_classes=("public",)),
}


def test_a_tenant_gets_its_models() -> None:
    """Blocked ones never, others not while preferred ones are left."""
    stage = TenantFilter(tenants=TENANTS)
    assert dropped(stage, ctx(tenant="ml")) == {
        "cloud": ("blocked for tenant ml", "blocked_models"),
        "open": ("tenant ml prefers local", "preferred_models"),
    }
    assert set(dropped(stage, ctx(tenant="ml", candidates=(CLOUD, OPEN)))) == {"cloud"}


def test_a_tenant_may_not_send_what_it_is_not_cleared_for() -> None:
    """Then nobody gets the request."""
    why = ("tenant open may not send internal data", "tenant_data_classes")
    assert dropped(TenantFilter(tenants=TENANTS), ctx(tenant="open")) == {"local": why, "cloud": why, "open": why}
    assert dropped(TenantFilter(tenants=TENANTS), ctx(tenant="open", data_class="public")) == {}


def test_an_unknown_tenant_gets_nothing_unless_the_configuration_says_so() -> None:
    """Nor does a request that names none; where no tenants are configured, nobody is unknown."""
    stage = TenantFilter(tenants=TENANTS)
    assert set(dropped(stage, ctx(tenant="who")).values()) == {("this tenant is unknown", "unknown_tenant")}
    assert set(dropped(stage, ctx()).values()) == {("the request names no tenant", "unknown_tenant")}
    assert dropped(TenantFilter(tenants=TENANTS, unknown="allow"), ctx(tenant="who")) == {}
    assert dropped(TenantFilter(), ctx(tenant="who")) == {}
