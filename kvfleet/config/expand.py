"""From the flat sections of a fleet file to the stages of a pipeline: one pure function.

`kvfleet graph --expand` prints the result as YAML that can be pasted. Options are plain data, as if written under
`with:`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from kvfleet.config.convert import unstructure
from kvfleet.config.findings import Path
from kvfleet.config.overload import OverloadConfig
from kvfleet.config.schema import SELF_HOSTED_PROVIDERS, FallbackConfig, FleetConfig, ModelConfig, StageConfig

__all__ = ["default_data_class", "expand", "options_from_section", "section_for", "section_path", "strategy_of"]

_RETRYING = ("backoff_ms", "longest_wait_ms", "retry_ratio", "min_retries_per_second", "continue_streams")
_TOLD_APART = ("quality_score", "cost_per_1k_input_tokens", "cost_per_1k_output_tokens")

Options = dict[str, Any]
_DOMAIN = re.compile(r"(?<![\w.'\"])domain\b")


def expand(config: FleetConfig) -> tuple[StageConfig, ...]:
    """The default pipeline, as the sections describe it: what a file means that has no ``pipeline:``.

    A stage whose section is written in the file carries no options, because it takes that section: so the result can be
    pasted into the same file, and nothing is said twice.
    """
    return tuple(_stage(config, use) for use in _uses(config))


def _uses(config: FleetConfig) -> list[str]:
    """The stages of the default pipeline, in order; some only if their section switches them on."""
    affinity = config.cache_affinity.enabled
    wanted = [
        ("classify.prompt", True),
        ("classify.modality", True),
        ("classify.language", any(model.capabilities.supported_languages for model in config.models)),
        ("classify.pii", _looks_for_pii(config)),
        ("classify.domain", _tells_domains(config)),
        ("admit.concurrency", bool(_concurrency(config))),
        ("filter.policy", _has_policy(config)),
        ("filter.tenant", bool(config.tenants)),
        ("filter.budget", _has_budget(config)),
        ("filter.shadow_only", config.shadow.exclusive and bool(config.shadow.shadow_models)),
        ("answer.semantic_cache", config.semantic_cache.enabled),
        ("filter.capabilities", True),
        ("admit.queue", _queues(config)),
        ("filter.health", True),
        ("filter.service_level", config.slo.enabled),
        ("filter.rate_limits", True),
        ("filter.overload", _sheds(config)),
        ("filter.room", bool(config.overload.max_in_flight_per_replica)),
        ("admit.budget", _has_budget(config)),
        ("classify.tokens", affinity and _has_tokens(config)),
        ("affinity.prefix", affinity),
        ("score.cost", True),
        ("score.latency", True),
        ("score.quality", True),
        ("score.cache_affinity", affinity),
        ("score.hardware_load", True),
        ("score.compliance", config.scoring_weights.compliance > 0),
        ("score.capacity", config.scoring_weights.capacity > 0),
        (f"select.{strategy_of(config)}", True),
        ("execute.fallback", True),
        ("observe.metrics", True),
        ("observe.log", config.telemetry.log_route_decisions),
        ("observe.shadow", config.shadow.enabled),
    ]
    return [use for use, is_on in wanted if is_on]


def strategy_of(config: FleetConfig) -> str:
    """The strategy that chooses if no request asks for another.

    A file that names none gets `expected_latency` if all its models are self-hosted and alike in quality and price, so
    that nothing but time tells their replicas apart; else `hybrid_score`.
    """
    models = [model for model in config.models if model.enabled]
    if not config.origin.file or config.origin.sets(("strategy",)) or not models:
        return config.strategy
    is_own = all(model.provider in SELF_HOSTED_PROVIDERS for model in models)
    are_alike = all(len({getattr(model, name) for model in models}) == 1 for name in _TOLD_APART)
    return "expected_latency" if is_own and are_alike else config.strategy


def _has_policy(config: FleetConfig) -> bool:
    """True if the policy is on, or a model declares who may see what: what models declare holds in any case."""
    usual = attrs.fields(ModelConfig).allowed_data_classes.default
    return config.policy.enabled or any(model.allowed_data_classes != usual for model in config.models)


def _has_tokens(config: FleetConfig) -> bool:
    return any(model.prompt_blocks.mode != "bytes" for model in config.models)


def _has_budget(config: FleetConfig) -> bool:
    budgets = [tenant.budget for tenant in config.tenants.values()]
    budgets += [key.budget for key in config.gateway.keys.values()]
    return config.budget.enabled or any(budget.enabled for budget in budgets)


def _sheds(config: FleetConfig) -> bool:
    return config.slo.enabled and config.slo.load_shed_threshold is not None


def _queues(config: FleetConfig) -> bool:
    return bool(config.overload.max_in_flight or config.overload.max_in_flight_per_replica)


def _looks_for_pii(config: FleetConfig) -> bool:
    policy = config.policy
    return policy.enabled and (policy.pii_detection or any("pii" in rule.condition for rule in policy.rules))


def _tells_domains(config: FleetConfig) -> bool:
    """True if the strategy, or a rule, reads what prompts are about."""
    if config.strategy in ("semantic", "domain"):
        return True
    by_rule = config.strategy == "rules" and any("domain" in rule.condition for rule in config.route_rules)
    return by_rule or (config.policy.enabled and any(_DOMAIN.search(rule.condition) for rule in config.policy.rules))


def _stage(config: FleetConfig, use: str) -> StageConfig:
    section = section_path(use)
    is_written = bool(section) and config.origin.sets(section)
    return StageConfig(use=use, options={} if is_written else options_from_section(config, use))


def default_data_class(config: FleetConfig) -> str:
    """The data class of a request that names none: as `filter.policy` has it, under `with:` or in its section."""
    for stage in config.pipeline:
        found = stage.options.get("default_data_class") if stage.use == "filter.policy" else None
        if isinstance(found, str):
            return found
    return config.policy.default_data_class


def section_for(use: str) -> str:
    """The section of a fleet file that a stage takes its options from when it has no `with:`; empty for none."""
    return str(section_path(use)[0]) if section_path(use) else ""


def section_path(use: str) -> Path:
    """The path of what a stage takes from the file when it has no `with:`; empty for nothing."""
    found = _SECTIONS.get(use)
    return found[0] if found else ()


def options_from_section(config: FleetConfig, use: str) -> Options:
    """A stage's options as its section describes them; empty if no section speaks of it."""
    found = _SECTIONS.get(use)
    return found[1](config) if found else {}


