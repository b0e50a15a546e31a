"""What must hold of a budget: who writes its figures also says whether it binds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvfleet.config.findings import Finding, Path
from kvfleet.config.schema import BudgetConfig, FleetConfig, StageConfig

__all__ = ["check_budgets"]

_STAGES = frozenset({"admit.budget", "filter.budget"})
_WHAT = "has figures, is not enabled, and binds nobody"
_REMEDY = "add `enabled: true`, or `enabled: false` to keep it off"


def check_budgets(config: FleetConfig) -> Iterator[Finding]:
    """A budget that nobody switched on looks as if it held; one that is switched off is meant to be."""
    for path, budget in _sections(config):
        if budget != _NONE and not budget.enabled and not config.origin.sets((*path, "enabled")):
            yield config.origin.finding(path, _WHAT, _REMEDY, code="budget-off")
    for stage in config.pipeline:
        if stage.use in _STAGES:
            for path, written in _in_stage(stage):
                if isinstance(written, Mapping) and written and "enabled" not in written:
                    yield config.origin.finding((*stage.path, "with", *path), _WHAT, _REMEDY, code="budget-off")


_NONE = BudgetConfig()


def _sections(config: FleetConfig) -> Iterator[tuple[Path, BudgetConfig]]:
    yield ("budget",), config.budget
    yield from ((("tenants", name, "budget"), one.budget) for name, one in config.tenants.items())
    yield from ((("gateway", "keys", name, "budget"), one.budget) for name, one in config.gateway.keys.items())


def _in_stage(stage: StageConfig) -> Iterator[tuple[Path, Any]]:
    """The budgets of a stage's own options, as they are written there."""
    yield ("budget",), stage.options.get("budget")
    for section in ("tenants", "keys"):
        written = stage.options.get(section)
        if isinstance(written, Mapping):
            yield from (((section, str(name)), budget) for name, budget in written.items())
