"""The policy filters: they must hold, so a pipeline cannot skip them, and what they alone exclude is a 403."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.builtin.facts import DOMAIN, PII, PROMPT, ROUTE, answer_tokens, prompt_tokens
from kvfleet.config.fields import choice, flag, listing, mapping, number
from kvfleet.config.findings import Finding, Path
from kvfleet.config.schema import DATA_CLASSES, ModelConfig, PolicyConfig, PolicyRule, TenantConfig
from kvfleet.errors import ComponentError, ConfigError
from kvfleet.money import money
from kvfleet.plugin.component import Component, Services, Stability
from kvfleet.plugin.contract import Drop, Fact, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.policy.conditions import ConditionError, PolicyContext, parse
from kvfleet.policy.engine import Action, PolicyEngine
from kvfleet.policy.residency import ResidencyEngine, ResidencyRule
from kvfleet.policy.tenant import TenantManager
from kvfleet.telemetry.cost import Price

__all__ = ["PolicyFilter", "ResidencyFilter", "TenantFilter", "price_drop"]

_PII_NAMES = frozenset({"has_pii", "pii_types"})
_NEEDS_TARGETS = "require_model"


def _check_rules(rules: Sequence[PolicyRule]) -> None:
    """A mistake in a rule is a finding at that rule's line."""
    findings = [finding for index, rule in enumerate(rules) for finding in _check_rule(rule, ("rules", index))]
    names = [rule.name for rule in rules]
    findings += [
        Finding(
            f"duplicate rule {name!r}", "give each rule its own name", ("rules", index, "name"), code="duplicate-rule"
        )
        for index, name in enumerate(names)
        if name in names[:index]
    ]
    if findings:
        raise ConfigError(findings)


def _check_rule(rule: PolicyRule, path: Path) -> Iterator[Finding]:
    try:
        parse(rule.condition)
    except ConditionError as error:
        yield Finding(str(error), path=(*path, "condition"), code="condition")
    if rule.action == _NEEDS_TARGETS and not rule.target_models:
        yield Finding(f"{rule.action} needs models", "add `target_models:`", (*path, "target_models"), code="missing")


