"""What must hold between the parts of a fleet file; read from the plain data, so that it runs beside other findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from kvfleet.config.budget_checks import check_budgets
from kvfleet.config.cache_checks import check_caches
from kvfleet.config.expand import section_path
from kvfleet.config.findings import Finding, Path
from kvfleet.config.key_checks import check_keys
from kvfleet.config.origin import Origin
from kvfleet.config.port_checks import check_ports
from kvfleet.config.schema import AUTO_MODEL, SELF_HOSTED_PROVIDERS, FleetConfig

__all__ = ["check_data", "check_stages", "model_names"]

# Providers that are wherever their operator put them. Others may know their place, or have none (`mock`); an adapter of
# a plugin's that needs one says so itself when it is built.
_PLACED = (SELF_HOSTED_PROVIDERS - {"mock"}) | {"openai_compat", "custom_http", None}


def model_names(data: Mapping[str, Any]) -> frozenset[str]:
    """The names of the fleet's models."""
    return frozenset(name for _, model in _models(data) if isinstance(name := _get(model, "name"), str))


def check_data(data: Mapping[str, Any], origin: Origin) -> list[Finding]:
    """Models and aliases: there are some, told apart, and each can be reached."""
    return [*_check_fleet(data, origin), *_check_models(data, origin), *_check_aliases(data, origin)]


def _models(data: Mapping[str, Any]) -> list[tuple[int, Any]]:
    models = data.get("models")
    return list(enumerate(models)) if isinstance(models, list | tuple) else []


def _get(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)


def _check_fleet(data: Mapping[str, Any], origin: Origin) -> Iterator[Finding]:
    if "models" not in data:
        remedy = "add at least one model" if origin.file else "give a file, or set KVFLEET_CONFIG"
        yield origin.finding(("models",), "is missing", remedy, code="missing")
    models = [model for _, model in _models(data)]
    if models and all(_get(model, "enabled") is False for model in models):
        yield origin.finding(("models",), "every model is disabled", "enable one", code="no-models")


def _check_models(data: Mapping[str, Any], origin: Origin) -> Iterator[Finding]:
    seen: dict[str, int] = {}
    for index, model in _models(data):
        path: Path = ("models", index)
        name = _get(model, "name")
        if isinstance(name, str):
            if name == AUTO_MODEL:
                remedy = "with it, clients leave the choice open; rename the model"
                yield origin.finding((*path, "name"), f"{AUTO_MODEL!r} is a reserved name", remedy, code="reserved")
            elif name in seen:
                first = origin.place_of(("models", seen[name], "name"))
                remedy = f"{first} has it too; rename one, or list the endpoints of one model under `replicas`"
                yield origin.finding((*path, "name"), f"duplicate model {name!r}", remedy, code="duplicate-model")
            seen.setdefault(name, index)
        yield from _check_endpoints(model, path, origin)


def _check_endpoints(model: Any, path: Path, origin: Origin) -> Iterator[Finding]:
    if not isinstance(model, Mapping) and not attrs.has(type(model)):
        return
    endpoint, replicas = _get(model, "endpoint"), _get(model, "replicas")
    written: list[tuple[Path, Any]] = [((*path, "endpoint"), endpoint)] if endpoint else []
    if isinstance(replicas, list | tuple):
        written += [((*path, "replicas", index), replica) for index, replica in enumerate(replicas)]
    if not written and _get(model, "provider") in _PLACED:
        yield origin.finding(path, "has neither `endpoint` nor `replicas`", "add `endpoint:`", code="missing")
    seen: dict[str, Path] = {}
    for place, url in written:
        if not isinstance(url, str):
            continue
        bare = url.rstrip("/").removesuffix("/v1").rstrip("/")  # an endpoint may be written with or without /v1
        if bare in seen:
            remedy = f"{origin.place_of(seen[bare])} is the same; remove one of them"
            yield origin.finding(place, "duplicate endpoint", remedy, code="duplicate-endpoint")
        seen.setdefault(bare, place)


def _check_aliases(data: Mapping[str, Any], origin: Origin) -> Iterator[Finding]:
    aliases = data.get("aliases")
    names = model_names(data) | {AUTO_MODEL}
    for alias in aliases if isinstance(aliases, Mapping) else ():
        if alias in names:
            remedy = "rename the alias: a request for that name could mean either"
            yield origin.finding(("aliases", alias), "hides the model of the same name", remedy, code="alias")


def check_stages(config: FleetConfig) -> list[Finding]:
    """A stage's options stand in one place, a section that guards something is used, and keys can be told apart."""
    found = [*_check_options(config), *_check_guards(config), *_check_switch(config)]
    return [*found, *check_budgets(config), *check_caches(config), *check_keys(config), *check_ports(config)]


def _check_options(config: FleetConfig) -> Iterator[Finding]:
    for stage in config.pipeline:
        use = f"{stage.use}.{config.strategy}" if stage.use == "select" else stage.use
        section = section_path(use)
        if not stage.options or not section or not config.origin.sets(section):
            continue
        what = f"{use} has options here and in its section ({config.origin.place_of(section)})"
        remedy = "keep them in one place"
        yield config.origin.finding((*stage.path, "with"), what, remedy, code="two-places")


def _check_guards(config: FleetConfig) -> Iterator[Finding]:
    """A policy that is written but not part of the pipeline would let everything through, silently."""
    used = {stage.use for stage in config.pipeline}
    has_budget = config.budget.enabled or any(tenant.budget.enabled for tenant in config.tenants.values())
    guards = (
        ("admit.budget", "budget" if config.budget.enabled else "tenants", has_budget),
        ("filter.policy", "policy", config.policy.enabled),
        ("filter.tenant", "tenants", bool(config.tenants)),
        ("filter.service_level", "slo", config.slo.enabled),
        ("filter.overload", "slo", config.slo.enabled and config.slo.load_shed_threshold is not None),
        ("filter.shadow_only", "shadow", config.shadow.exclusive),
        ("observe.shadow", "shadow", config.shadow.enabled),
    )
    for use, section, is_on in guards:
        if config.pipeline and is_on and use not in used:
            remedy = f"add `- {use}`, or remove the section"
            yield config.origin.finding(
                (section,), "no stage of `pipeline:` applies this section", remedy, code="unused-section"
            )


def _check_switch(config: FleetConfig) -> Iterator[Finding]:
    """Rules that nobody switched on look as if they held."""
    policy, path = config.policy, ("policy", "enabled")
    if (policy.rules or policy.pii_detection) and not policy.enabled and not config.origin.sets(path):
        remedy = "add `enabled: true`, or `enabled: false` to keep them off"
        yield config.origin.finding(("policy",), "has rules, and is not enabled", remedy, code="policy-off")
