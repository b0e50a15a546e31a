"""The explanation is a view: every value is read from the spans, and nothing is computed before somebody looks."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings

from kvfleet.adapters.call import Usage
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Span, Trace
from tests.trace.building import A1, A2, B, C, attempt, fallback, nobody, page, route, stage, traces

DOCUMENTED = {
    "request_id", "timestamp", "strategy", "selected_model", "selected_endpoint", "candidates", "policy_decisions",
    "fallback_triggered", "cache_affinity_used", "cache_hit", "shadow_models", "total_latency_ms",
}  # fmt: skip
DOCUMENTED_OF_CANDIDATE = {
    "model", "endpoint", "total_score", "cost_score", "latency_score", "quality_score", "cache_affinity_score",
    "hardware_load_score", "compliance_score", "selected", "rejected_reason",
}  # fmt: skip


def test_the_documented_summary() -> None:
    """The documentation's example comes out in the documented form."""
    assert Explanation(page()).summary() == (
        "Strategy: hybrid_score\n"
        "Selected: llama-3-8b\n"
        "Cache affinity: MISS\n"
        "Candidate scores:\n"
        "  ✓ llama-3-8b: 0.750\n"
        "  ✗ llama-3-70b: 0.620 (rejected: Lower score)\n"
        "  ✗ gpt-4o: 0.480 (rejected: Lower score)"
    )


def test_the_summary_of_a_fallback() -> None:
    """A summary after a fallback names the model that answered, the path, the replicas apart, and the policy gates."""
    assert Explanation(fallback()).summary() == (
        "Strategy: hybrid_score\n"
        "Selected: llama-3-70b\n"
        "Served by: llama-3-8b@gpu-1:8000\n"
        "Cache affinity: HIT\n"
        "Fallback chain: llama-3-70b → llama-3-8b@gpu-1:8000\n"
        "Candidate scores:\n"
        "  ✗ llama-3-70b: 0.750 (rejected: failed: timeout)\n"
        "  ✓ llama-3-8b@gpu-1:8000: 0.620\n"
        "  ✗ llama-3-8b@gpu-2:8000: 0.550 (rejected: Lower score)\n"
        "  ✗ gpt-4o: not scored (rejected: has_pii == true: private models only [pii-to-private])\n"
        "Policy gates:\n"
        "  [BLOCK] pii-to-private: has_pii == true: private models only (gpt-4o)\n"
        "  [PASS] tenant: 3 candidates may go on"
    )


def test_the_summary_of_nobody_left() -> None:
    """If nobody was left, the summary says so and what excluded each."""
    assert Explanation(nobody()).summary() == (
        "Strategy: hybrid_score\n"
        "Selected: none\n"
        "Outcome: no_candidates: no model may or can serve this request\n"
        "Candidates:\n"
        "  ✗ gpt-4o: not scored (rejected: confidential data stays on private models [confidential])\n"
        "  ✗ llama-3-8b@gpu-1:8000: not scored (rejected: breaker open for 12 s)\n"
        "  ✗ llama-3-8b@gpu-2:8000: not scored (rejected: unhealthy)\n"
        "Policy gates:\n"
        "  [BLOCK] confidential: confidential data stays on private models (gpt-4o)"
    )


def test_a_chosen_replica_shows_its_endpoint() -> None:
    """The endpoint is shown where the model's name alone would not tell which replica was chosen."""
    trace = fallback()
    trace.route.attributes |= {names.REPLICA_SELECTED: A1, names.MODEL_SELECTED: "llama-3-8b"}
    assert "Selected: llama-3-8b\nEndpoint: http://gpu-1:8000\n" in Explanation(trace).summary()


def test_a_long_ranking_is_cut() -> None:
    """Of many candidates the summary shows the first ten, the one that answered, and how many more there are."""
    ids = tuple(f"m@http://gpu-{i}:8000" for i in range(64))
    totals = tuple(float(100 - i) / 100 for i in range(64))
    trace = route(
        stage("select", "hybrid_score", 1, 1, SCORED=ids, SCORE_VALUES=totals, SCORE_UNIT="utility"),
        took_us=9, outcome="answered", CANDIDATES=ids, REPLICA_SELECTED=ids[0], MODEL_SELECTED="m",
        REPLICA_SERVED=ids[40], MODEL_SERVED="m",
    )  # fmt: skip
    lines = Explanation(trace).summary().splitlines()
    assert lines[-2:] == ["  ✓ m@gpu-40:8000: 0.600", "  … and 53 more"]
    assert sum(line.startswith("  ✗") for line in lines) == 10


