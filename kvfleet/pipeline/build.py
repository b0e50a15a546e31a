"""From a configuration and the components there are, to a pipeline: every finding at once, or a pipeline that runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.config.convert import structure, unstructure
from kvfleet.config.expand import expand, options_from_section, section_path, strategy_of
from kvfleet.config.fields import info_of, options_of
from kvfleet.config.findings import Finding, Path, did_you_mean
from kvfleet.config.options import option_types
from kvfleet.config.schema import FleetConfig, ModelConfig, StageConfig
from kvfleet.errors import ComponentError, ConfigError
from kvfleet.pipeline.guard import Guard
from kvfleet.pipeline.order import check_facts, check_order
from kvfleet.pipeline.slow_start import with_slow_start
from kvfleet.pipeline.stage import BoundStage, Pipeline
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Kind, RoutingContext
from kvfleet.plugin.manager import ComponentTable

__all__ = ["Built", "build", "build_adapters", "check", "read"]


@attrs.frozen
class Built:
    """One entry of the pipeline, read: the component, its object, and where it stands."""

    stage: StageConfig
    component: Component
    instance: Any

    @property
    def name(self) -> str:
        """Its name in traces."""
        return self.stage.name or self.component.name


def check(config: FleetConfig, table: ComponentTable) -> list[Finding]:
    """Every finding of a configuration beyond its vocabulary: components, options, order, facts, references.

    Builds everything and runs nothing.
    """
    built, findings = read(config, table)
    findings += _check_adapters(config, table)
    findings += _check_strategies(config, _strategies(config, table, built), table)
    services = Services(models=config.models, find=table.get)
    findings += _provision(config, [entry.instance for entry in built], services, _places(config, built))
    services.metrics.forget()  # it and the components know each other, which only the garbage collector could free
    services.let_go()
    return findings + list(table.lint(config))


def build(
    config: FleetConfig, table: ComponentTable, services: Services, *, computes_all: bool | None = None
) -> Pipeline:
    """The pipeline.

    Args:
        config: The fleet.
        table: The components there are.
        services: What they are given to work with.
        computes_all: False to leave out scores that the strategy does not read; by default where no `pipeline:` asks
            for them.

    Raises:
        ConfigError: with every finding.
    """
    built, findings = read(config, table)
    if findings:
        raise ConfigError(findings)
    bound = [with_slow_start(_bind(entry), services.health) for entry in built]
    select = next(stage for stage in bound if stage.kind is Kind.SELECT)
    execute = next(stage for stage in bound if stage.kind is Kind.EXECUTE)
    others = _other_strategies(config, table, built)
    eased = {name: with_slow_start(one, services.health) for name, one in others.items()}
    strategies = _with_aliases({select.name: select, **eased}, table)
    if findings := _check_strategies(config, strategies, table):
        raise ConfigError(findings)
    before = tuple(stage for stage in bound if stage.kind not in (Kind.SELECT, Kind.EXECUTE, Kind.OBSERVE))
    watching = [stage for stage in bound if stage.kind is Kind.OBSERVE]
    also = [
        BoundStage.bind(Kind.OBSERVE, stage.name, stage.component, distribution=stage.distribution)
        for stage in (*before, select, *others.values(), execute)
        if callable(getattr(stage.component, "observe", None))
    ]
    pipeline = Pipeline(
        stages=before,
        select=select,
        strategies=strategies,
        execute=execute,
        observe=tuple(watching),
        listeners=tuple(also),
        markers=tuple(stage for stage in (*watching, *also) if callable(getattr(stage.component, "mark", None))),
        placers=tuple(stage for stage in before if callable(getattr(stage.component, "placed", None))),
        computes_all=bool(config.pipeline) if computes_all is None else computes_all,
        hash=_hash(config),
    )
    services.execute = execute.run
    services.most_usd = getattr(execute.component, "most_usd", None)
    services.limit_usd = _limit(before)
    services.excluded = Guard(tuple(stage for stage in before if stage.kind is Kind.FILTER))
    findings = _provision(config, pipeline.components, services, _places(config, built))
    if findings:
        raise ConfigError(findings)
    return pipeline


def _limit(stages: Sequence[BoundStage]) -> Callable[[RoutingContext], float | None]:
    """What one request may cost: the least of what the stages allow that limit it."""
    asked = [stage.component.limit_usd for stage in stages if callable(getattr(stage.component, "limit_usd", None))]

    def limit_usd(ctx: RoutingContext) -> float | None:
        found = [limit for limit in (ask(ctx) for ask in asked) if limit is not None]
        return min(found) if found else None

    return limit_usd


def read(config: FleetConfig, table: ComponentTable) -> tuple[list[Built], list[Finding]]:
    """Find every stage's component and make its object; everything wrong comes back as findings."""
    findings: list[Finding] = []
    built: list[Built] = []
    for stage in config.pipeline or expand(config):
        entry = _read_stage(config, table, stage, findings)
        if entry is not None:
            built.append(entry)
    places = [(entry.component, entry.name, entry.stage) for entry in built]
    findings += check_order(places, config.origin, complete=len(built) == len(config.pipeline or expand(config)))
    findings += check_facts([(e.component, e.instance, e.stage) for e in built], table, config.origin)
    return built, findings


