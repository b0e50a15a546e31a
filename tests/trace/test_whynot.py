"""Why a model was not the one: which stage, by which rule, and what would have to change."""

from __future__ import annotations

import pytest

from kvfleet.errors import Fault, TraceError
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace
from kvfleet.trace.whynot import Verdict, why_not
from tests.trace.building import A1, A2, B, C, attempt, fallback, nobody, page, route, stage


def ranked(
    *spans: object,
    unit: str = "utility",
    totals: tuple[float, ...] = (0.7, 0.6, 0.5),
    outcome: str = "answered",
    more: dict[str, object] | None = None,
    **attributes: object,
) -> Trace:
    """A route that ranked three replicas: B, A1, A2."""
    choice = stage(
        "select",
        "hybrid_score",
        1,
        1,
        SCORED=(B, A1, A2),
        SCORE_VALUES=totals,
        SCORE_UNIT=unit,
        SELECT_MODE="exploit",
        more=more or {},
    )
    return route(choice, *spans, took_us=50, outcome=outcome, CANDIDATES=(A1, A2, B), REPLICA_SELECTED=B, **attributes)  # type: ignore[arg-type]


def test_dropped() -> None:
    """A dropped model: the stage, the rule, the reason, and what to change."""
    assert why_not(Explanation(fallback()), "gpt-4o") == (
        Verdict(
            replica=C,
            verdict="dropped",
            stage="filter.policy",
            rule="pii-to-private",
            text="gpt-4o was dropped by filter.policy under the rule pii-to-private: has_pii == true: private models only.",
            remedy="Change that rule, the model's `allowed_data_classes` or `private`, or send a request it lets pass.",
        ),
    )


def test_dropped_for_its_rate_limit() -> None:
    """The reason says for how long; what helps is patience, or more of it."""
    reason = "its limit of requests is used up, for another 12 s"
    dropped = stage(
        "filter", "rate_limits", 1, 1, DROPPED=(A1,), DROPPED_REASONS=(reason,), DROPPED_RULES=("requests",)
    )
    trace = route(dropped, took_us=9, outcome="no_candidates", error="x", CANDIDATES=(A1,))
    (verdict,) = why_not(Explanation(trace), A1)
    assert verdict.text.endswith(f"was dropped by filter.rate_limits under the rule requests: {reason}.")
    assert verdict.remedy == "It comes back by itself when that is over; ask its provider for more, or add a replica."


@pytest.mark.parametrize(
    ("name", "rule", "remedy"),
    [
        ("tenant", "unknown_tenant", "Send the tenant's header (`gateway.tenant_header`) or key, and name it under"),
        ("tenant", "blocked_models", "Change the tenant's `preferred_models`"),
        ("health", "model", "Set the model's `model_id` to what its engine lists"),
        ("health", "", "It comes back by itself"),
    ],
)
def test_what_helps_depends_on_the_rule(name: str, rule: str, remedy: str) -> None:
    """A stranger is not helped by other options of a tenant, nor an engine of another model by waiting."""
    dropped = stage("filter", name, 1, 1, DROPPED=(A1,), DROPPED_REASONS=("x",), DROPPED_RULES=(rule,))
    trace = route(dropped, took_us=9, outcome="no_candidates", error="x", CANDIDATES=(A1,))
    (verdict,) = why_not(Explanation(trace), A1)
    assert verdict.remedy.startswith(remedy)


def test_dropped_by_a_stage_of_somebody_elses() -> None:
    """A third party's filter is named as it stands in the pipeline; without a rule none is mentioned."""
    trace = route(
        stage("filter", "moon_phase", 1, 1, DROPPED=(A1,), DROPPED_REASONS=("waning",), DROPPED_RULES=("",)),
        took_us=9,
        outcome="no_candidates",
        error="x",
        CANDIDATES=(A1,),
    )
    (verdict,) = why_not(Explanation(trace), "llama-3-8b")
    assert verdict.text == "llama-3-8b was dropped by filter.moon_phase: waning."
    assert verdict.remedy == "Change filter.moon_phase in the pipeline, or send a request that it lets pass."


