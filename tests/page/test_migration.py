"""A flat fleet file of 0.11: every key of it is read, and every default that differs stands on the migration page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from kvfleet.config.loader import dump_yaml
from kvfleet.config.schema import FleetConfig, ModelConfig, TenantConfig
from tests.page.printed import findings
from tests.page.promises import ROOT

PAGE = (ROOT / "docs" / "how-to" / "migrate.md").read_text()

DEFAULTS: Mapping[str, Any] = {
    "fleet_name": "default",
    "strategy": "hybrid_score",
    "scoring_weights": {"cost": 0.3, "latency": 0.3, "quality": 0.3, "cache_affinity": 0.1, "hardware_load": 0.0, "compliance": 0.0},
    "fallback": {"enabled": True, "max_attempts": 3, "promote_on_timeout": True, "fallback_order": [], "timeout_ms": 10000.0},
    "cache_affinity": {"enabled": True, "session_ttl_seconds": 3600, "prefix_hash_tokens": 128, "min_affinity_score": 0.3, "consistent_hash_replicas": 150},
    "shadow": {"enabled": False, "shadow_models": [], "sample_rate": 0.1, "log_outputs": True, "compare_outputs": False},
    "telemetry": {"prometheus_enabled": True, "prometheus_port": 9090, "health_check_interval_seconds": 30, "structured_logs": True, "log_route_decisions": True},
    "policy": {"enabled": False, "pii_detection": False, "rules": [], "default_data_class": "internal"},
    "budget": {"enabled": False, "monthly_budget_usd": 1000.0, "per_request_max_usd": 1.0, "alert_threshold_pct": 80.0, "throttle_on_exceed": True},
    "gateway": {
        "host": "0.0.0.0",
        "port": 8000,
        "api_key": "",
        "cors_origins": ["*"],
        "passthrough_headers": [],
        "strategy_header": "X-KVFleet-Strategy",
        "model_allowlist_header": "X-KVFleet-Models",
        "tenant_header": "",
        "timeout_header": "X-KVFleet-Timeout",
    },
    "tenants": {},
    "route_rules": [],
    "default_model": "",
}  # fmt: skip
"""What 0.11 took a fleet file to mean that says nothing; without `slo` and `gateway.enabled`, which are told apart."""

MODEL: Mapping[str, Any] = {
    "provider": "openai_compat",
    "model_id": "",
    "replicas": [],
    "capabilities": {"supports_tools": False, "supports_json_mode": False, "supports_streaming": True, "supports_vision": False, "max_context_window": 4096, "supported_languages": ["en"], "model_type": "chat"},
    "cost_per_1k_input_tokens": 0.0,
    "cost_per_1k_output_tokens": 0.0,
    "latency_p50_ms": 500.0,
    "latency_p95_ms": 2000.0,
    "quality_score": 0.5,
    "allowed_data_classes": ["public", "internal", "confidential"],
    "tags": {},
    "weight": 1.0,
    "enabled": True,
    "api_key": "",
    "custom_headers": {},
    "custom_chat_path": "/generate",
    "custom_health_path": "/health",
    "timeout_seconds": 60.0,
    "max_retries": 2,
}  # fmt: skip
"""The same of a model. (`custom_request_template` has to hold something, or be left out.)"""

TENANT: Mapping[str, Any] = {
    "preferred_models": [],
    "blocked_models": [],
    "max_cost_per_request": None,
    "max_latency_ms": None,
    "allowed_data_classes": ["public", "internal"],
}


def differing(old: Mapping[str, Any], cls: type, path: str = "") -> Iterator[str]:
    """The keys whose default is another one now."""
    fields = attrs.fields_dict(cls)
    for key, value in old.items():
        default = fields[key].default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()  # type: ignore[union-attr]
        if attrs.has(type(default)):
            yield from differing(value, type(default), f"{path}{key}.")
        elif (list(default) if isinstance(default, tuple) else default) != value:
            yield f"{path}{key}"


def test_every_default_that_differs_is_on_the_page() -> None:
    """And no other key stands in its table of defaults."""
    found = {
        *differing(DEFAULTS, FleetConfig),
        *differing(MODEL, ModelConfig, "models[]."),
        *differing(TENANT, TenantConfig, "tenants."),
    }
    table = PAGE.partition("## 4. Look at the defaults")[2].partition("Whoever needs")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in row.replace("`", "").replace(" ", "").split(",")}
    assert told == found


def test_a_file_with_every_key_of_0_11_is_valid() -> None:
    """Written out with the defaults of then, as `save_config` of 0.11 may have done."""
    model = {"name": "m", "endpoint": "http://m:8000", **MODEL}
    assert findings(dump_yaml({**DEFAULTS, "models": [model], "tenants": {"t": {"name": "T"}}})) == []
