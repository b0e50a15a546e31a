"""A fleet file as it is replayed: without what needs a text, and with another strategy where one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.builtin.facts import PROMPT
from kvfleet.config.expand import expand
from kvfleet.config.schema import FleetConfig, StageConfig
from kvfleet.errors import ComponentError
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Fact, Kind, RoutingContext
from kvfleet.plugin.manager import ComponentTable

__all__ = ["for_replay", "told_prompts", "with_strategy"]

_PROMPT_STAGE = (Kind.CLASSIFY, "prompt")
_UNTOLD = frozenset({"observe.metrics", "observe.log", "observe.record", "observe.shadow"})
"""Observers that no decision depends on, or that need a text."""


def for_replay(config: FleetConfig, table: ComponentTable) -> tuple[FleetConfig, tuple[str, ...]]:
    """The fleet without the stages that answer from a text or only keep records; and which those are."""
    stages = config.pipeline or expand(config)
    gone = [stage for stage in stages if _key(stage, table).startswith("answer.") or _key(stage, table) in _UNTOLD]
    kept = tuple(stage for stage in stages if stage not in gone)
    return attrs.evolve(config, pipeline=kept), tuple(_key(stage, table) for stage in gone)


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
    """The components, of which `classify.prompt` leaves the prompt's facts as the replay has put them."""

    async def classify(_: Any, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        return {PROMPT: ctx.fact(PROMPT)}

    found: dict[tuple[Kind, str], tuple[Component, ...]] = {(c.kind, c.name): (c,) for c in table.components}
    found |= {(one[0].kind, one[0].name): one for one in table.conflicts}
    for component in found.get(_PROMPT_STAGE, ()):
        told = type(component.cls.__name__, (component.cls,), {"classify": classify})
        found[_PROMPT_STAGE] = (attrs.evolve(component, cls=told),)
    return attrs.evolve(table, by_key=found)