def test_each_replica_has_its_own_verdict() -> None:
    """A model with several replicas gets one verdict for each; one replica may be named alone."""
    e = Explanation(fallback())
    assert [(v.replica, v.verdict) for v in why_not(e, "llama-3-8b")] == [(A1, "served"), (A2, "ranked_lower")]
    for name in (A2, "llama-3-8b@gpu-2:8000"):
        assert [v.replica for v in why_not(e, name)] == [A2]
    assert why_not(e, A1)[0].text == "llama-3-8b@gpu-1:8000 did answer, in 402 ms, as attempt 2."


def test_failed() -> None:
    """A model whose attempt failed: with what, after how long, who answered instead, and what helps."""
    (verdict,) = why_not(Explanation(fallback()), "llama-3-70b")
    assert verdict.verdict == "failed"
    assert verdict.text == (
        "llama-3-70b was tried as attempt 1 and failed after 10.0 s with timeout: no first token within 10 s. "
        "llama-3-8b@gpu-1:8000 answered instead."
    )
    assert verdict.remedy == "Give it longer (`fallback.timeout_ms`, the model's `timeout_seconds`) or less to do."


@pytest.mark.parametrize(
    "fault", [fault for fault in Fault if fault not in (Fault.DISCONNECTED, Fault.PROTOCOL, Fault.SERVER_ERROR)]
)
def test_each_fault_has_advice(fault: Fault) -> None:
    """Advice for every fault that has a remedy of its own; the rest send one to the engine's log."""
    log = "Look at its engine's log."
    told = why_not(
        Explanation(ranked(attempt(1, B, 5, 9, fault=fault.value, message="m"), outcome="failed", error="x")), B
    )
    other = why_not(
        Explanation(ranked(attempt(1, B, 5, 9, fault="protocol", message="m"), outcome="failed", error="x")), B
    )
    assert told[0].remedy not in ("", log)
    assert other[0].remedy == log


@pytest.mark.parametrize(
    ("unit", "totals", "text", "remedy"),
    [
        ("utility", (0.7, 0.6, 0.5), "0.600 against 0.700 for llama-3-70b.", "It would come before llama-3-70b with 0.100 more."),
        ("s", (0.4, 0.6, 0.7), "600 ms against 400 ms for llama-3-70b.", "It would come before llama-3-70b with 200 ms less."),
        ("usd", (0.0, 0.002, 1), "$0.002 against $0.00 for llama-3-70b.", "It would come before llama-3-70b with $0.002 less."),
        ("tokens", (512, 128, 0), "128 tokens against 512 tokens for llama-3-70b.", "It would come before llama-3-70b with 384 tokens more."),
        ("utility", (0.6, 0.6, 0.6), "0.600 against 0.600 for llama-3-70b.", "It has the same score; whoever stands first in the file goes first, or select.hybrid_score broke the tie."),
        ("utility", (0.5, 0.6, 0.6), "0.600 against 0.500 for llama-3-70b.", "Its score was the better one; select.hybrid_score chose by exploit."),
    ],
)  # fmt: skip
def test_ranked_lower(unit: str, totals: tuple[float, ...], text: str, remedy: str) -> None:
    """A lower rank is told with both totals in their unit, and with what would have made it the first."""
    trace = ranked(attempt(1, B, 5, 9), unit=unit, totals=tuple(map(float, totals)), REPLICA_SERVED=B)
    verdict = why_not(Explanation(trace), A1)[0]
    assert verdict.verdict == "ranked_lower"
    assert verdict.text == f"llama-3-8b@gpu-1:8000 was ranked 2 of 3 by select.hybrid_score: {text}"
    assert verdict.remedy == remedy


@pytest.mark.parametrize(
    ("unit", "told"),
    [
        ("utility", "(behind in quality 0.2 against 0.9; ahead in cost 1 against 0)"),
        ("s", "(behind in cost 1 against 0; ahead in quality 0.2 against 0.9)"),
    ],
)
def test_by_which_terms(unit: str, told: str) -> None:
    """The parts of the totals say where it was behind and where ahead, by what the unit calls better."""
    terms = {names.TERM_PREFIX + "cost": (0.0, 1.0, 1.0), names.TERM_PREFIX + "quality": (0.9, 0.2, 0.9)}
    verdict = why_not(Explanation(ranked(unit=unit, more=terms, outcome="simulated")), A1)[0]
    assert told in verdict.text