def _policy(config: FleetConfig) -> Options:
    policy = config.policy
    options: Options = {"default_data_class": policy.default_data_class}
    if not policy.enabled:  # the stage is there for what the models declare
        return options
    if policy.pii_detection:
        options["pii"] = True
    if policy.rules:
        options["rules"] = [unstructure(rule) for rule in policy.rules]
    return options


def _tenants(config: FleetConfig) -> Options:
    return {"tenants": {name: unstructure(tenant) for name, tenant in config.tenants.items()}}


def _budget(config: FleetConfig) -> Options:
    tenants = {name: unstructure(tenant.budget) for name, tenant in config.tenants.items() if tenant.budget.enabled}
    keys = {name: unstructure(key.budget) for name, key in config.gateway.keys.items() if key.budget.enabled}
    options: Options = {"budget": unstructure(config.budget)} if config.budget.enabled else {}
    return {**options, **({"tenants": tenants} if tenants else {}), **({"keys": keys} if keys else {})}


def _ledger(config: FleetConfig) -> Options:
    return {**_budget(config), "fleet": config.fleet_name}


def _service_level(config: FleetConfig) -> Options:
    slo = config.slo
    limits = {
        name: getattr(slo, name) for name in ("target_p95_latency_ms", "max_cost_per_request", "min_quality_score")
    }
    return {name: limit for name, limit in limits.items() if limit is not None} if slo.enabled else {}


def _overload(config: FleetConfig) -> Options:
    return {"load_shed_threshold": config.slo.load_shed_threshold} if _sheds(config) else {}