@attrs.define(kw_only=True)
class PolicyFilter:
    """Drop who may not see the request: personal data, data classes, and rules."""

    default_data_class: str = choice("internal", of=DATA_CLASSES, doc="Data class of a request that names none.")
    pii: bool = flag(doc="Keep requests with personal data on private models; needs classify.pii.")
    rules: tuple[PolicyRule, ...] = listing((), doc="Rules, applied by priority.")
    _engine: PolicyEngine = attrs.field(init=False, repr=False, eq=False)
    _cleared: dict[str, frozenset[str]] = attrs.field(init=False, factory=dict, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Check the rules, so that a mistake is found where options are read."""
        _check_rules(self.rules)

    def provision(self, services: Services) -> None:
        """Find the rules' actions, and precompute who is cleared for which data class.

        Raises:
            ConfigError: for an unknown action, with a finding at its rule.
        """
        findings = []
        for index, rule in enumerate(self.rules):
            try:
                services.find(Kind.ACTION, rule.action)
            except ComponentError as error:
                findings.append(Finding(str(error), path=("rules", index, "action"), code="unknown-action"))
        if findings:
            raise ConfigError(findings)

        def find(name: str) -> Action:
            action: Action = services.find(Kind.ACTION, name).cls()
            return action

        self._engine = PolicyEngine(PolicyConfig(enabled=True, pii_detection=self.pii, rules=self.rules), find)
        self._cleared = {
            data_class: frozenset(m.id for m in services.models if data_class in m.allowed_data_classes)
            for data_class in DATA_CLASSES
        }

    def required_facts(self) -> tuple[Fact[Any], ...]:
        """What the rules read beyond the request itself."""
        names = frozenset().union(*(parse(rule.condition).names for rule in self.rules))
        read = {"tokens": PROMPT, "domain": DOMAIN, "route": ROUTE}
        needs_pii = self.pii or not names.isdisjoint(_PII_NAMES)
        return (*((PII,) if needs_pii else ()), *(fact for name, fact in read.items() if name in names))

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """One drop for each candidate that a rule excludes."""
        if not self.rules and not self.pii:
            cleared = self._cleared.get(ctx.data_class, frozenset())
            if all(candidate.id in cleared for candidate in ctx.candidates):
                return ()
        return [Drop(*one) for one in self._engine.excluded(ctx.candidates, policy_context(ctx))]


def policy_context(ctx: RoutingContext) -> PolicyContext:
    """What conditions may know, from the routing context."""
    pii, prompt = ctx.fact_or_none(PII), ctx.fact_or_none(PROMPT)
    domain, route = ctx.fact_or_none(DOMAIN), ctx.fact_or_none(ROUTE)
    return PolicyContext(
        data_class=ctx.data_class,
        tenant_id=ctx.tenant,
        source_region=ctx.region,
        tags=ctx.request.tags,
        has_pii=pii is not None and pii.has_pii,
        pii_types=tuple(pii.pii_types) if pii is not None else (),
        tokens=prompt.token_estimate if prompt is not None else 0,
        domain=domain.domain if domain is not None else "",
        route=route.name if route is not None else "",
        headers=ctx.request.condition_headers,
    )


@attrs.define(kw_only=True)
class ResidencyFilter:
    """Drop models that data from the request's region may not go to."""

    rules: tuple[ResidencyRule, ...] = listing((), doc="Residency rules; all that speak of a region hold.", ge=1)
    _engine: ResidencyEngine = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Sort the rules."""
        self._engine = ResidencyEngine(self.rules)

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """One drop for each model the data may not go to."""
        if not self._engine.rules_for(ctx.region):
            return ()
        return [
            Drop(model, reason, rule.name)
            for model in ctx.candidates
            if (broken := self._engine.broken_rule(ctx.region, model.region, model.provider))
            for rule, reason in (broken,)
        ]


@attrs.define(kw_only=True)
class TenantFilter:
    """Drop models the tenant may not use, or does not prefer while it prefers others, and what is beyond its limits."""

    tenants: Mapping[str, TenantConfig] = mapping(doc="Tenants, by the identifier requests carry.")
    unknown: str = choice(
        "refuse", of=("refuse", "allow"), doc="What a request of an unknown tenant, or of none, gets."
    )
    answer_tokens: int = number(
        1024, ge=0, unit="tokens", doc="Length taken for an answer where the request sets no `max_tokens`."
    )
    _manager: TenantManager = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Sort what each tenant may use."""
        self._manager = TenantManager(self.tenants, refuses_unknown=self.unknown == "refuse")

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """One drop for each model this tenant does not get."""
        if not self._manager.may_send(ctx.tenant, ctx.data_class) and ctx.tenant in self.tenants:
            reason = f"tenant {ctx.tenant} may not send {ctx.data_class} data"
            return [Drop(model, reason, "tenant_data_classes") for model in ctx.candidates]
        out = self._manager.excluded(ctx.tenant, [model.name for model in ctx.candidates])
        drops = [Drop(model, *out[model.name]) for model in ctx.candidates if model.name in out] if out else []
        tenant = self.tenants.get(ctx.tenant)
        if tenant is None or (tenant.max_cost_per_request is None and tenant.max_latency_ms is None):
            return drops
        return [*drops, *self._beyond_limits(tenant, ctx, [m for m in ctx.candidates if m.name not in out])]

    def limit_usd(self, ctx: RoutingContext) -> float | None:
        """The most that a request of this tenant may cost; None for no limit."""
        tenant = self.tenants.get(ctx.tenant)
        return None if tenant is None else tenant.max_cost_per_request

    def _beyond_limits(
        self, tenant: TenantConfig, ctx: RoutingContext, models: Sequence[ModelConfig]
    ) -> Iterator[Drop]:
        """One drop for each model that would cost more, or usually takes longer, than the tenant's limits."""
        most_usd, most_ms = tenant.max_cost_per_request, tenant.max_latency_ms
        prompt, answer = prompt_tokens(ctx), answer_tokens(ctx, self.answer_tokens)
        for model in models:
            if most_ms is not None and model.latency_p50_ms > most_ms:
                reason = f"it usually takes {model.latency_p50_ms:g} ms, and the tenant's limit is {most_ms:g}"
                yield Drop(model, reason, "max_latency_ms")
            elif most_usd is not None and (drop := price_drop(model, (prompt, answer), most_usd, "the tenant's limit")):
                yield drop


def price_drop(model: ModelConfig, tokens: tuple[int, int], most_usd: float, whose: str) -> Drop | None:
    """A drop if a request of so many tokens, of prompt and answer, may cost more there; None if it does not."""
    price = Price.of(model)
    cost = None if price is None else price.cost_usd(*tokens)
    if cost is not None and cost <= most_usd:
        return None
    what = "the request may cost an unknown amount" if cost is None else f"it may cost {money(cost)}"
    return Drop(model, f"{what}, and {whose} is {money(most_usd)}", "max_cost_per_request")


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The policy filters."""
    yield Component(Kind.FILTER, "policy", PolicyFilter, must_hold=True, stability=Stability.STABLE)
    yield Component(Kind.FILTER, "residency", ResidencyFilter, must_hold=True)
    yield Component(Kind.FILTER, "tenant", TenantFilter, must_hold=True)