def test_the_attributes() -> None:
    """Each documented attribute reads the span that holds it."""
    e = Explanation(fallback())
    assert (e.request_id, e.strategy, e.strategy_overridden, e.outcome) == ("req-1", "hybrid_score", False, "answered")
    assert e.timestamp == datetime(2026, 5, 28, 20, 26, 40, 123456, UTC)
    assert (e.selected_model, e.selected_endpoint) == ("llama-3-70b", "http://gpu-3:8000")
    assert (e.served_by, e.served_endpoint) == ("llama-3-8b", "http://gpu-1:8000")
    assert (e.fallback_triggered, e.fallback_chain) == (True, (B, A1))
    assert (e.cache_affinity_used, e.cache_hit) == (True, True)
    assert (e.total_latency_ms, e.ttfb_s, e.cost_usd) == (10_402.5, 10.0524, 0.00031)
    assert e.usage == Usage(312, 64, 376, 256)
    assert [(a.number, a.reason, a.model, a.fault, a.is_success) for a in e.attempts] == [
        (1, "first", "llama-3-70b", "timeout", False),
        (2, "timeout", "llama-3-8b", "", True),
    ]
    assert [(d.stage, d.candidate, d.rule) for d in e.drops] == [("filter.policy", C, "pii-to-private")]
    assert [s.key for s in e.stages][:3] == ["classify.prompt", "classify.pii", "filter.policy"]


def test_a_candidate() -> None:
    """A candidate holds its rank, its total, the dimensions' scores, what each scorer said, and its cached tokens."""
    first, second, third, fourth = Explanation(fallback()).candidates
    assert [c.id for c in (first, second, third, fourth)] == [B, A1, A2, C]
    assert (second.model, second.endpoint, second.rank) == ("llama-3-8b", "http://gpu-1:8000", 2)
    assert (second.total_score, second.unit, second.served, second.selected) == (0.62, "utility", True, False)
    assert (second.cost_score, second.quality_score, second.latency_score) == (1.0, 0.6, None)
    assert second.columns == {"cost": (0.0002, "usd"), "latency": (0.21, "s")}
    assert (second.cached_tokens, first.columns) == (256.0, {"cost": (0.0009, "usd")})  # nobody knows B's latency
    assert (fourth.total_score, fourth.rank, fourth.columns) == (None, None, {})


@pytest.mark.parametrize(
    ("unit", "totals", "reason"),
    [
        ("utility", (0.7, 0.6), "Lower score"),
        ("tokens", (9.0, 8.0), "Lower score"),
        ("s", (0.4, 0.5), "Longer expected time"),
        ("usd", (0.4, 0.5), "Higher price"),
        ("utility", (0.5, 0.5), "Equal score, ranked after"),
        ("utility", (0.5, 0.6), "Ranked after"),
        ("s", (0.5, 0.4), "Ranked after"),
    ],
)
def test_why_one_was_not_first(unit: str, totals: tuple[float, float], reason: str) -> None:
    """The reason of a lower rank speaks of the unit, and claims nothing that the numbers do not say."""
    trace = route(
        stage("select", "x", 1, 1, SCORED=(A1, B), SCORE_VALUES=totals, SCORE_UNIT=unit),
        took_us=5, outcome="simulated", CANDIDATES=(A1, B), REPLICA_SELECTED=A1,
    )  # fmt: skip
    assert [c.rejected_reason for c in Explanation(trace).candidates] == ["", reason]


def test_one_left_over() -> None:
    """A candidate that the strategy left out of its ranking is told as such."""
    trace = route(
        stage("select", "static", 1, 1, SCORED=(A1,), SCORE_VALUES=(1.0,), SCORE_UNIT="utility"),
        took_us=5, outcome="simulated", CANDIDATES=(A1, B), REPLICA_SELECTED=A1,
    )  # fmt: skip
    assert Explanation(trace).candidates[1].rejected_reason == "Not ranked"


