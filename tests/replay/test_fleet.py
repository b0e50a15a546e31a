"""Which engine a replica has."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfleet.config.simulation import PRESET_NAMES, EngineOptions, SimulatedFleet
from kvfleet.errors import ConfigError
from kvfleet.registry.models import ModelRegistry
from kvfleet.replay.fleet import read_fleet_description, spec_of
from kvfleet.sim.presets import PRESETS
from tests.replay.fleets import fleet

REPLICAS = ModelRegistry.from_configs(fleet(3).models).replicas


def test_the_nearest_description_of_a_replica_holds(tmp_path: Path) -> None:
    """Replica, endpoint, model, default."""
    path = tmp_path / "fleet.yaml"
    path.write_text(
        "default: {preset: l4-8b}\n"
        "engines:\n"
        '  "m@http://engine-0:8000": {speed: 0.5}\n'
        '  "http://engine-1:8000": {preset: a100-8b, cache_tokens: 64000}\n'
    )
    described = read_fleet_description(path)
    found = [described.options_for(one.id, one.endpoint, one.name) for one in REPLICAS]
    assert found == [
        EngineOptions(speed=0.5),
        EngineOptions(preset="a100-8b", cache_tokens=64_000),
        EngineOptions(preset="l4-8b"),
    ]


def test_numbers_go_before_those_of_the_preset() -> None:
    """The cache is counted in blocks of the trace."""
    spec = spec_of(EngineOptions(preset="a100-8b", prefill_tokens_per_s=8000, step_ms=20, cache_tokens=10_000), 512)
    assert (spec.prefill_s_per_token, spec.prefill_s_per_token_context, spec.step_s) == (1 / 8000, 0.0, 0.02)
    assert (spec.cache_blocks, spec.block_tokens) == (19, 512)
    assert spec.decode_s_per_context_token == PRESETS["a100-8b"].spec.decode_s_per_context_token


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_an_engine(name: str) -> None:
    """With its own cache."""
    assert spec_of(EngineOptions(preset=name), 16).cache_blocks == PRESETS[name].cache_tokens // 16
    assert set(PRESET_NAMES) == set(PRESETS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engines: {m: {preset: h200}}", "fleet.yaml:1:15: engines.m.preset"),
        ("default: {sped: 2}", "did you mean speed?"),
        ("default: {speed: 0}", "must be more than 0"),
        ("]", "fleet.yaml:1:1"),
    ],
)
def test_a_wrong_description_is_told_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    """As a fleet file's is."""
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_fleet_description(path)
    assert words in str(caught.value)


def test_a_slower_engine_answers_later() -> None:
    """By its factor."""
    fast, slow = spec_of(EngineOptions(), 64), spec_of(EngineOptions(speed=0.25), 64)
    assert slow.step_time_s(100, 50, 3, 1000) == pytest.approx(4 * fast.step_time_s(100, 50, 3, 1000))
    assert SimulatedFleet().options_for("m@x", "x", "m") == EngineOptions()