def test_compared_with_who_answered() -> None:
    """After a fallback a lower one is compared with the one that answered, not with the one that failed."""
    trace = ranked(attempt(1, B, 5, 9, fault="connect", message="m"), attempt(2, A1, 15, 9), REPLICA_SERVED=A1)
    verdict = why_not(Explanation(trace), A2)[0]
    assert verdict.verdict == "ranked_lower"
    assert "0.500 against 0.600 for llama-3-8b@gpu-1:8000" in verdict.text


@pytest.mark.parametrize(
    ("spans", "served", "chain"),
    [
        ([attempt(1, B, 5, 9, fault="connect", message="m"), attempt(2, A2, 15, 9)], A2, "llama-3-70b → llama-3-8b@gpu-2:8000"),
        ([attempt(1, B, 5, 9, fault="connect", message="m")], "", "llama-3-70b"),
    ],
)  # fmt: skip
def test_passed_over(spans: list[object], served: str, chain: str) -> None:
    """One that stood higher than the one that answered, or that nobody reached, was not tried: by the fallback's rules."""
    trace = ranked(*spans, **({"REPLICA_SERVED": served} if served else {"outcome": "failed"}))
    verdict = why_not(Explanation(trace), A1)[0]
    assert verdict.verdict == "not_tried"
    assert verdict.text.endswith(f"It was not tried; the attempts were {chain}.")
    assert "fallback.max_attempts" in verdict.remedy


def test_the_one_that_was_chosen() -> None:
    """The chosen one is told as chosen: by a simulation, or before something kept the call from being made."""
    assert (
        why_not(Explanation(ranked(outcome="simulated")), B)[0].text
        == "llama-3-70b was chosen; the route was simulated."
    )
    cut = ranked(outcome="cancelled")
    cut.route.fail("the client left")
    assert why_not(Explanation(cut), B)[0].text == "llama-3-70b was chosen, and not called: the client left."


def test_left_over() -> None:
    """One that the strategy did not rank is told so."""
    trace = ranked(outcome="simulated")
    trace.route.attributes[names.CANDIDATES] = (A1, A2, B, C)
    verdict = why_not(Explanation(trace), "gpt-4o")[0]
    assert (verdict.verdict, verdict.text) == (
        "not_ranked",
        "gpt-4o was left over by select.hybrid_score, which ranked 3 others.",
    )


def test_before_any_choice() -> None:
    """If a cache answered, or a stage ended the route, the remaining candidates were never compared."""
    cached = route(stage("answer", "exact_cache", 1, 1, ANSWERED=True), took_us=9, outcome="cached", CANDIDATES=(A1,))
    assert why_not(Explanation(cached), A1)[0].text == (
        "llama-3-8b was still a candidate when the route was answered at answer.exact_cache, before any model was chosen."
    )
    refused = route(
        stage("admit", "concurrency", 1, 1, ADMITTED=False, REFUSAL="full"),
        took_us=9,
        outcome="refused",
        error="full",
        CANDIDATES=(A1,),
    )
    assert why_not(Explanation(refused), A1)[0].text == (
        "llama-3-8b was still a candidate when the route ended at admit.concurrency before any model was chosen: full."
    )


def test_a_stranger() -> None:
    """A name that was never a candidate is an error with the nearest name and the likely causes."""
    with pytest.raises(TraceError) as caught:
        why_not(Explanation(fallback()), "llama-3-8")
    assert str(caught.value) == (
        "'llama-3-8' was not among the 3 models this route began with; did you mean llama-3-8b?; "
        "it may be disabled, or of another type, or the request, which asked for auto, ruled it out"
    )
    with pytest.raises(TraceError, match=r"^the route had no candidates, so 'm' was none"):
        why_not(Explanation(route(took_us=1, outcome="failed", error="x")), "m")


def test_nobody_left() -> None:
    """Where everybody was dropped, each has a reason of its own."""
    assert [v.text for v in why_not(Explanation(nobody()), "llama-3-8b")] == [
        "llama-3-8b@gpu-1:8000 was dropped by filter.health: breaker open for 12 s.",
        "llama-3-8b@gpu-2:8000 was dropped by filter.health: unhealthy.",
    ]
    assert why_not(Explanation(page()), "gpt-4o")[0].verdict == "ranked_lower"
