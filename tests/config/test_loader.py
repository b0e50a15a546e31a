"""Fleet files, read and written."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.convert import unstructure
from kvfleet.config.loader import check_config, check_text, dump_yaml, load_config, save_config
from kvfleet.config.schema import (
    BudgetConfig,
    CacheAffinityConfig,
    FallbackConfig,
    FleetConfig,
    GatewayConfig,
    ModelCapabilities,
    ModelConfig,
    PolicyConfig,
    PolicyRule,
    ScoringWeights,
    StageConfig,
    TenantConfig,
)
from kvfleet.config.secrets import Secret
from kvfleet.errors import ConfigError, KVFleetError

FEATURE_PAGE = """\
fleet_name: my-fleet
strategy: hybrid_score

models:
  - name: llama-3-8b
    endpoint: http://gpu-1:8000
    provider: vllm
    model_id: meta-llama/Llama-3-8B-Instruct
    quality_score: 0.7
    cost_per_1k_input_tokens: 0.0
    latency_p50_ms: 200
    tags:
      domain: general
      tier: fast

  - name: gpt-4o-fallback
    endpoint: https://api.openai.com
    provider: openai_compat
    model_id: gpt-4o
    api_key: env:OPENAI_API_KEY
    quality_score: 0.95
    cost_per_1k_input_tokens: 0.005
    latency_p50_ms: 400
    allowed_data_classes: [public]
    tags:
      tier: premium

scoring_weights:
  cost: 0.3
  latency: 0.3
  quality: 0.3
  cache_affinity: 0.1

fallback:
  enabled: true
  max_attempts: 3
  fallback_order: [llama-3-8b, gpt-4o-fallback]

cache_affinity:
  enabled: true
  session_ttl_seconds: 3600
  prefix_hash_tokens: 128
