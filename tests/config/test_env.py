"""Environment variables and overrides over a file's data."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.config.findings import Finding
from kvfleet.config.loader import check_text
from kvfleet.config.schema import FleetConfig

FILE = """\
fleet_name: demo
models:
  - name: llama-3
    endpoint: http://gpu-1:8000
    tags: {tier: fast}
  - name: other
    endpoint: http://gpu-2:8000
tenants:
  team-ml: {name: ML}
pipeline:
  - filter.health
  - {use: filter.mine, with: {n: 1}}
  - execute
"""


def load(
    environ: dict[str, str] | None = None, overrides: Any = None
) -> tuple[FleetConfig | None, tuple[Finding, ...]]:
    """The file, with a layer over it; the tenants' filter is not what these tests are about."""
    config, findings = check_text(FILE, file="f.yaml", environ=environ or {}, overrides=overrides)
    return config, tuple(finding for finding in findings if finding.code != "unused-section")


def config(environ: dict[str, str] | None = None, overrides: Any = None) -> FleetConfig:
    """The same, without findings."""
    made, findings = load(environ, overrides)
    assert findings == ()
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("FLEET_NAME", "8", "fleet_name", "8"),
        ("STRATEGY", "cost_first", "strategy", "cost_first"),
        ("CACHE_AFFINITY__ENABLED", "no", "cache_affinity.enabled", False),
        ("POLICY__ENABLED", "1", "policy.enabled", True),
        ("TELEMETRY__PROMETHEUS_PORT", "9091", "telemetry.prometheus_port", 9091),
        ("TELEMETRY__PROMETHEUS_PORT", "", "telemetry.prometheus_port", None),
        ("SCORING_WEIGHTS__COST", "1", "scoring_weights.cost", 1.0),
        ("GATEWAY__PASSTHROUGH_HEADERS", '["X-A", "X-B"]', "gateway.passthrough_headers", ("X-A", "X-B")),
        ("GATEWAY__PASSTHROUGH_HEADERS", "[X-A]", "gateway.passthrough_headers", ("X-A",)),
        ("MODELS__0__ENDPOINT", "http://new:1", "models.0.endpoint", "http://new:1"),
        ("MODELS__1__WEIGHT", "0.5", "models.1.weight", 0.5),
        ("MODELS__1__PRIVATE", "yes", "models.1.private", True),
        ("MODELS__0__TAGS__TIER", "slow", "models.0.tags", {"tier": "slow"}),
        ("MODELS__0__TAGS__N", "5", "models.0.tags", {"tier": "fast", "n": "5"}),
        ("MODELS__0__CAPABILITIES__MAX_CONTEXT_WINDOW", "4096", "models.0.capabilities.max_context_window", 4096),
        ("MODELS__0__OPTIONS__RETRIES", "3", "models.0.options", {"retries": 3}),
        ("TENANTS__TEAM_ML__REGION", "eu", "tenants.team-ml.region", "eu"),
        ("TENANTS__NEW__NAME", "N", "tenants.new.name", "N"),
        ("PIPELINE__1__WITH__N", "7", "pipeline.1.options", {"n": 7}),
        ("PIPELINE__0__WITH__N", "7", "pipeline.0.options", {"n": 7}),
    ],
)
def test_a_variable_is_read_by_the_options_type(name: str, text: str, path: str, value: object) -> None:
    """Never by the text's looks: "8" is text where a text is wanted, and yes is true where a flag is."""
    found: Any = config({f"KVFLEET__{name}": text})
    for step in path.split("."):
        found = (
            found[int(step)] if step.isdecimal() else found[step] if isinstance(found, dict) else getattr(found, step)
        )
    assert found == value
    assert type(found) is type(value)


def test_variables_without_two_underscores_are_no_settings() -> None:
    """KVFLEET_CONFIG and other programs' variables are left alone."""
    assert config({"KVFLEET_CONFIG": "x", "KVFLEETX": "y", "KVFLEET_DISABLE_PLUGINS": "z"}) == config()