def _read_stage(
    config: FleetConfig, table: ComponentTable, stage: StageConfig, findings: list[Finding]
) -> Built | None:
    use = f"{Kind.SELECT}.{strategy_of(config)}" if stage.use == Kind.SELECT else stage.use
    place: Path = stage.path or (("strategy",) if use.startswith("select.") else section_path(use))
    try:
        component = table.find_stage(use)
    except ComponentError as error:
        findings.append(config.origin.finding(place, str(error), code="unknown-stage"))
        return None
    if why := _why_not(component, stage.on_error):
        findings.append(
            config.origin.finding((*place, "on_error"), f"{component.key} {why}", "remove on_error", code="must-hold")
        )
    options, path = _options(config, component.key, stage)
    instance, wrong = structure(
        component.cls, options, path=path, origin=config.origin, models=[model.name for model in config.models]
    )
    findings += wrong
    return None if instance is None else Built(stage, component, instance)


def _why_not(component: Component, on_error: str) -> str:
    """Why a stage cannot have what its entry says of failures; empty if it can."""
    if on_error == "fail":
        return "runs after the answer, and cannot fail it" if component.kind is Kind.OBSERVE else ""
    if not on_error:
        return ""
    if component.must_hold:
        return "must hold and cannot be skipped"
    if component.kind in (Kind.SELECT, Kind.EXECUTE):
        return "cannot be skipped: without it there is no answer"
    return ""


def _options(config: FleetConfig, use: str, stage: StageConfig) -> tuple[Mapping[str, Any], Path]:
    """A stage's options and where they stand: its own `with:`, or the section that speaks of it."""
    section = section_path(use)
    if stage.options:
        return stage.options, (*stage.path, "with") if stage.path else section
    return options_from_section(config, use), section or stage.path


def _bind(entry: Built) -> BoundStage:
    component = entry.component
    return BoundStage.bind(
        component.kind,
        entry.name,
        entry.instance,
        distribution=component.distribution,
        skips={"skip": True, "fail": False}.get(entry.stage.on_error),
        is_policy=component.must_hold and component.kind is Kind.FILTER,
    )


def _other_strategies(config: FleetConfig, table: ComponentTable, built: Sequence[Built]) -> dict[str, BoundStage]:
    """The strategies a request may ask for beside the pipeline's own: those that need no option they were not given."""
    own = {entry.component.name for entry in built if entry.component.kind is Kind.SELECT}
    found: dict[str, BoundStage] = {}
    for component in table.of_kind(Kind.SELECT):
        if component.name in own:
            continue
        instance, wrong = structure(component.cls, options_from_section(config, component.key))
        if instance is not None and not wrong:
            found[component.name] = BoundStage.bind(
                Kind.SELECT, component.name, instance, distribution=component.distribution
            )
    return found


def _with_aliases(strategies: Mapping[str, BoundStage], table: ComponentTable) -> dict[str, BoundStage]:
    """The strategies, also under their other names, which mean the same objects."""
    of_component = {type(stage.component): stage for stage in strategies.values()}
    found = {
        alias: of_component[component.cls]
        for component in table.of_kind(Kind.SELECT)
        for alias in component.aliases
        if component.cls in of_component
    }
    return {**found, **strategies}


def _strategies(config: FleetConfig, table: ComponentTable, built: Sequence[Built]) -> Mapping[str, BoundStage]:
    """The strategies of a pipeline that is only checked, by every name a request may ask by."""
    own = {entry.name: _bind(entry) for entry in built if entry.component.kind is Kind.SELECT}
    return _with_aliases({**own, **_other_strategies(config, table, built)}, table)


