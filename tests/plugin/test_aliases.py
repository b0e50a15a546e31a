"""Other names of components: one table of them, in which every way to name a component looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import pytest

from kvfleet.config.schema import FleetConfig, ModelConfig, StageConfig
from kvfleet.errors import ComponentError
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.router.scoring import Ranking, ScoringContext
from kvfleet.runtime import Router

TABLE = discover(environ={})
SMALL = ModelConfig(name="small", provider="mock", endpoint="mock://small")
SHORT: Mapping[str, str] = {"bandit": "epsilon_greedy", "learned": "ucb1", "thompson": "thompson_sampling"}


@attrs.define
class Own:
    """A strategy of somebody else's."""

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """As they come."""
        return Ranking(models, [1.0] * len(models))


def table(*components: Component) -> ComponentTable:
    """A table of these."""
    return ComponentTable((), {(c.kind, c.name): (c,) for c in components})


@pytest.mark.parametrize(("alias", "name"), SHORT.items())
def test_an_alias_finds_the_component_itself(alias: str, name: str) -> None:
    """By kind and name, and as a pipeline writes it; it is not listed twice."""
    assert TABLE.get(Kind.SELECT, alias) is TABLE.get(Kind.SELECT, name)
    assert TABLE.find_stage(f"select.{alias}").name == name
    assert alias not in TABLE.names(Kind.SELECT)


def test_a_name_goes_before_an_alias() -> None:
    """Whoever brings a component called `bandit` is found under it, alias or not."""
    ours = Component(Kind.SELECT, "epsilon_greedy", Own, aliases=("bandit",))
    theirs = Component(Kind.SELECT, "bandit", Own)
    assert table(ours, theirs).get(Kind.SELECT, "bandit") is theirs
    assert table(ours).get(Kind.SELECT, "bandit") is ours


def test_a_misspelt_alias_is_suggested() -> None:
    """The remedy knows the other names too."""
    with pytest.raises(ComponentError, match=r"did you mean select\.bandit"):
        TABLE.get(Kind.SELECT, "bandid")


def test_an_alias_is_a_name_like_any_other() -> None:
    """It must be lower_snake_case."""
    with pytest.raises(ComponentError, match="'Bandit' must be lower_snake_case"):
        Component(Kind.SELECT, "own", Own, aliases=("Bandit",))


@pytest.mark.parametrize(("alias", "name"), SHORT.items())
def test_section_pipeline_and_request_mean_one_object(alias: str, name: str) -> None:
    """`strategy:`, `use:` and the header take either name, and a pipeline's options reach both."""
    flat = Router(FleetConfig(models=(SMALL,), strategy=alias), table=TABLE, polls=False)
    assert flat.pipeline.select.name == name
    stages = (StageConfig(use=f"select.{alias}", options={"min_samples": 7}), StageConfig(use="execute.fallback"))
    written = Router(FleetConfig(models=(SMALL,), pipeline=stages), table=TABLE, polls=False)
    assert written.pipeline.select is written.pipeline.strategies[alias] is written.pipeline.strategies[name]
    assert written.pipeline.select.component.min_samples == 7


def test_an_observer_under_two_names_hears_once() -> None:
    """The same object is told of an outcome one time."""
    router = Router(FleetConfig(models=(SMALL,), strategy="bandit"), table=TABLE, polls=False)
    heard = [id(stage.component) for stage in router.pipeline.listeners]
    assert len(heard) == len(set(heard))
