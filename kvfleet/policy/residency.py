"""Data residency: data from some regions may only go to some regions, and not to some providers."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from kvfleet.config.fields import listing, text

__all__ = ["ResidencyEngine", "ResidencyRule"]


@attrs.frozen(kw_only=True)
class ResidencyRule:
    """Where data from some regions may go."""

    name: str = text(doc="The rule's name, as traces and errors show it.")
    source_regions: tuple[str, ...] = listing((), doc="Regions whose data the rule speaks of.", ge=1)
    allowed_model_regions: tuple[str, ...] = listing((), doc="Regions it may go to; any if empty.")
    blocked_providers: tuple[str, ...] = listing((), doc="Providers it may not go to, wherever they are.")


def _as_tuple(rules: Iterable[ResidencyRule]) -> tuple[ResidencyRule, ...]:
    return tuple(rules)


@attrs.define
class ResidencyEngine:
    """Applies residency rules; all that speak of a region hold."""

    rules: tuple[ResidencyRule, ...] = attrs.field(default=(), converter=_as_tuple)
    _by_region: dict[str, tuple[ResidencyRule, ...]] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        """Sort the rules by the regions they speak of."""
        for rule in self.rules:
            for region in rule.source_regions:
                self._by_region[region] = (*self._by_region.get(region, ()), rule)

    def rules_for(self, source_region: str) -> tuple[ResidencyRule, ...]:
        """The rules that speak of a region."""
        return self._by_region.get(source_region, ())

    def get_allowed_regions(self, source_region: str) -> frozenset[str] | None:
        """Regions that data from there may go to; None for any."""
        allowed: frozenset[str] | None = None
        for rule in self.rules_for(source_region):
            if rule.allowed_model_regions:
                regions = frozenset(rule.allowed_model_regions)
                allowed = regions if allowed is None else allowed & regions
        return allowed

    def get_blocked_providers(self, source_region: str) -> frozenset[str]:
        """Providers that data from there may not go to."""
        return frozenset(p for rule in self.rules_for(source_region) for p in rule.blocked_providers)

    def broken_rule(self, source_region: str, model_region: str, provider: str) -> tuple[ResidencyRule, str] | None:
        """The first rule that sending data there would break, and how; None if it may go."""
        for rule in self.rules_for(source_region):
            if provider in rule.blocked_providers:
                return rule, f"provider {provider} is blocked for data from {source_region}"
            if rule.allowed_model_regions and model_region not in rule.allowed_model_regions:
                place = model_region or "an unknown region"
                return rule, f"data from {source_region} may not go to {place}"
        return None

    def is_compliant(self, source_region: str, model_region: str, provider: str) -> bool:
        """True if data from `source_region` may go to that model."""
        return self.broken_rule(source_region, model_region, provider) is None
