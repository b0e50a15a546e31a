"""The names that the page documents, and those of the earlier package's face."""

from __future__ import annotations

import importlib

import attrs
import pytest

import kvfleet
from kvfleet.config import schema
from kvfleet.config.convert import unstructure
from kvfleet.config.schema import FleetConfig, ModelConfig, ProviderType, RouteStrategy
from kvfleet.pipeline.build import check
from kvfleet.plugin.contract import Kind
from tests.page.printed import TABLE

FACE = [
    "AsyncFleetClient",
    "FleetConfig",
    "ModelConfig",
    "ModelRegistry",
    "RouteExplanation",
    "RouteStrategy",
    "Router",
    "SyncFleetClient",
    "load_config",
    "save_config",
    "__version__",
]

DOCUMENTED = {
    "kvfleet": "Router",
    "kvfleet.adapters.base": "ChatMessage ChatRequest EndpointHealth",
    "kvfleet.adapters.custom_http": "CustomHTTPAdapter",
    "kvfleet.adapters.ollama": "OllamaAdapter",
    "kvfleet.adapters.tgi": "TGIAdapter",
    "kvfleet.adapters.triton": "TritonAdapter",
    "kvfleet.adapters.vllm": "VLLMAdapter",
    "kvfleet.cache.fingerprints": "PromptFingerprinter",
    "kvfleet.cache.kv_affinity": "KVAffinityScorer",
    "kvfleet.cache.semantic_cache": "SemanticCache",
    "kvfleet.config.loader": "load_config save_config",
    "kvfleet.config.schema": (
        "BudgetConfig FallbackConfig ModelConfig PolicyConfig PolicyRule ProviderType RouteRuleConfig RouteStrategy "
        "ScoringWeights TenantConfig"
    ),
    "kvfleet.eval.compare": "ModelComparator ReplayEngine",
    "kvfleet.eval.shadow": "ShadowTrafficManager",
    "kvfleet.gateway.dashboard": "DashboardState start_dashboard",
    "kvfleet.policy.engine": "PolicyContext PolicyEngine",
    "kvfleet.policy.pii": "PIIDetector",
    "kvfleet.policy.residency": "ResidencyEngine ResidencyRule",
    "kvfleet.policy.tenant": "TenantManager",
    "kvfleet.registry.models": "ModelRegistry",
    "kvfleet.router.fallback": "EscalationChain FallbackChain",
    "kvfleet.router.learned": "EpsilonGreedyStrategy Exp3Strategy ThompsonSamplingStrategy UCB1Strategy compute_reward",
    "kvfleet.router.multimodal": "detect_modality filter_vision_capable",
    "kvfleet.router.scoring": "ScoringContext ScoringEngine",
    "kvfleet.router.semantic": "DomainStrategy SemanticStrategy classify_domain",
    "kvfleet.router.strategies": "CheapCascadeStrategy CostFirstStrategy LatencyFirstStrategy QualityFirstStrategy RulesStrategy StaticStrategy",
    "kvfleet.sdk.async_client": "AsyncFleetClient",
    "kvfleet.sdk.sync_client": "SyncFleetClient",
    "kvfleet.telemetry.cost_sync": "CostSyncManager",
    "kvfleet.telemetry.health": "HealthManager",
    "kvfleet.telemetry.metrics": "MetricsExporter",
    "kvfleet.telemetry.rate_limits": "RateLimitTracker",
}
"""What the page imports, by module."""

FIELDS = {
    "ModelCapabilities": "supports_tools supports_json_mode supports_streaming supports_vision max_context_window supported_languages model_type",
    "ModelConfig": (
        "name endpoint provider model_id replicas capabilities cost_per_1k_input_tokens cost_per_1k_output_tokens "
        "latency_p50_ms latency_p95_ms quality_score allowed_data_classes tags weight enabled api_key custom_headers "
        "custom_chat_path custom_health_path custom_request_template timeout_seconds max_retries"
    ),
    "FallbackConfig": "enabled max_attempts promote_on_timeout fallback_order timeout_ms",
    "ScoringWeights": "cost latency quality cache_affinity hardware_load compliance",
    "CacheAffinityConfig": "enabled session_ttl_seconds prefix_hash_tokens min_affinity_score consistent_hash_replicas",
    "ShadowConfig": "enabled shadow_models sample_rate log_outputs compare_outputs",
    "TelemetryConfig": "prometheus_enabled prometheus_port health_check_interval_seconds structured_logs log_route_decisions",
    "PolicyRule": "name description condition action target_models priority",
    "PolicyConfig": "enabled pii_detection rules default_data_class",
    "BudgetConfig": "enabled monthly_budget_usd per_request_max_usd alert_threshold_pct throttle_on_exceed",
    "TenantConfig": "name preferred_models blocked_models max_cost_per_request max_latency_ms allowed_data_classes budget",
    "GatewayConfig": "host port api_key cors_origins passthrough_headers strategy_header model_allowlist_header tenant_header timeout_header",
    "RouteRuleConfig": "name condition target_model priority",
    "FleetConfig": "fleet_name models strategy scoring_weights fallback cache_affinity shadow telemetry policy budget gateway tenants route_rules default_model",
}
"""The sections of a fleet file as 0.11 had them; `gateway.enabled` and `slo` are told apart when a file is read."""


@pytest.mark.parametrize("name", FACE)
def test_the_face_has_it(name: str) -> None:
    """`from kvfleet import …` gives it, and it is listed."""
    assert getattr(kvfleet, name)
    assert name in kvfleet.__all__
    assert name in dir(kvfleet)


@pytest.mark.parametrize("module", DOCUMENTED)
def test_a_module_has_what_the_page_imports(module: str) -> None:
    """Each name, in its `__all__`: it is public, and it is typed and documented like all that is."""
    found = importlib.import_module(module)
    names = DOCUMENTED[module].split()
    assert [name for name in names if not hasattr(found, name) or name not in found.__all__] == []


@pytest.mark.parametrize("name", FIELDS)
def test_a_section_has_its_keys(name: str) -> None:
    """All those of 0.11; there may be more."""
    have = {field.name for field in attrs.fields(getattr(schema, name))}
    assert set(FIELDS[name].split()) - have == set()


@pytest.mark.parametrize("strategy", list(RouteStrategy), ids=str)
def test_an_enumerated_strategy_exists_and_may_be_configured(strategy: RouteStrategy) -> None:
    """Each member is a strategy that a fleet can have, and that is saved as its name."""
    assert strategy in TABLE.names(Kind.SELECT) or TABLE.get(Kind.SELECT, strategy)
    config = FleetConfig(models=(ModelConfig(name="m", provider=ProviderType.MOCK),), strategy=strategy)
    assert check(config, TABLE) == []
    assert unstructure(config) == {
        "models": [{"name": "m", "provider": "mock"}],
        **({} if strategy == "hybrid_score" else {"strategy": strategy.value}),
    }


def test_the_enumerated_providers_are_the_adapters_there_are() -> None:
    """Each member, and no other of kvfleet's own."""
    own = {one.name for one in TABLE.of_kind(Kind.ADAPTER) if one.distribution.startswith("kvfleet")}
    assert {provider.value for provider in ProviderType} == own
