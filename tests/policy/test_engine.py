"""The policy engine, and the page's example of it."""

from __future__ import annotations

import pytest

from kvfleet.config.schema import ModelConfig, PolicyConfig, PolicyRule
from kvfleet.policy.engine import PolicyContext, PolicyDecision, PolicyEngine

LOCAL = ModelConfig(name="local", endpoint="http://gpu:8000", provider="vllm")
CLOUD = ModelConfig(name="cloud", endpoint="https://api.example.com", allowed_data_classes=("public",))
OWN = ModelConfig(name="own", endpoint="http://own", private=True)
EVERYBODY = [LOCAL, CLOUD, OWN]
PUBLIC = PolicyContext(data_class="public")


def engine(*rules: PolicyRule, **more: bool) -> PolicyEngine:
    """An enabled policy."""
    return PolicyEngine(PolicyConfig(enabled=True, rules=rules, **more))


def names(models: list[ModelConfig]) -> list[str]:
    """The models' names."""
    return [model.name for model in models]


def test_the_pages_example() -> None:
    """PII triggers private-only routing, and the decisions say so."""
    policy = PolicyEngine(
        PolicyConfig(
            enabled=True,
            pii_detection=True,
            rules=(PolicyRule(name="pii-to-private", condition="has_pii == true", action="require_private"),),
        )
    )
    filtered, decisions = policy.evaluate(
        candidates=EVERYBODY, context=PolicyContext(has_pii=True, data_class="public")
    )
    assert names(filtered) == ["local", "own"]
    assert [f"[{d.rule_name}] {'PASS' if d.passed else 'BLOCK'}: {d.reason}" for d in decisions] == [
        "[pii_detection] BLOCK: personal data stays on private models",
        "[data_class_enforcement] PASS: nobody is excluded",
        "[pii-to-private] PASS: nobody is excluded",
    ]


def test_a_disabled_policy_lets_everybody_through() -> None:
    """Nothing is decided."""
    assert PolicyEngine(PolicyConfig()).evaluate(EVERYBODY) == (EVERYBODY, [])


def test_declared_data_classes_hold() -> None:
    """A model that declares public only never sees internal data."""
    filtered, decisions = engine().evaluate(EVERYBODY, PolicyContext(data_class="internal"))
    assert names(filtered) == ["local", "own"]
    assert decisions == [
        PolicyDecision("data_class_enforcement", False, "not cleared for internal data", "require_clearance")
    ]


def test_nobody_is_cleared_for_an_undeclared_class() -> None:
    """Restricted data needs a model that says it may see it."""
    assert engine().evaluate(EVERYBODY, PolicyContext(data_class="restricted"))[0] == []


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        (PolicyRule(name="r", condition="always", action="require_private"), ["local", "own"]),
        (PolicyRule(name="r", condition="always", action="require_model", target_models=("own",)), ["own"]),
        (PolicyRule(name="r", condition="always", action="block", target_models=("own",)), ["local", "cloud"]),
        (PolicyRule(name="r", condition="always", action="block"), []),
        (PolicyRule(name="r", condition="always", action="allow"), ["local", "cloud", "own"]),
        (PolicyRule(name="r", condition="has_pii", action="block"), ["local", "cloud", "own"]),
    ],
)
def test_actions(rule: PolicyRule, left: list[str]) -> None:
    """Each action restricts as its name says, and only if its condition holds."""
    assert names(engine(rule).evaluate(EVERYBODY, PUBLIC)[0]) == left


def test_rules_apply_by_priority_to_whom_the_others_left() -> None:
    """The rule with the lower number is named for a model that both exclude."""
    late = PolicyRule(name="late", condition="always", action="block", target_models=("cloud", "own"), priority=9)
    early = PolicyRule(name="early", condition="always", action="block", target_models=("cloud",), priority=1)
    found = engine(late, early).exclusions(EVERYBODY, PUBLIC)
    assert [(one.candidate.name, one.rule) for one in found] == [("cloud", "early"), ("own", "late")]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (PolicyRule(name="r", condition="always", action="blok"), "unknown action 'blok'; did you mean block?"),
        (PolicyRule(name="r", condition="alway", action="block"), "unknown name 'alway'; did you mean always?"),
        (PolicyRule(name="r", condition="always", action="require_model"), "require_model needs target_models"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(rule: PolicyRule, said: str) -> None:
    """Mistakes are found when the policy is read, not when a request comes."""
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        engine(rule)


def test_self_hosted_is_private_unless_it_says_otherwise() -> None:
    """Privacy is declared, or follows from the provider; no default makes a cloud private."""
    rented = ModelConfig(name="rented", endpoint="http://rented", provider="vllm", private=False)
    rule = PolicyRule(name="r", condition="always", action="require_private")
    assert names(engine(rule).evaluate([LOCAL, CLOUD, OWN, rented], PUBLIC)[0]) == ["local", "own"]
