"""The model beside a real vLLM: a load that one answered on a CPU, sent through the simulated engine."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from kvfleet.sim.engine import Engine
from kvfleet.sim.events import Finished, FirstToken, Job
from kvfleet.sim.spec import EngineSpec

# Measured by benchmarks/probing_vllm.py with vLLM 0.32 and fitted by benchmarks/calibration.py; prompts are kept as the
# numbers of their blocks only.
RUN = json.loads((Path(__file__).parent / "samples" / "vllm_cpu.json").read_text())
SPEC = EngineSpec(
    **RUN["settings"],
    step_s=0.03514,
    prefill_s_per_token=0.0009919,
    prefill_s_per_token_context=8.538e-07,
    decode_s_per_seq=0.001570,
    decode_s_per_context_token=4.961e-07,
)


@pytest.fixture(scope="module")
def jobs() -> list[tuple[dict[str, Any], Job, float, float]]:
    """Each request as measured, and as simulated: its job, and when its first and its last token came."""
    engine = Engine(SPEC)
    asked = sorted(RUN["mixed"], key=lambda one: one["at_s"])
    events = []
    made = []
    for one in asked:
        job = Job(one["blocks"], one["prompt_tokens"], one["output"])
        events += engine.advance(one["at_s"])
        engine.submit(job, one["at_s"])
        made.append(job)
    events += engine.advance(1e6)
    first = {event.job: event.at_s for event in events if isinstance(event, FirstToken)}
    last = {event.job: event.at_s for event in events if isinstance(event, Finished)}
    return [(one, job, first[job], last[job]) for one, job in zip(asked, made, strict=True)]


def test_every_request_finds_cached_what_it_found_in_vllm(jobs: list[tuple[dict[str, Any], Job, float, float]]) -> None:
    """To the token, for all of them."""
    assert len(jobs) == 120
    assert [job.cached_tokens for _, job, _, _ in jobs] == [one["cached"] for one, _, _, _ in jobs]


def ranks(values: list[float]) -> list[float]:
    """Each value's place among them."""
    order = sorted(values)
    return [float(order.index(value)) for value in values]


def test_times_are_as_close_as_the_documentation_says(jobs: list[tuple[dict[str, Any], Job, float, float]]) -> None:
    """Means within a fifth, and the order of requests nearly the same."""
    real = [one["ttft_s"] for one, _, _, _ in jobs]
    simulated = [first - one["at_s"] for one, _, first, _ in jobs]
    assert statistics.fmean(simulated) == pytest.approx(statistics.fmean(real), rel=0.2)
    assert statistics.correlation(ranks(real), ranks(simulated)) > 0.9
    tpot = [(last - first) / (one["output"] - 1) for one, _, first, last in jobs]
    assert statistics.fmean(tpot) == pytest.approx(statistics.fmean(one["tpot_s"] for one, _, _, _ in jobs), rel=0.2)