"""

MODEL = "models:\n  - {name: a, endpoint: http://a}\n"


def found(text: str, **environ: str) -> list[str]:
    """The findings of a fleet file's text."""
    return [str(finding) for finding in check_text(text, file="f.yaml", environ=environ)[1]]


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    """As it stands on the features page, with its credential as a reference."""
    path = tmp_path / "fleet.yaml"
    path.write_text(FEATURE_PAGE)
    config = load_config(path, environ={"OPENAI_API_KEY": "sk-1"})
    assert config == FleetConfig(
        fleet_name="my-fleet",
        models=(
            ModelConfig(
                name="llama-3-8b",
                endpoint="http://gpu-1:8000",
                provider="vllm",
                model_id="meta-llama/Llama-3-8B-Instruct",
                quality_score=0.7,
                cost_per_1k_input_tokens=0.0,
                latency_p50_ms=200,
                tags={"domain": "general", "tier": "fast"},
            ),
            ModelConfig(
                name="gpt-4o-fallback",
                endpoint="https://api.openai.com",
                model_id="gpt-4o",
                api_key="sk-1",
                quality_score=0.95,
                cost_per_1k_input_tokens=0.005,
                latency_p50_ms=400,
                allowed_data_classes=("public",),
                tags={"tier": "premium"},
            ),
        ),
        fallback=FallbackConfig(fallback_order=("llama-3-8b", "gpt-4o-fallback")),
    )
    assert config.origin.file == str(path)
    assert config.origin.positions["models", 1, "api_key"] == (20, 5)
    assert "sk-1" not in repr(config)


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        pytest.param(
            MODEL + "stratgy: x\n", "f.yaml:3:1: stratgy: unknown key; did you mean strategy?", id="unknown-key"
        ),
        pytest.param(
            MODEL + "gateway: {port: '80'}\n",
            "f.yaml:3:11: gateway.port: must be a whole number, not '80'; remove the quotes",
            id="wrong-type",
        ),
        pytest.param(
            "models:\n  - {name: a, endpoint: http://a, cost_per_1k_input_tokens: -1}\n",
            "f.yaml:2:35: models[0].cost_per_1k_input_tokens: must be at least 0 usd, not -1",
            id="out-of-range",
        ),
        pytest.param(
            MODEL + "strategy: a\nstrategy: b\n",
            "f.yaml:4:1: strategy: duplicate key; it is on line 3 already; remove one of them",
            id="duplicate-key",
        ),
        pytest.param(
            MODEL + "fallback:\n  fallback_order: [b]\n",
            "f.yaml:4:20: fallback.fallback_order[0]: no model is called 'b'; known: a",
            id="unknown-model",
        ),
        pytest.param(
            "models:\n  - {name: llama-3, endpoint: http://a}\ndefault_model: llama3\n",
            "f.yaml:3:1: default_model: no model is called 'llama3'; did you mean llama-3?",
            id="unknown-model-with-a-near-name",
        ),
        pytest.param(
            "models:\n  - {name: a, endpoint: http://a, api_key: env:NOPE}\n",
            "f.yaml:2:35: models[0].api_key: the environment variable NOPE is not set; set NOPE, or correct the reference",
            id="unset-secret",
        ),
        pytest.param(
            "models:\n  - endpoint: http://a\n", "f.yaml:2:5: models[0].name: is missing; add `name:`", id="missing"
        ),
        pytest.param(
            "models:\n  - {name: a, endpoint: gpu-1:8000}\n",
            "f.yaml:2:15: models[0].endpoint: must be an http:// or https:// URL, not 'gpu-1:8000'; write it as in http://gpu-1:8000",
            id="bad-url",
        ),
        pytest.param(
            "models:\n  - {name: a, replicas: [gpu-1]}\n",
            "f.yaml:2:26: models[0].replicas[0]: must be an http:// or https:// URL, not 'gpu-1'; correct it",
            id="bad-url-of-a-replica",
        ),
        pytest.param(
            MODEL + "budget: {monthly_budget_usd: -1}\n",
            "f.yaml:3:10: budget.monthly_budget_usd: must be at least 0 usd, not -1",
            id="negative-budget",
        ),
        pytest.param(
            MODEL + "slo: {load_shed_threshold: 90}\n",
            "f.yaml:3:7: slo.load_shed_threshold: must be more than 0 and at most 1, not 90",
            id="a-share-in-percent",
        ),
        pytest.param(
            MODEL + "gateway: {enabled: true}\n",
            "f.yaml:3:11: gateway.enabled: means nothing; remove it; `kvfleet serve` is what starts the gateway",
            id="gateway-enabled",
        ),
        pytest.param(
            MODEL + "shadow: {shadow_models: [nobody]}\n",
            "f.yaml:3:26: shadow.shadow_models[0]: no model is called 'nobody'; known: a",
            id="shadow-unknown-model",
        ),
        pytest.param(
            MODEL + "tenants:\n  t:\n    budget: {enable: true}\n",
            "f.yaml:5:14: tenants.t.budget.enable: unknown key; did you mean enabled?",
            id="tenant-budget-unknown-key",
        ),
        pytest.param(
            MODEL + "gateway: {port: 1\n",
            "f.yaml:4:1: not valid YAML: while parsing a flow mapping expected ',' or '}', but got '<stream end>'; "
            "check the indentation, the quotes and the brackets here",
            id="syntax",
        ),
        pytest.param(
            MODEL + "tenants: {x: {name: }}\n",
            "f.yaml:3:15: tenants.x.name: has no value; write one, or remove the key",
            id="no-value",
        ),
        pytest.param(
            "- a\n", "f.yaml:1:1: a fleet file must be a mapping, not a list; begin with `models:`", id="not-a-mapping"
        ),
        pytest.param("", "f.yaml:1:1: models: is missing; add at least one model", id="empty"),
        pytest.param("models: []\n", "f.yaml:1:1: models: must have at least 1 item, not 0", id="zero-models"),
        pytest.param(
            "models:\n  - {name: a, endpoint: http://a}\n  - {name: a, endpoint: http://b}\n",
            "f.yaml:3:6: models[1].name: duplicate model 'a'; line 2 has it too; rename one, or list the endpoints of one "
            "model under `replicas`",
            id="duplicate-model",
        ),
        pytest.param(
            "models:\n  - {name: auto, endpoint: http://a}\n",
            "f.yaml:2:6: models[0].name: 'auto' is a reserved name; with it, clients leave the choice open; rename the model",
            id="reserved-name",
        ),
        pytest.param(
            "models:\n  - {name: '', endpoint: http://a}\n",
            "f.yaml:2:6: models[0].name: must be letters, digits and ._:/+-, not ''; correct it",
            id="empty-name",
        ),
        pytest.param(
            "models:\n  - {name: a}\n",
            "f.yaml:2:5: models[0]: has neither `endpoint` nor `replicas`; add `endpoint:`",
            id="no-endpoint",
        ),
        pytest.param(
            "models:\n  - {name: a, endpoint: http://a/v1/, replicas: ['http://b', 'http://a']}\n",
            "f.yaml:2:62: models[0].replicas[1]: duplicate endpoint; line 2 is the same; remove one of them",
            id="duplicate-endpoint",
        ),
        pytest.param(
            "models:\n  - {name: a, endpoint: http://a, enabled: false}\n",
            "f.yaml:1:1: models: every model is disabled; enable one",
            id="all-disabled",
        ),
        pytest.param(
            MODEL + "gateway: {keys: {a: {key: env:NOBODY_SET_IT}}}\n",
            "f.yaml:3:22: gateway.keys.a.key: the environment variable NOBODY_SET_IT is not set; set NOBODY_SET_IT, or correct the reference",
            id="key-that-is-not-set",
        ),
        pytest.param(
            MODEL + "gateway: {keys: {a: {key: ''}}}\n",
            "f.yaml:3:18: gateway.keys.a: has neither `key` nor `sha256`; give one of them",
            id="key-that-is-empty",
        ),
        pytest.param(
            MODEL + "aliases: {a: {}}\n",
            "f.yaml:3:11: aliases.a: hides the model of the same name; rename the alias: a request for that name could mean either",
            id="alias-hides-model",
        ),
        pytest.param(
            MODEL + "aliases: {fast: {models: [x]}}\n",
            "f.yaml:3:27: aliases.fast.models[0]: no model is called 'x'; known: a",
            id="alias-of-unknown-model",
        ),
        pytest.param(
            MODEL + "tenants: {t: {blocked_models: [x]}}\n",
            "f.yaml:3:32: tenants.t.blocked_models[0]: no model is called 'x'; known: a",
            id="tenant-of-unknown-model",
        ),
        pytest.param(
            MODEL + "route_rules:\n  - {name: r, condition: {data_class: public}, target_model: x}\n",
            "f.yaml:4:48: route_rules[0].target_model: no model is called 'x'; known: a",
            id="rule-of-unknown-model",
        ),
        pytest.param(
            MODEL
            + "policy: {enabled: true, rules: [{name: r, condition: always, action: block, target_models: [x]}]}\n",
            "f.yaml:3:93: policy.rules[0].target_models[0]: no model is called 'x'; known: a",
            id="policy-of-unknown-model",
        ),
        pytest.param(
            MODEL + "policy: {rules: [{name: r, condition: always, action: block}]}\n",
            "f.yaml:3:1: policy: has rules, and is not enabled; add `enabled: true`, or `enabled: false` to keep them off",
            id="policy-off",
        ),
        pytest.param(
            MODEL + "budget: {monthly_budget_usd: 5}\n",
            "f.yaml:3:1: budget: has figures, is not enabled, and binds nobody; add `enabled: true`, or `enabled: false` to keep it off",
            id="budget-off",
        ),
        pytest.param(
            MODEL + "tenants:\n  t:\n    budget: {requests_per_minute: 5}\n",
            "f.yaml:5:5: tenants.t.budget: has figures, is not enabled, and binds nobody; add `enabled: true`, or "
            "`enabled: false` to keep it off",
            id="budget-of-a-tenant-off",
        ),
        pytest.param(
            MODEL + "gateway: {keys: {a: {key: k, budget: {per_request_max_usd: 5}}}}\n",
            "f.yaml:3:30: gateway.keys.a.budget: has figures, is not enabled, and binds nobody; add `enabled: true`, or "
            "`enabled: false` to keep it off",
            id="budget-of-a-key-off",
        ),
        pytest.param(
            MODEL + "pipeline:\n  - use: admit.budget\n    with:\n      tenants:\n        t: {monthly_budget_usd: 5}\n",
            "f.yaml:7:9: pipeline[0].with.tenants.t: has figures, is not enabled, and binds nobody; add `enabled: true`, or "
            "`enabled: false` to keep it off",
            id="budget-of-a-stage-off",
        ),
        pytest.param(
            MODEL + "fallback: {max_attempts: 2}\npipeline:\n  - use: execute.fallback\n    with: {max_attempts: 3}\n",
            "f.yaml:6:5: pipeline[0].with: execute.fallback has options here and in its section (line 3); keep them in one place",
            id="two-places",
        ),
        pytest.param(
            MODEL + "policy: {enabled: true}\npipeline: [filter.health]\n",
            "f.yaml:3:1: policy: no stage of `pipeline:` applies this section; add `- filter.policy`, or remove the section",
            id="policy-unused",
        ),
        pytest.param(
            MODEL + "tenants: {t: {}}\npipeline: [filter.health]\n",
            "f.yaml:3:1: tenants: no stage of `pipeline:` applies this section; add `- filter.tenant`, or remove the section",
            id="tenants-unused",
        ),
    ],
)
def test_a_finding_says_what_where_and_what_to_do(text: str, finding: str) -> None:
    """In exactly these words, because people search for them."""
    assert found(text) == [finding]


