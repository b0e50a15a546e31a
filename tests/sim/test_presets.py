"""The presets: as close to what was published as the documentation says."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

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

# Steps of a decoder shaped as Llama 3 8B on an H200, measured by benchmarks/gpu_steps.py, and what its
# benchmarks/calibration.py made of those with prompts or answers alone; and a vLLM with the same shape and card.
MEASURED = json.loads((Path(__file__).parent / "samples" / "h200_8b.json").read_text())
STEPS = EngineSpec(
    step_s=0.006279,
    prefill_s_per_token=2.224e-05,
    hidden_tokens=90,
    prefill_s_per_token_context=1.666e-09,
    decode_s_per_seq=1.262e-05,
    decode_s_per_context_token=2.681e-08,
)


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


def test_an_h200_reads_and_writes_as_fast_as_was_measured() -> None:
    """By a vLLM 0.26, prompts alone that keep the GPU busy; 6.7 ms are HTTP's, the tokenizer's and the scheduler's."""
    spec = PRESETS["h200-8b"].sized()
    for probe in MEASURED["vllm"]["prefill"]:
        if probe["tokens"] >= 2048:
            engine = Engine(spec)
            engine.submit(Job((), probe["tokens"], 1), 0.0)
            (first,) = [event.at_s for event in engine.advance(10.0) if isinstance(event, FirstToken)]
            assert first + 0.0067 == pytest.approx(probe["ttft_s"], rel=0.02)
    for probe in MEASURED["vllm"]["decode"]:
        step_s = spec.step_time_s(0, 0, probe["batch"], probe["batch"] * probe["context"])
        assert step_s == pytest.approx(probe["tpot_s"], rel=0.03)


@pytest.mark.parametrize("kind", ["prompts", "answers", "both"])
def test_the_formula_of_a_step_holds_on_a_gpu(kind: str) -> None:
    """Fitted to steps of prompts alone and of answers alone, it tells what steps with both take."""
    errors = []
    for one in MEASURED["steps"]:
        prefill, decoding = one["prefill"], one["decoding"]
        if kind == ("both" if prefill and decoding else "prompts" if prefill else "answers"):
            pairs = prefill * (one["prefill_context"] + (prefill - 1) / 2)
            errors.append(STEPS.step_time_s(prefill, pairs, decoding, decoding * one["context"]) / one["s"] - 1)
    assert len(errors) >= 18
    assert abs(statistics.fmean(errors)) < 0.02
    assert statistics.median(map(abs, errors)) < 0.04
    assert max(map(abs, errors)) < 0.14


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_source_and_its_size(name: str) -> None:
    """Documented, named in the vocabulary, and with blocks of the size one asks for."""
    preset = PRESETS[name]
    assert preset.doc
    assert "data sheet" in preset.source
    assert preset.sized(512).cache_blocks == preset.cache_tokens // 512
    assert set(PRESETS) == set(PRESET_NAMES)
