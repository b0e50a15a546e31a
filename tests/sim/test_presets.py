"""The presets: as close to what was published as the documentation says."""

from __future__ import annotations

import statistics

import pytest

from kvfleet.config.simulation import PRESET_NAMES
from kvfleet.sim.engine import Engine
from kvfleet.sim.events import Finished, FirstToken, Job
from kvfleet.sim.presets import PRESETS
from kvfleet.sim.spec import EngineSpec

# Milliseconds of all layers' kernels but attention, by tokens in a step: medians of Microsoft's Vidur (MIT),
# data/profiling/compute/a100/meta-llama/Meta-Llama-3-8B/mlp.csv and h100/meta-llama/Llama-2-7b-hf/mlp.csv, the latter
# times 6.98/6.48 for the parameters of Llama 3 8B's layers. The output layer comes on top.
A100 = {1: 9.76, 8: 10.05, 32: 10.98, 64: 11.33, 128: 13.28, 256: 19.6, 512: 34.8, 1024: 75.6, 2048: 144.5}
H100 = {1: 6.06, 8: 5.97, 32: 6.31, 64: 6.38, 128: 6.93, 256: 9.97, 512: 13.1, 1024: 22.9, 2048: 44.1}
OUTPUT_MS = {"a100-8b": 0.64, "h100-8b": 0.39}


@pytest.mark.parametrize(("name", "profile"), [("a100-8b", A100), ("h100-8b", H100)])
def test_steps_take_what_the_profiled_kernels_take(name: str, profile: dict[int, float]) -> None:
    """A fifth off at the worst, as prompts and as batches, and half of them within eight per cent."""
    spec = PRESETS[name].spec
    errors = []
    for tokens, layers_ms in profile.items():
        measured_s = (layers_ms + OUTPUT_MS[name]) / 1000
        errors.append(abs(spec.step_time_s(tokens, 0, 0, 0) / measured_s - 1))
        if tokens <= 256:
            errors.append(abs(spec.step_time_s(0, 0, tokens, 0) / measured_s - 1))
    assert max(errors) < 0.2
    assert statistics.median(errors) < 0.08


def tpot_ms(spec: EngineSpec, prompt: int, output: int) -> float:
    """Milliseconds for each token but the first, of one request alone."""
    engine = Engine(spec)
    engine.submit(Job((), prompt, output), 0.0)
    events = engine.advance(1000.0)
    (first,) = [event.at_s for event in events if isinstance(event, FirstToken)]
    (last,) = [event.at_s for event in events if isinstance(event, Finished)]
    return (last - first) / (output - 1) * 1000


def test_an_h100_decodes_as_fast_as_was_measured() -> None:
    """InferenceBench, Llama 3.1 8B on an H100, vLLM 0.21, one request at a time: 6.48 ms a token."""
    assert tpot_ms(PRESETS["h100-8b"].sized(), 128, 128) == pytest.approx(6.48, rel=0.05)


def test_an_a100_decodes_as_fast_as_was_measured() -> None:
    """One with 40 GB and three quarters of the memory bandwidth: 75 tokens a second (1024 in, 128 out, vLLM 0.23)."""
    slower = 2039 / 1555  # GB/s of the two
    assert tpot_ms(PRESETS["a100-8b"].sized(), 1024, 128) * slower == pytest.approx(1000 / 75, rel=0.07)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_source_and_its_size(name: str) -> None:
    """Documented, named in the vocabulary, and with blocks of the size one asks for."""
    preset = PRESETS[name]
    assert preset.doc
    assert "data sheet" in preset.source
    assert preset.sized(512).cache_blocks == preset.cache_tokens // 512
    assert set(PRESETS) == set(PRESET_NAMES)