def _check_strategies(config: FleetConfig, known: Iterable[str], table: ComponentTable) -> list[Finding]:
    """Strategies that aliases and tenants name, and that no request could have."""
    named = {("aliases", name, "strategy"): alias.strategy for name, alias in config.aliases.items()}
    named |= {("tenants", name, "strategy"): tenant.strategy for name, tenant in config.tenants.items()}
    usable = frozenset(known)
    return [
        config.origin.finding(path, *_unusable(name, usable, table), code="unknown-strategy")
        for path, name in named.items()
        if name and name not in usable
    ]


def _unusable(name: str, usable: frozenset[str], table: ComponentTable) -> tuple[str, str]:
    """Why nobody can have a strategy by this name, and what to do."""
    if name in table.names(Kind.SELECT):
        return f"select.{name} needs options", "write it out in a pipeline: that has it as its own strategy"
    return f"unknown strategy {name!r}", did_you_mean(name, usable)


def _places(config: FleetConfig, built: Sequence[Built]) -> dict[int, Path]:
    """Where each object's options stand in the file."""
    return {id(e.instance): _options(config, e.component.key, e.stage)[1] or e.stage.path for e in built}


def _provision(
    config: FleetConfig, components: Sequence[Any], services: Services, places: Mapping[int, Path]
) -> list[Finding]:
    """Wire the components; what they refuse is a finding, and a ConfigError's findings stand at their own options."""
    findings: list[Finding] = []
    for component in components:
        provision = getattr(component, "provision", None)
        if provision is None:
            continue
        try:
            provision(services)
        except ConfigError as error:
            place = places.get(id(component), ())
            findings += [
                config.origin.finding((*place, *one.path), one.message, one.remedy, code=one.code)
                for one in error.findings
            ]
        except (ComponentError, ValueError) as error:
            what = f"{type(component).__name__}: {error}"
            place = places.get(id(component)) or ("pipeline",)
            findings.append(config.origin.finding(place, what, code="component"))
    return findings


def build_adapters(
    config: FleetConfig, table: ComponentTable, models: Sequence[ModelConfig], **shared: Any
) -> dict[str, InferenceAdapter]:
    """One adapter for each replica, by its id.

    Raises:
        ConfigError: for an unknown provider or a wrong adapter option; `check` finds these too.
    """
    findings = _check_adapters(config, table)
    if findings:
        raise ConfigError(findings)
    adapters: dict[str, InferenceAdapter] = {}
    for model in models:
        cls = table.get(Kind.ADAPTER, model.provider).cls
        options, _ = structure(
            adapter_options(cls), model.options, origin=config.origin
        )  # `_check_adapters` found nothing wrong
        every: dict[str, Any] = attrs.asdict(options, recurse=False) if options is not None else {}
        # What is not written is the adapter's to choose: `custom_http` takes some of it from the model's own fields.
        chosen = {name: value for name, value in every.items() if name in model.options}
        adapters[model.id] = cls.from_config(model, **chosen, **shared)
    return adapters


def _check_adapters(config: FleetConfig, table: ComponentTable) -> list[Finding]:
    findings: list[Finding] = []
    for index, model in enumerate(config.models):
        try:
            component = table.get(Kind.ADAPTER, model.provider)
        except ComponentError as error:
            findings.append(config.origin.finding(("models", index, "provider"), str(error), code="unknown-provider"))
            continue
        _, wrong = structure(
            adapter_options(component.cls), model.options, path=("models", index, "options"), origin=config.origin
        )
        findings += wrong
    return findings


def adapter_options(cls: type) -> type[Any]:
    """The options of an adapter alone, as a class: its described fields, without those every adapter has."""
    found = _ADAPTER_OPTIONS.get(cls)
    if found is None:
        described = {name: a for name, a in options_of(cls).items() if info_of(a) is not None}
        types = option_types(cls)
        fields = {
            name: attrs.field(default=a.default, metadata=dict(a.metadata), type=types[a.name])
            for name, a in described.items()
        }
        found = attrs.make_class(f"{cls.__name__}Options", fields, kw_only=True, frozen=True)
        _ADAPTER_OPTIONS[cls] = found
    return found


_ADAPTER_OPTIONS: dict[type, type[Any]] = {}  # making a class takes a millisecond, and a fleet may have 500 models


def _hash(config: FleetConfig) -> str:
    """Twelve hex digits that tell one configuration from another; secrets are not part of it."""
    return hashlib.sha256(repr(unstructure(config)).encode()).hexdigest()[:12]
