"""From flat sections to a pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.config.convert import structure, unstructure
from kvfleet.config.expand import default_data_class, expand, options_from_section, section_for, section_path
from kvfleet.config.loader import check_text
from kvfleet.config.schema import FleetConfig, ModelConfig, PolicyConfig

MODEL = {"name": "a", "provider": "mock"}


def fleet(**sections: Any) -> FleetConfig:
    """A fleet of one model with these sections."""
    config, findings = structure(FleetConfig, {"models": [MODEL], **sections})
    assert findings == []
    assert config is not None
    return config


def uses(**sections: Any) -> list[str]:
    """The stages it expands to."""
    return [stage.use for stage in expand(fleet(**sections))]


USUAL = [
    "classify.prompt",
    "classify.modality",
    "filter.capabilities",
    "filter.health",
    "filter.rate_limits",
    "affinity.prefix",
    "score.cost",
    "score.latency",
    "score.quality",
    "score.cache_affinity",
    "score.hardware_load",
    "select.hybrid_score",
    "execute.fallback",
    "observe.metrics",
]


def test_a_fleet_without_sections_has_the_usual_stages() -> None:
    """In this order."""
    assert uses() == USUAL


def test_every_section_switches_its_stages_on() -> None:
    """All at once, each in its place."""
    assert uses(
        strategy="cost_first",
        policy={"enabled": True, "pii_detection": True},
        gateway={"max_concurrent": 4},
        tenants={"t": {}},
        scoring_weights={"compliance": 0.1, "capacity": 0.1},
        slo={"enabled": True},
        telemetry={"log_route_decisions": True},
    ) == [
        "classify.prompt",
        "classify.modality",
        "classify.pii",
        "admit.concurrency",
        "filter.policy",
        "filter.tenant",
        "filter.capabilities",
        "filter.health",
        "filter.service_level",
        "filter.rate_limits",
        "filter.overload",
        "affinity.prefix",
        "score.cost",
        "score.latency",
        "score.quality",
        "score.cache_affinity",
        "score.hardware_load",
        "score.compliance",
        "score.capacity",
        "select.cost_first",
        "execute.fallback",
        "observe.metrics",
        "observe.log",
    ]


def test_without_cache_affinity_its_stages_are_gone() -> None:
    """Both of them."""
    assert uses(cache_affinity={"enabled": False}) == [use for use in USUAL if "affinity" not in use]


def test_declared_data_classes_hold_without_a_policy() -> None:
    """A model that declares who may see what is asked about it; the policy's own rules stay off."""
    models = [MODEL, {"name": "b", "provider": "mock", "allowed_data_classes": ["public"]}]
    rules = [{"name": "r", "condition": "has_pii", "action": "block"}]
    stages = {stage.use: stage for stage in expand(fleet(models=models, policy={"enabled": False, "rules": rules}))}
    assert stages["filter.policy"].options == {"default_data_class": "internal"}
    assert "classify.pii" not in stages


def test_a_rule_about_personal_data_brings_the_classifier() -> None:
    """Otherwise it could not be asked."""
    rules = [{"name": "r", "condition": "'ssn' in pii_types", "action": "block"}]
    stages = {stage.use: stage for stage in expand(fleet(policy={"enabled": True, "rules": rules}))}
    assert "classify.pii" in stages
    assert stages["filter.policy"].options == {"default_data_class": "internal", "rules": rules}


@pytest.mark.parametrize(
    ("condition", "is_there"),
    [("domain == coding", True), ("has_pii or domain != legal", True), ("tags.domain == coding", False)],
)
def test_a_rule_about_domains_brings_the_classifier(condition: str, is_there: bool) -> None:
    """A tag of that name does not."""
    rules = [{"name": "r", "condition": condition, "action": "block"}]
    stages = [stage.use for stage in expand(fleet(policy={"enabled": True, "rules": rules}))]
    assert ("classify.domain" in stages) is is_there


def test_a_route_rule_about_domains_brings_the_classifier() -> None:
    """Where the strategy reads the rules."""
    rules = [{"name": "r", "condition": {"domain": "coding"}, "target_model": "a"}]
    assert "classify.domain" in [stage.use for stage in expand(fleet(strategy="rules", route_rules=rules))]
    assert "classify.domain" not in [stage.use for stage in expand(fleet(route_rules=rules))]


