"""Each replica held to as many requests as it may have."""

from __future__ import annotations

from kvfleet.adapters.base import EngineLoad
from kvfleet.builtin.room import RoomFilter
from kvfleet.config.loader import load_config
from kvfleet.config.schema import ModelConfig
from kvfleet.pipeline.build import build
from kvfleet.plugin.component import Services
from kvfleet.plugin.manager import discover
from kvfleet.registry.models import ModelRegistry
from kvfleet.telemetry.load import FleetLoad
from tests.builtin.test_scorers import context

A, B = ModelConfig(name="m", endpoint="http://a"), ModelConfig(name="m", endpoint="http://b")
TALK = [{"role": "user", "content": "Hi"}]


def filtered(most: int, load: FleetLoad) -> list[str]:
    """Whom it drops."""
    one = RoomFilter(max_in_flight_per_replica=most)
    one.provision(Services(models=(A, B), load=load))
    return [drop.candidate.endpoint for drop in one.filter(context((A, B), TALK))]


def test_who_has_as_many_as_it_may_is_left_out_while_another_has_room() -> None:
    """Others' requests count too; without room anywhere, or without a limit, nobody is dropped."""
    load = FleetLoad()
    load.register((A, B))
    assert filtered(2, load) == []
    load.started(A.id)
    assert filtered(2, load) == []
    load.started(A.id)
    assert filtered(2, load) == ["http://a"]
    assert filtered(0, load) == []
    load.report(B.endpoint, EngineLoad(running=1, waiting=1), load.clock.now_s())
    assert filtered(2, load) == []


def test_the_section_brings_it() -> None:
    """Where replicas have a limit, behind the filters of health and rate limits."""
    file = {"models": [{"name": "m", "provider": "mock"}], "overload": {"max_in_flight_per_replica": 3}}
    config = load_config(None, file, environ={})
    table, models = discover(), ModelRegistry.from_configs(config.models).replicas
    stages = build(config, table, Services(models=models, find=table.get)).stages
    keys = [stage.key for stage in stages]
    assert keys.index("filter.rate_limits") < keys.index("filter.room") < keys.index("score.latency")
    assert stages[keys.index("filter.room")].component.max_in_flight_per_replica == 3
    without = load_config(None, {**file, "overload": {"max_in_flight": 3}}, environ={})
    assert "filter.room" not in [one.key for one in build(without, table, Services(models=models)).stages]