@pytest.mark.parametrize(
    "text",
    [
        "budget: {enabled: false, monthly_budget_usd: 5}\n",
        "budget: {}\n",
        "tenants: {t: {budget: {enabled: false, monthly_budget_usd: 5}}}\n",
        "gateway: {keys: {a: {key: k, budget: {enabled: false, monthly_budget_usd: 5}}}}\n",
        "pipeline: [{use: admit.budget, with: {budget: {enabled: false, monthly_budget_usd: 5}}}]\n",
    ],
)
def test_a_budget_that_is_switched_off_is_no_finding(text: str) -> None:
    """Its figures may wait there for a better day; one without figures says nothing."""
    assert found(MODEL + text) == []


def test_a_budget_is_switched_on_from_elsewhere() -> None:
    """By the environment, as anything else."""
    assert found(MODEL + "budget: {monthly_budget_usd: 5}\n", KVFLEET__BUDGET__ENABLED="true") == []


def test_an_override_of_the_wrong_type_is_placed_at_its_variable() -> None:
    """Not at the file's line that it overrides."""
    text = MODEL + "gateway: {port: 1}\n"
    assert found(text, KVFLEET__GATEWAY__PORT="http") == [
        "<environment> KVFLEET__GATEWAY__PORT: gateway.port: must be a whole number, not 'http'; write a number, as in 8000"
    ]


