"""A fleet file as it is replayed: without what needs a text, and with another strategy where one is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from kvfleet.builtin.facts import PROMPT
from kvfleet.builtin.tokens import TOKENS
from kvfleet.config.expand import expand
from kvfleet.config.schema import FleetConfig, StageConfig
from kvfleet.errors import ComponentError
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Fact, Kind, RoutingContext
from kvfleet.plugin.manager import ComponentTable

__all__ = ["for_replay", "told_prompts", "with_strategy"]

_TOLD: Mapping[str, Fact[Any]] = {"prompt": PROMPT, "tokens": TOKENS}
_RECORDS = frozenset({"observe.metrics", "observe.log", "observe.record"})
"""Observers that keep records, and change nothing."""
_JUDGES = "execute.escalate"
_LOOKS_UP = frozenset({"affinity.prefix", "classify.tokens"})
"""Stages that find out who has a prompt in its cache."""
_BLIND = frozenset(
    {
        "admit.concurrency",
        "classify.domain",
        "classify.language",
        "classify.modality",
        "classify.pii",
        "classify.prompt",
        "execute.fallback",
        "filter.capabilities",
        "filter.health",
        "filter.policy",
        "filter.rate_limits",
        "filter.room",
        "filter.shadow_only",
        "filter.tenant",
    }
)
"""Those to which that makes no difference, scores and choices apart."""


def for_replay(config: FleetConfig, table: ComponentTable) -> tuple[FleetConfig, tuple[str, ...]]:
    """The fleet without stages that need a text, and without those that only keep records; and which the former are.

    An executor that judges answers by their text gives way to the one that asks until somebody answers. Where the file
    has no `pipeline:` and nobody asks who has a prompt, that is not found out.
    """
    kept: list[StageConfig] = []
    textual: list[str] = []
    for stage in config.pipeline or expand(config):
        key = _key(stage, table)
        if key == _JUDGES:
            kept.append(StageConfig(use=f"{Kind.EXECUTE}.fallback", path=stage.path))
        if key.startswith("answer.") or key in (_JUDGES, "observe.shadow"):
            textual.append(key)
        elif key not in _RECORDS:
            kept.append(stage)
    if not config.pipeline and _is_blind(config, [_key(stage, table) for stage in kept], table):
        kept = [stage for stage in kept if stage.use not in _LOOKS_UP]
    return attrs.evolve(config, pipeline=tuple(kept)), tuple(textual)


def _is_blind(config: FleetConfig, stages: Sequence[str], table: ComponentTable) -> bool:
    """True if what caches hold makes no difference to anything: the choice, who is let in, who is left out."""
    named = [alias.strategy for alias in config.aliases.values()]
    if any((*named, *[tenant.strategy for tenant in config.tenants.values()])):
        return False
    reading = {key for key in stages if not key.startswith(f"{Kind.SCORE}.")} - _BLIND - _LOOKS_UP
    chosen = [table.find_stage(key) for key in reading if key.startswith(f"{Kind.SELECT}.")]
    return len(chosen) == len(reading) and not any(getattr(one.cls, "reads_affinity", True) for one in chosen)


def _key(stage: StageConfig, table: ComponentTable) -> str:
    try:
        return table.find_stage(stage.use).key
    except ComponentError:  # what it is not called is told, with its place, when the pipeline is built
        return stage.use


def with_strategy(config: FleetConfig, name: str) -> FleetConfig:
    """The fleet with another choice; the strategy's options are those of the file's sections, or the usual ones."""
    pipeline = tuple(
        StageConfig(use=f"{Kind.SELECT}.{name}", path=stage.path)
        if stage.use == Kind.SELECT or stage.use.startswith(f"{Kind.SELECT}.")
        else stage
        for stage in config.pipeline
    )
    return attrs.evolve(config, strategy=name, pipeline=pipeline)


def told_prompts(table: ComponentTable) -> ComponentTable:
    """The components, of which those that would read a prompt leave its facts as the replay has put them."""
    found: dict[tuple[Kind, str], tuple[Component, ...]] = {(c.kind, c.name): (c,) for c in table.components}
    found |= {(one[0].kind, one[0].name): one for one in table.conflicts}
    for name, fact in _TOLD.items():
        for component in found.get((Kind.CLASSIFY, name), ()):
            found[Kind.CLASSIFY, name] = (attrs.evolve(component, cls=_told(component.cls, fact)),)
    return attrs.evolve(table, by_key=found)


def _told(cls: type[Any], fact: Fact[Any]) -> type[Any]:
    """A classifier with the same options that opens nothing and finds what is there."""

    async def classify(_: Any, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        return {fact: ctx.fact(fact)}

    async def aopen(_: Any) -> None:
        """Open nothing."""

    return type(cls.__name__, (cls,), {"classify": classify, "aopen": aopen})
