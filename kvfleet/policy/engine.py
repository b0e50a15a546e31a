"""The policy: personal data, data classes, and rules with conditions and actions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import attrs

from kvfleet.config.findings import did_you_mean
from kvfleet.config.schema import ModelConfig, PolicyConfig, PolicyRule
from kvfleet.policy.conditions import Condition, PolicyContext, parse

__all__ = [
    "ACTIONS",
    "Action",
    "Allow",
    "Block",
    "Exclusion",
    "PolicyContext",
    "PolicyDecision",
    "PolicyEngine",
    "RequireModel",
    "RequirePrivate",
]

PII_RULE = "pii_detection"
DATA_CLASS_RULE = "data_class_enforcement"
_PII_REASON = "personal data stays on private models"


@attrs.frozen
class Exclusion:
    """One candidate a rule excludes, and why."""

    candidate: ModelConfig
    reason: str
    rule: str


@attrs.frozen
class PolicyDecision:
    """What one rule decided: `passed` is False if it excluded anybody."""

    rule_name: str
    passed: bool
    reason: str
    action: str = ""


class Action(Protocol):
    """What a rule does when its condition holds: excludes candidates, each with a reason."""

    def apply(
        self, candidates: Sequence[ModelConfig], rule: PolicyRule, context: PolicyContext
    ) -> Iterable[tuple[ModelConfig, str]]:
        """The candidates the rule excludes, and why."""


@attrs.frozen
class RequirePrivate:
    """Only models that no third party runs."""

    def apply(
        self,
        candidates: Sequence[ModelConfig],
        rule: PolicyRule,
        context: PolicyContext,  # noqa: ARG002 - the protocol's
    ) -> Iterable[tuple[ModelConfig, str]]:
        """Exclude what is not private."""
        reason = f"{rule.condition}: private models only"
        return [(model, reason) for model in candidates if not model.is_private]


@attrs.frozen
class RequireModel:
    """Only the rule's target models."""

    def apply(
        self,
        candidates: Sequence[ModelConfig],
        rule: PolicyRule,
        context: PolicyContext,  # noqa: ARG002 - the protocol's
    ) -> Iterable[tuple[ModelConfig, str]]:
        """Exclude everybody else."""
        reason = f"{rule.condition}: only {', '.join(rule.target_models)}"
        return [(model, reason) for model in candidates if model.name not in rule.target_models]


@attrs.frozen
class Block:
    """None of the rule's target models; nobody at all if it has none."""

    def apply(
        self,
        candidates: Sequence[ModelConfig],
        rule: PolicyRule,
        context: PolicyContext,  # noqa: ARG002 - the protocol's
    ) -> Iterable[tuple[ModelConfig, str]]:
        """Exclude the targets."""
        reason = f"{rule.condition}: blocked"
        return [(m, reason) for m in candidates if not rule.target_models or m.name in rule.target_models]


@attrs.frozen
class Allow:
    """Nobody is excluded: a rule that only shows in the trace that it held."""

    def apply(
        self,
        candidates: Sequence[ModelConfig],  # noqa: ARG002 - the protocol's
        rule: PolicyRule,  # noqa: ARG002
        context: PolicyContext,  # noqa: ARG002
    ) -> Iterable[tuple[ModelConfig, str]]:
        """Exclude nobody."""
        return ()


ACTIONS: Mapping[str, type[Action]] = {
    "require_private": RequirePrivate,
    "require_model": RequireModel,
    "block": Block,
    "allow": Allow,
}


def _built_in(name: str) -> Action:
    found = ACTIONS.get(name)
    if found is None:
        raise ValueError(f"unknown action {name!r}; {did_you_mean(name, ACTIONS)}")
    return found()


@attrs.frozen
class _Rule:
    """A rule, read: its condition parsed, its action found."""

    config: PolicyRule
    condition: Condition
    action: Action


@attrs.define
class PolicyEngine:
    """Applies a policy to candidates.

    The order: personal data goes to private models only; data classes that models declare hold; then the rules, by
    priority, each on whom the ones before left.

    Args:
        config: The policy.
        find_action: Gives the action of a name; the built-in ones by default.

    Raises:
        ConditionError: for a condition that cannot be read.
        ValueError: for an unknown action, or one without the target models it needs.
    """

    config: PolicyConfig
    find_action: Callable[[str], Action] = attrs.field(default=_built_in, repr=False)
    _rules: tuple[_Rule, ...] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Read the rules."""
        ordered = sorted(self.config.rules, key=lambda rule: rule.priority)
        self._rules = tuple(self._read(rule) for rule in ordered)

    def _read(self, rule: PolicyRule) -> _Rule:
        if rule.action == "require_model" and not rule.target_models:
            raise ValueError(f"rule {rule.name!r}: require_model needs target_models")
        return _Rule(rule, parse(rule.condition), self.find_action(rule.action))

    @property
    def names(self) -> frozenset[str]:
        """The names the conditions read."""
        return frozenset().union(*(rule.condition.names for rule in self._rules))

    def evaluate(
        self, candidates: Sequence[ModelConfig], context: PolicyContext | None = None
    ) -> tuple[list[ModelConfig], list[PolicyDecision]]:
        """The candidates that may see the request, and what each rule decided.

        Args:
            candidates: The models.
            context: The request; one that nothing is known of if None.
        """
        if not self.config.enabled:
            return list(candidates), []
        context = context or PolicyContext()
        exclusions = self.exclusions(candidates, context)
        gone = {one.candidate.id for one in exclusions}
        return [m for m in candidates if m.id not in gone], self._decisions(context, exclusions)

    def exclusions(self, candidates: Sequence[ModelConfig], context: PolicyContext) -> list[Exclusion]:
        """Who may not see the request, why, and by which rule; each candidate at most once."""
        return [Exclusion(*one) for one in self.excluded(candidates, context)]

    def excluded(self, candidates: Sequence[ModelConfig], context: PolicyContext) -> list[tuple[ModelConfig, str, str]]:
        """The same as plain tuples (candidate, reason, rule), for the hot path."""
        found: list[tuple[ModelConfig, str, str]] = []
        left: Sequence[ModelConfig] = candidates
        if self.config.pii_detection and context.has_pii:
            found = [(model, _PII_REASON, PII_RULE) for model in left if not model.is_private]
            left = [model for model in left if model.is_private] if found else left
        wanted = context.data_class
        out = [model for model in left if wanted not in model.allowed_data_classes]
        if out:
            reason = f"not cleared for {wanted} data"
            found += [(model, reason, DATA_CLASS_RULE) for model in out]
            left = [model for model in left if wanted in model.allowed_data_classes]
        for rule in self._rules:
            if left and rule.condition(context):
                whys = {model.id: why for model, why in rule.action.apply(left, rule.config, context)}
                found += [(model, whys[model.id], rule.config.name) for model in left if model.id in whys]
                left = [model for model in left if model.id not in whys]
        return found

    def _decisions(self, context: PolicyContext, exclusions: Sequence[Exclusion]) -> list[PolicyDecision]:
        """One decision for each rule that had a say."""
        reasons = {one.rule: one.reason for one in exclusions}
        asked = [(PII_RULE, "require_private")] if self.config.pii_detection and context.has_pii else []
        asked.append((DATA_CLASS_RULE, "require_clearance"))
        asked += [(rule.config.name, rule.config.action) for rule in self._rules if rule.condition(context)]
        return [
            PolicyDecision(name, name not in reasons, reasons.get(name, "nobody is excluded"), action)
            for name, action in asked
        ]