def test_all_findings_come_in_the_order_of_the_file() -> None:
    """YAML's own, the vocabulary's and those between the parts; then those from elsewhere."""
    text = "fleet_name: 8\nmodels:\n  - {name: a}\n  - {name: a, endpoint: http://b}\nstratgy: x\nfleet_name: x\n"
    codes = [finding.code for finding in check_text(text, file="f", environ={"KVFLEET__X": "1"})[1]]
    assert codes == ["type", "missing", "duplicate-model", "unknown-key", "duplicate-key", "unknown-key"]


def test_load_raises_all_findings_together(tmp_path: Path) -> None:
    """As a ConfigError, which is a ValueError."""
    path = tmp_path / "f.yaml"
    path.write_text("models: 5\nx: 1\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path, environ={})
    assert isinstance(raised.value, ValueError | KVFleetError)
    first, second = str(raised.value).split("\n")
    assert first == f"{path}:1:1: models: must be a list, not the number 5; write it as a list, as in [a, b]"
    assert second.startswith(f"{path}:2:1: x: unknown key; known: aliases, budget, cache_affinity, ")


def test_check_gives_what_can_be_looked_at_further() -> None:
    """A typing mistake in one key does not hide the findings of the pipeline; a wrong value does not pass."""
    config, findings = check_text(MODEL + "stratgy: x\n", environ={})
    assert (config, len(findings)) == (FleetConfig(models=(ModelConfig(name="a", endpoint="http://a"),)), 1)
    assert check_text(MODEL + "strategy: 1\n", environ={})[0] is None


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    """KVFLEET_CONFIG is the path if none is given."""
    path = tmp_path / "f.yaml"
    path.write_text(MODEL)
    assert load_config(environ={"KVFLEET_CONFIG": str(path)}).models[0].name == "a"


def test_without_a_file_the_other_layers_must_do() -> None:
    """A fleet may come from the environment and the program alone; nothing at all is a finding."""
    config = load_config(None, {"models": [{"name": "a", "provider": "mock"}]}, environ={"KVFLEET__FLEET_NAME": "f"})
    assert (config.fleet_name, config.models) == ("f", (ModelConfig(name="a", provider="mock"),))
    with pytest.raises(ConfigError, match=r"^models: is missing; give a file, or set KVFLEET_CONFIG$"):
        load_config(environ={})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file is FileNotFoundError, as for any file; anything else is a finding."""
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"a: \xff\n")
    assert [str(check_config(path, environ={})[1][0]) for path in (tmp_path, tmp_path / "bad.yaml")] == [
        f"{tmp_path}: cannot be read: is a directory; give a fleet file",
        f"{tmp_path / 'bad.yaml'}: byte 3 is not UTF-8; save the file as UTF-8",
    ]


def test_plugins_resolve_other_references() -> None:
    """Through the resolvers given; a reference nobody resolves is a finding."""
    text = "models:\n  - {name: a, endpoint: http://a, api_key: 'vault:kv/x'}\n"
    config, findings = check_text(text, environ={}, resolvers=[lambda reference: f"value of {reference}"])
    assert findings == ()
    assert config is not None
    assert config.models[0].api_key == "value of vault:kv/x"
    assert found(text) == [
        "f.yaml:2:35: models[0].api_key: no plugin resolves `vault:` references; install one, or use env:NAME or file:/path"
    ]


# Saving


def test_a_saved_file_holds_references_and_no_secret(tmp_path: Path) -> None:
    """Whether a secret was written out, resolved, or set by a program."""
    text = (
        "models:\n"
        "  - {name: a, endpoint: http://a, api_key: env:K, custom_headers: {X-A: hidden-1, X-B: env:K}}\n"
        "  - {name: b, endpoint: http://b, api_key: hidden-2, options: {token: hidden-3}}\n"
        "gateway: {api_key: hidden-4, api_keys: {team: env:K, other: hidden-5}}\n"
        "telemetry: {otlp: {headers: {authorization: hidden-6}}}\n"
    )
    config, findings = check_text(text, environ={"K": "hidden-7"})
    assert findings == ()
    assert config is not None
    config = attrs.evolve(
        config, models=(*config.models, ModelConfig(name="c", endpoint="http://c", api_key="hidden-8"))
    )
    path = tmp_path / "deep" / "saved.yaml"
    save_config(config, path)
    saved = path.read_text()
    assert "hidden" not in saved + repr(config)
    assert saved == (
        "models:\n"
        "  - name: a\n"
        "    endpoint: http://a\n"
        "    api_key: env:K\n"
        "    custom_headers:\n"
        "      X-B: env:K\n"
        "  - name: b\n"
        "    endpoint: http://b\n"
        "  - name: c\n"
        "    endpoint: http://c\n"
        "gateway:\n"
        "  api_keys:\n"
        "    team: env:K\n"
    )
    assert [other.name for other in path.parent.iterdir()] == ["saved.yaml"]


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
names = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
hosts = st.sampled_from(["http://a", "https://b:8000/v1", "http://gpu-1:1"])
models = st.builds(
    ModelConfig,
    name=names.filter(lambda name: name != "auto"),
    endpoint=hosts,
    provider=names,
    api_key=st.sampled_from(["", Secret("v", "env:K")]),
    capabilities=st.builds(
        ModelCapabilities, supports_tools=st.booleans(), max_context_window=st.none() | st.integers(1)
    ),
    cost_per_1k_input_tokens=st.none() | st.floats(0, 1e9),
    quality_score=st.floats(0, 1),
    allowed_data_classes=st.lists(st.sampled_from(["public", "internal"]), max_size=2).map(tuple),
    private=st.none() | st.booleans(),
    tags=st.dictionaries(words, words, max_size=2),
    custom_headers=st.just({"X-A": Secret("v", "env:K")}) | st.just({}),
)
fleets = st.builds(
    FleetConfig,
    fleet_name=words,
    models=st.lists(models, min_size=1, max_size=3, unique_by=lambda model: model.name).map(tuple),
    scoring_weights=st.builds(ScoringWeights, cost=st.floats(0, 1)),
    cache_affinity=st.builds(CacheAffinityConfig, enabled=st.booleans()),
    budget=st.builds(BudgetConfig, enabled=st.booleans(), monthly_budget_usd=st.floats(0, 1e9)),
    policy=st.builds(
        PolicyConfig,
        enabled=st.booleans(),
        rules=st.lists(st.builds(PolicyRule, name=words, condition=words, action=words), max_size=1).map(tuple),
    ),
    tenants=st.dictionaries(words, st.builds(TenantConfig, name=words), max_size=2),
    gateway=st.builds(GatewayConfig, port=st.integers(0, 65535), cors_origins=st.lists(words, max_size=2).map(tuple)),
    tests=st.lists(st.dictionaries(words, words, max_size=2), max_size=1).map(tuple),
)


@given(fleets)
def test_a_saved_fleet_reads_back_as_it_was(fleet: FleetConfig) -> None:
    """Every value and every reference."""
    again, findings = check_text(dump_yaml(unstructure(fleet)), environ={"K": "v"})
    assert [str(finding) for finding in findings if finding.code != "no-models"] == []
    assert again == fleet


def test_stages_are_saved_as_they_are_written(tmp_path: Path) -> None:
    """In the short form where that says it all."""
    stages = (
        StageConfig(use="filter.health", path=("pipeline", 0)),
        StageConfig(use="select.x", name="mine", on_error="fail", options={"n": 1}, path=("pipeline", 1)),
    )
    path = tmp_path / "f.yaml"
    save_config(FleetConfig(models=(ModelConfig(name="a", provider="mock"),), pipeline=stages), path)
    assert path.read_text().endswith(
        "pipeline:\n  - filter.health\n  - use: select.x\n    name: mine\n    on_error: fail\n    with:\n      n: 1\n"
    )
    assert load_config(path, environ={}).pipeline == stages


def test_saving_keeps_a_files_permissions(tmp_path: Path) -> None:
    """An operator who narrowed them meant it."""
    path = tmp_path / "f.yaml"
    path.write_text(MODEL)
    path.chmod(0o600)
    save_config(load_config(path, environ={}), path)
    assert path.stat().st_mode & 0o777 == 0o600