def test_a_replica_that_worked_the_second_time() -> None:
    """A replica that failed first and answered when tried again is the one, and no fallback took place."""
    trace = route(
        stage("select", "x", 1, 1, SCORED=(A1, B), SCORE_VALUES=(0.7, 0.6), SCORE_UNIT="utility"),
        attempt(1, A1, 5, 9, fault="connect", message="refused"),
        attempt(2, A1, 15, 9, reason="connect"),
        took_us=30, outcome="answered", CANDIDATES=(A1, B), REPLICA_SELECTED=A1, REPLICA_SERVED=A1,
    )  # fmt: skip
    e = Explanation(trace)
    assert (e.fallback_triggered, e.fallback_chain, e.candidates[0].rejected_reason) == (False, (A1,), "")


def test_cache_affinity_is_not_mentioned_where_nobody_looked() -> None:
    """Without an affinity stage, or with one that was skipped, the summary does not speak of the cache."""
    skipped = stage("affinity", "prefix", 1, 1, STAGE_SKIPPED=True)
    skipped.fail("KeyError")
    for spans in ((), (skipped,)):
        e = Explanation(route(*spans, took_us=5, outcome="failed", error="x"))
        assert not e.cache_affinity_used
        assert "Cache" not in e.summary()


def test_a_hint_is_no_cache_hit() -> None:
    """Tokens that an affinity stage gives without knowing of any cached (mode none) do not read as cached."""
    trace = page()
    trace.stages[0].attributes[names.SCORE_VALUES] = (512.0, 0.0, 0.0)
    assert not Explanation(trace).cache_hit
    trace.stages[0].attributes[names.SCORE_MODES] = ("approximate", "none", "none")
    assert Explanation(trace).cache_hit


def test_the_dictionary() -> None:
    """The dictionary has the documented keys and more, of plain JSON types; content is not in it."""
    trace = fallback()
    trace.route.attributes[names.PROMPT] = "secret words"
    found = json.loads(json.dumps(Explanation(trace).to_dict()))
    assert found.keys() >= DOCUMENTED | {"drops", "attempts", "stages", "served_by", "outcome", "trace_id", "usage"}
    assert found["candidates"][0].keys() >= DOCUMENTED_OF_CANDIDATE
    assert found["timestamp"] == "2026-05-28T20:26:40.123456+00:00"
    assert found["fallback_chain"] == ["llama-3-70b", "llama-3-8b@gpu-1:8000"]
    assert found["usage"] == {
        "prompt_tokens": 312,
        "completion_tokens": 64,
        "total_tokens": 376,
        "prompt_tokens_details": {"cached_tokens": 256},
    }
    assert found["policy_decisions"] == [
        {
            "rule": "pii-to-private",
            "passed": False,
            "reason": "has_pii == true: private models only (gpt-4o)",
            "action": "drop",
            "models": ["gpt-4o"],
        },
        {"rule": "tenant", "passed": True, "reason": "3 candidates may go on", "action": "allow", "models": []},
    ]
    assert found["stages"][2] == {
        "stage": "filter.policy", "kind": "filter", "name": "policy", "start_ms": 0.14, "duration_ms": 0.02,
        "candidates_in": 4, "candidates_out": 3, "policy": True,
        "drops": [{"stage": "filter.policy", "candidate": C, "reason": "has_pii == true: private models only", "rule": "pii-to-private"}],
    }  # fmt: skip
    assert "secret words" not in json.dumps(found)


def test_no_work_before_somebody_looks() -> None:
    """Making an explanation reads nothing, so the engine may make one for every request."""

    class Untouchable(Trace):
        @property
        def route(self) -> Span:
            raise AssertionError

    Explanation(Untouchable("0" * 32, []))


def test_it_is_read_once() -> None:
    """What was read is kept: asking twice gives the very same object."""
    e = Explanation(fallback())
    assert e.candidates is e.candidates
    assert e.stages is e.stages


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces())
def test_any_trace_can_be_explained(trace: Trace) -> None:
    """Whatever types a trace's attributes have, its views come out, and name every candidate exactly once."""
    e = Explanation(trace)
    assert e.summary().startswith("Strategy: ")
    ids = [candidate["id"] for candidate in e.to_dict()["candidates"]]
    assert sorted(ids) == sorted(set(ids))
    assert e.timestamp.tzinfo is UTC