def _queue(config: FleetConfig) -> Options:
    section = config.overload
    options = {field.name: getattr(section, field.name) for field in attrs.fields(OverloadConfig)}
    return {**options, "tenants": {name: unstructure(share) for name, share in section.tenants.items()}}


def _room(config: FleetConfig) -> Options:
    most = config.overload.max_in_flight_per_replica
    return {"max_in_flight_per_replica": most} if most else {}


def _fallback(config: FleetConfig) -> Options:
    fallback = config.fallback
    if not fallback.enabled:
        return {"max_attempts": 1, "timeout_ms": fallback.timeout_ms}
    options: Options = {
        "max_attempts": fallback.max_attempts,
        "timeout_ms": fallback.timeout_ms,
        "promote_on_timeout": fallback.promote_on_timeout,
    }
    if fallback.fallback_order:
        options["fallback_order"] = list(fallback.fallback_order)
    usual = attrs.fields_dict(FallbackConfig)
    changed = {name: getattr(fallback, name) for name in _RETRYING}
    return options | {name: value for name, value in changed.items() if value != usual[name].default}


def _affinity(config: FleetConfig) -> Options:
    section = config.cache_affinity
    return {
        "session_ttl_s": section.session_ttl_seconds,
        "prefix_tokens": section.prefix_hash_tokens,
        "virtual_nodes": section.consistent_hash_replicas,
        "min_affinity": section.min_affinity_score,
    }


def _semantic_cache(config: FleetConfig) -> Options:
    section = config.semantic_cache
    return {
        "max_size": section.max_size,
        "ttl_s": section.ttl_seconds,
        "similarity_threshold": section.similarity_threshold,
        "any_temperature": section.any_temperature,
    }


def _weights(config: FleetConfig) -> Options:
    return {"weights": attrs.asdict(config.scoring_weights)}


def _rules(config: FleetConfig) -> Options:
    return {"rules": [unstructure(rule) for rule in config.route_rules], **_weights(config)}


def _shadow(config: FleetConfig) -> Options:
    shadow = config.shadow
    return {
        "shadow_models": list(shadow.shadow_models),
        "sample_rate": shadow.sample_rate,
        "log_outputs": shadow.log_outputs,
        "compare_outputs": shadow.compare_outputs,
    }


def _shadow_only(config: FleetConfig) -> Options:
    return {"shadow_models": list(config.shadow.shadow_models)}


def _default_model(config: FleetConfig) -> Options:
    return {"default_model": config.default_model}


def _domain_models(config: FleetConfig) -> Options:
    return {"domain_model_map": dict(config.domain_models)} if config.domain_models else {}


def _concurrency(config: FleetConfig) -> Options:
    gateway = config.gateway
    keys = {name: key.max_concurrent for name, key in gateway.keys.items() if key.max_concurrent}
    options: Options = {"max_concurrent": gateway.max_concurrent} if gateway.max_concurrent else {}
    return {**options, "keys": keys} if keys else options


_SECTIONS: Mapping[str, tuple[Path, Callable[[FleetConfig], Options]]] = {
    "filter.policy": (("policy",), _policy),
    "filter.tenant": (("tenants",), _tenants),
    "filter.service_level": (("slo",), _service_level),
    "filter.overload": (("slo",), _overload),
    "admit.queue": (("overload",), _queue),
    "filter.room": (("overload",), _room),
    "filter.shadow_only": (("shadow",), _shadow_only),
    "observe.shadow": (("shadow",), _shadow),
    "execute.fallback": (("fallback",), _fallback),
    "answer.semantic_cache": (("semantic_cache",), _semantic_cache),
    "affinity.prefix": (("cache_affinity",), _affinity),
    "select.hybrid_score": (("scoring_weights",), _weights),
    "select.rules": (("route_rules",), _rules),
    "select.static": (("default_model",), _default_model),
    "select.domain": (("domain_models",), _domain_models),
    "filter.budget": (("budget",), _budget),
    "admit.budget": (("budget",), _ledger),
    "admit.concurrency": (("gateway", "max_concurrent"), _concurrency),
}