@pytest.mark.parametrize(
    ("use", "section", "written", "options"),
    [
        (
            "filter.policy",
            "policy",
            {"enabled": True, "pii_detection": True, "default_data_class": "public"},
            {"default_data_class": "public", "pii": True},
        ),
        ("filter.tenant", "tenants", {"t": {"region": "eu"}}, {"tenants": {"t": {"region": "eu"}}}),
        (
            "filter.service_level",
            "slo",
            {"enabled": True, "target_p95_latency_ms": 800, "min_quality_score": None},
            {"target_p95_latency_ms": 800, "max_cost_per_request": 0.1},
        ),
        ("filter.overload", "slo", {"enabled": True, "load_shed_threshold": 0.7}, {"load_shed_threshold": 0.7}),
        (
            "execute.fallback",
            "fallback",
            {"max_attempts": 2, "timeout_ms": 5, "promote_on_timeout": False, "fallback_order": ["a"]},
            {"max_attempts": 2, "timeout_ms": 5.0, "promote_on_timeout": False, "fallback_order": ["a"]},
        ),
        (
            "execute.fallback",
            "fallback",
            {"enabled": False, "max_attempts": 5},
            {"max_attempts": 1, "timeout_ms": 10_000},
        ),
        (
            "affinity.prefix",
            "cache_affinity",
            {
                "session_ttl_seconds": 9,
                "prefix_hash_tokens": 8,
                "min_affinity_score": 0.7,
                "consistent_hash_replicas": 6,
            },
            {"session_ttl_s": 9.0, "prefix_tokens": 8, "virtual_nodes": 6, "min_affinity": 0.7},
        ),
        ("select.static", "default_model", "a", {"default_model": "a"}),
        ("admit.concurrency", "gateway", {"max_concurrent": 7}, {"max_concurrent": 7}),
    ],
)
def test_a_section_is_a_stages_options(use: str, section: str, written: Any, options: dict[str, Any]) -> None:
    """Under the component's own names, as plain data."""
    assert section_for(use) == section
    assert options_from_section(fleet(**{section: written}), use) == options


def test_weights_are_the_options_of_two_strategies() -> None:
    """Of the weighted score, and of the rules for those whom no rule puts first."""
    weights = {
        "cost": 0.5,
        "latency": 0.3,
        "quality": 0.3,
        "cache_affinity": 0.1,
        "hardware_load": 0.0,
        "compliance": 0.0,
        "capacity": 0.0,
    }
    rule = {"name": "r", "condition": {"data_class": "public"}, "target_model": "a"}
    config = fleet(scoring_weights={"cost": 0.5}, route_rules=[rule])
    assert options_from_section(config, "select.hybrid_score") == {"weights": weights}
    assert options_from_section(config, "select.rules") == {"rules": [rule], "weights": weights}


def test_other_stages_take_no_section() -> None:
    """Those of plugins, and built-in ones without options."""
    assert (section_for("filter.mine"), section_path("score.cost"), options_from_section(fleet(), "filter.mine")) == (
        "",
        (),
        {},
    )


def test_the_expansion_can_be_pasted_into_the_same_file() -> None:
    """A stage whose section is written takes it; the pasted file means the same and is free of findings."""
    text = "models:\n  - {name: a, provider: mock}\nfallback: {max_attempts: 2}\npolicy: {enabled: true}\n"
    config, _ = check_text(text, environ={})
    assert config is not None
    stages = {stage.use: stage for stage in expand(config)}
    assert (stages["execute.fallback"].options, stages["filter.policy"].options) == ({}, {})
    assert stages["affinity.prefix"].options["prefix_tokens"] == 128
    pasted = FleetConfig(models=config.models, pipeline=expand(config), policy=PolicyConfig(enabled=True))
    entries = [
        f"  - {entry}" if isinstance(entry, str) else f"  - {entry!r}" for entry in unstructure(pasted)["pipeline"]
    ]
    again, findings = check_text(text + "pipeline:\n" + "\n".join(entries), environ={})
    assert findings == ()
    assert again is not None
    assert [(s.use, s.options) for s in again.pipeline] == [(s.use, s.options) for s in expand(config)]


def test_the_default_data_class_is_the_policy_filters() -> None:
    """Wherever its options are written."""
    stage = {"use": "filter.policy", "with": {"default_data_class": "restricted"}}
    assert default_data_class(fleet()) == "internal"
    assert default_data_class(fleet(policy={"default_data_class": "public"})) == "public"
    assert default_data_class(fleet(pipeline=["filter.health", stage])) == "restricted"
    assert default_data_class(fleet(pipeline=["filter.policy"], policy={"default_data_class": "public"})) == "public"


def test_expansion_ignores_a_pipeline() -> None:
    """It says what the sections alone would mean."""
    assert [stage.use for stage in expand(fleet(pipeline=["filter.health"]))] == USUAL
    assert expand(FleetConfig(models=(ModelConfig(name="a"),)))[0].path == ()


def test_the_semantic_cache_stands_behind_the_policy() -> None:
    """Only if it is switched on, with its section's options."""
    section = {"enabled": True, "max_size": 5, "ttl_seconds": 60, "similarity_threshold": 0.9}
    found = expand(fleet(semantic_cache=section, policy={"enabled": True}, tenants={"t": {}}))
    order = [stage.use for stage in found]
    assert order.index("filter.tenant") < order.index("answer.semantic_cache") < order.index("affinity.prefix")
    assert options_from_section(fleet(semantic_cache=section), "answer.semantic_cache") == {
        "max_size": 5,
        "ttl_s": 60.0,
        "similarity_threshold": 0.9,
        "any_temperature": False,
    }
    assert "answer.semantic_cache" not in uses(semantic_cache={"enabled": False})