def test_the_number_after_the_last_adds_an_item() -> None:
    """So a fleet can be written in variables alone."""
    added = config({"KVFLEET__MODELS__2__ENDPOINT": "http://c:1", "KVFLEET__MODELS__2__NAME": "c"})
    assert [model.name for model in added.models] == ["llama-3", "other", "c"]


def test_whole_sections_come_before_the_values_within() -> None:
    """Whatever the order of the environment; a section is merged, a list replaced."""
    environ = {
        "KVFLEET__MODELS__0__WEIGHT": "3",
        "KVFLEET__MODELS": '[{"name": "new", "endpoint": "http://n:1"}]',
        "KVFLEET__SCORING_WEIGHTS__COST": "0.1",
        "KVFLEET__SCORING_WEIGHTS": "{cost: 0.9, quality: 0.8}",
    }
    made = config(environ)
    assert [(model.name, model.weight) for model in made.models] == [("new", 3.0)]
    assert (made.scoring_weights.cost, made.scoring_weights.quality) == (0.1, 0.8)


@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("STRATGY", "x", "stratgy: unknown key; did you mean strategy?"),
        ("GATEWAY__PROT", "1", "gateway.prot: unknown key; did you mean port?"),
        ("GATEWAY__PORT", "abc", "gateway.port: must be a whole number, not 'abc'; write a number, as in 8000"),
        ("GATEWAY__PORT", "99999", "gateway.port: must be from 0 to 65535, not 99999"),
        (
            "POLICY__ENABLED",
            "maybe",
            "policy.enabled: must be true or false, not 'maybe'; write true or false without quotes",
        ),
        (
            "GATEWAY__CORS_ORIGINS",
            "*",
            "gateway.cors_origins: must be a list, not '*'; write it as a list, as in [a, b]",
        ),
        (
            "MODELS__0__ENDPOINT",
            "gpu",
            "models[0].endpoint: must be an http:// or https:// URL, not 'gpu'; write it as in http://gpu-1:8000",
        ),
        ("MODELS__7__NAME", "x", "models: '7' is not the number of one of its 2 items; use 0 to 2; 2 adds one"),
        ("MODELS__A__NAME", "x", "models: 'a' is not the number of one of its 2 items; use 0 to 2; 2 adds one"),
        ("FLEET_NAME__X", "x", "fleet_name: holds one value, and nothing below it; shorten the variable's name"),
        ("GATEWAY__", "x", "names no setting; write it as in KVFLEET__GATEWAY__PORT"),
        ("SHADOW__SAMPLE_RATE", "2", "shadow.sample_rate: must be from 0 to 1, not 2"),
        ("DEFAULT_MODEL", "llama", "default_model: no model is called 'llama'; did you mean llama-3?"),
    ],
)
def test_a_wrong_variable_is_a_finding_at_its_name(name: str, text: str, finding: str) -> None:
    """As a wrong line of the file is one at its line."""
    assert [str(one) for one in load({f"KVFLEET__{name}": text})[1]] == [f"<environment> KVFLEET__{name}: {finding}"]


def test_overrides_are_merged_over_everything() -> None:
    """Sections deeply, lists as a whole; they win over the environment."""
    made = config(
        {"KVFLEET__GATEWAY__PORT": "1", "KVFLEET__GATEWAY__HOST": "::1"},
        {"gateway": {"port": 2}, "models": [{"name": "a", "provider": "mock"}], "tenants": {"t": {"name": "T"}}},
    )
    assert (made.gateway.host, made.gateway.port) == ("::1", 2)
    assert [model.name for model in made.models] == ["a"]
    assert sorted(made.tenants) == ["t", "team-ml"]


def test_a_wrong_override_is_a_finding_at_the_overrides() -> None:
    """Also inside a list that replaces the file's: its places do not speak of the file any more."""
    findings = load(overrides={"models": [{"name": "a", "endpoint": "x"}], "gateway": {"port": "1"}})[1]
    assert [str(finding) for finding in findings] == [
        "<overrides>: models[0].endpoint: must be an http:// or https:// URL, not 'x'; write it as in http://gpu-1:8000",
        "<overrides>: gateway.port: must be a whole number, not '1'; remove the quotes",
    ]
