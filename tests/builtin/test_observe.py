"""What is counted and logged of a route."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from kvfleet.adapters.call import Usage
from kvfleet.builtin.observe import LogObserver, MetricsObserver
from kvfleet.errors import RouteError
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Outcome
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.trace import names
from kvfleet.trace.spans import Span, Status
from tests.builtin.making import context, model, outcome, user

A = model("a")


def stage(kind: str, name: str, **attributes: Any) -> Span:
    """A stage's span."""
    known = {names.STAGE_KIND: kind, names.STAGE_NAME: name}
    return Span(f"kvfleet.{kind}.{name}", 0, 0, {**known, **{getattr(names, k): v for k, v in attributes.items()}})


def attempt(number: int, name: str, fault: str = "") -> Span:
    """An attempt's span."""
    known: dict[str, Any] = {names.ATTEMPT: number, names.MODEL: name, names.REPLICA: f"{name}@http://{name}"}
    return Span(f"chat {name}", 0, 0, {**known, **({names.ERROR_TYPE: fault} if fault else {})})


def route(word: str = "answered", **attributes: Any) -> Span:
    """A route's span."""
    known: dict[str, Any] = {
        names.REQUEST_ID: "req-1",
        names.STRATEGY: "hybrid_score",
        names.MODEL_SELECTED: "b",
        names.REPLICA_SELECTED: "b@http://b",
        names.OUTCOME: word,
    }
    return Span("kvfleet.route", 0, 0, {**known, **attributes})


def answered(*spans: Span, first: Span | None = None, **more: Any) -> Outcome:
    """A route that `a` answered."""
    ctx = context((A,), [user("my secret question")], tenant="team-ml")
    return outcome(ctx, more.pop("served_by", A), spans=[first or route(), *spans], **more)


async def counted(*outcomes: Outcome) -> MetricsExporter:
    """The metrics after some routes."""
    services = Services(models=(A,))
    observer = MetricsObserver()
    observer.provision(services)
    for one in outcomes:
        await observer.observe(one)
    return services.metrics


def value(metrics: MetricsExporter, name: str, **labels: str) -> float | None:
    """One sample, or None."""
    return metrics.registry.get_sample_value(name, labels)


async def test_a_route_is_counted_with_all_it_did() -> None:
    """Route, selection, attempts, fallback, tokens, cost, time to first byte: each once, from the record."""
    metrics = await counted(
        answered(attempt(1, "b", "timeout"), attempt(2, "a"), usage=Usage(100, 20, 120, 64), cost_usd=0.002, ttfb_s=0.4)
    )
    assert value(metrics, "kvfleet_route_requests_total", strategy="hybrid_score", status="success") == 1
    assert value(metrics, "kvfleet_route_latency_seconds_sum", strategy="hybrid_score") == 2.0
    assert value(metrics, "kvfleet_model_selected_total", model="b") == 1
    assert value(metrics, "kvfleet_attempts_total", model="b", outcome="timeout") == 1
    assert value(metrics, "kvfleet_attempts_total", model="a", outcome="ok") == 1
    assert value(metrics, "kvfleet_fallback_triggered_total", from_model="b", to_model="a") == 1
    assert value(metrics, "kvfleet_tokens_total", model="a", type="cached") == 64
    assert value(metrics, "kvfleet_cost_usd_total", model="a") == 0.002
    assert value(metrics, "kvfleet_time_to_first_byte_seconds_sum", model="a") == 0.4


async def test_calls_that_were_refused_for_the_moment_are_counted() -> None:
    """By model and endpoint: 429, and 503 only if it said when to come back."""
    paused = attempt(3, "a", "overloaded")
    paused.attributes[names.RETRY_AFTER_S] = 3.0
    metrics = await counted(
        answered(attempt(1, "b", "rate_limited"), attempt(2, "a", "overloaded"), paused, attempt(4, "a"))
    )
    assert value(metrics, "kvfleet_rate_limited_total", model="b", endpoint="http://b") == 1
    assert value(metrics, "kvfleet_rate_limited_total", model="a", endpoint="http://a") == 1


async def test_the_decisions_time_ends_with_the_choice() -> None:
    """What the stages took is told apart from what the engine took."""
    choice = stage("select", "hybrid_score")
    choice.end_ns = 40_000
    metrics = await counted(answered(stage("score", "cost"), choice, attempt(1, "a")))
    assert value(metrics, "kvfleet_decision_seconds_sum", strategy="hybrid_score") == pytest.approx(40e-6)


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("answered", "success"),
        ("cached", "success"),
        ("failed", "error"),
        ("cancelled", "cancelled"),
        ("refused", "refused"),
        ("no_candidates", "no_candidates"),
    ],
)
async def test_routes_are_told_apart_by_how_they_ended(word: str, status: str) -> None:
    """Errors are counted, and a client that left is not one."""
    metrics = await counted(answered(first=route(word), served_by=None))
    assert value(metrics, "kvfleet_route_requests_total", strategy="hybrid_score", status=status) == 1


async def test_drops_are_counted_by_stage_and_rule() -> None:
    """Those of the policy also as policy blocks."""
    metrics = await counted(
        answered(
            stage("filter", "policy", DROPPED_RULES=("pii-to-private", "pii-to-private"), STAGE_POLICY=True),
            stage("filter", "tenant", DROPPED_RULES=("",), STAGE_POLICY=True),
            stage("filter", "capabilities", DROPPED_RULES=("tools",)),
            stage("filter", "health"),
        )
    )
    assert value(metrics, "kvfleet_drops_total", stage="filter.policy", rule="pii-to-private") == 2
    assert value(metrics, "kvfleet_drops_total", stage="filter.capabilities", rule="tools") == 1
    assert value(metrics, "kvfleet_policy_blocks_total", rule="pii-to-private") == 2
    assert value(metrics, "kvfleet_policy_blocks_total", rule="filter.tenant") == 1
    assert value(metrics, "kvfleet_policy_blocks_total", rule="tools") is None


async def test_refusals_answers_and_failures_of_stages_are_counted() -> None:
    """Each by its stage."""
    broken = stage("score", "fancy", ERROR_TYPE="ValueError", STAGE_SKIPPED=True)
    broken.status = Status.ERROR
    metrics = await counted(
        answered(
            stage("admit", "concurrency", ADMITTED=False),
            stage("admit", "budget", ADMITTED=True),
            stage("answer", "exact_cache", ANSWERED=True),
            stage("answer", "other", ANSWERED=False),
            broken,
        )
    )
    assert value(metrics, "kvfleet_admissions_refused_total", stage="admit.concurrency") == 1
    assert value(metrics, "kvfleet_admissions_refused_total", stage="admit.budget") is None
    assert value(metrics, "kvfleet_answers_total", stage="answer.exact_cache", hit="true") == 1
    assert value(metrics, "kvfleet_answers_total", stage="answer.other", hit="false") == 1
    assert value(metrics, "kvfleet_stage_failures_total", stage="score.fancy", skipped="true") == 1


async def test_the_fleets_state_is_shown() -> None:
    """Wiring the observer lets the metrics read health and load."""
    metrics = await counted()
    assert value(metrics, "kvfleet_model_health", model="a", endpoint="http://a") == 1


async def test_disabled_metrics_cost_nothing() -> None:
    """And break nothing."""
    observer = MetricsObserver()
    observer.provision(Services(metrics=MetricsExporter(enabled=False)))
    await observer.observe(answered(attempt(1, "a")))


# Logs


async def logged(caplog: pytest.LogCaptureFixture, one: Outcome, **options: Any) -> str:
    """The one line that a route leaves."""
    with caplog.at_level(logging.INFO, "kvfleet.routes"):
        await LogObserver(**options).observe(one)
    (record,) = caplog.records
    return record.getMessage()


async def test_a_route_leaves_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Who asked, who answered, how it went; what is not known is left out."""
    one = answered(attempt(1, "b", "timeout"), attempt(2, "a"), usage=Usage(100, 20), ttfb_s=0.4123)
    assert await logged(caplog, one) == (
        f"route request_id=req-1 trace_id={'0' * 32} tenant=team-ml outcome=answered strategy=hybrid_score "
        "selected=b@http://b served_by=a@http://a attempts=2 ttfb_ms=412.3 duration_ms=2000.0 "
        "prompt_tokens=100 completion_tokens=20"
    )


async def test_json_lines_hold_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """For collectors, one object a line."""
    line = json.loads(await logged(caplog, answered(attempt(1, "a")), format="json"))
    assert (line["event"], line["served_by"], line["attempts"], line["tenant"]) == ("route", "a@http://a", 1, "team-ml")


async def test_an_error_is_logged_by_its_code(caplog: pytest.LogCaptureFixture) -> None:
    """Its message may hold more than a log should."""
    line = await logged(caplog, answered(first=route("failed"), error=RouteError("long story", code="backend_failed")))
    assert "error=backend_failed" in line
    assert "story" not in line


async def test_no_content_and_no_forged_line(caplog: pytest.LogCaptureFixture) -> None:
    """The prompt is not in it, and a request id cannot begin a line of its own."""
    first = route(**{names.REQUEST_ID: "x\nroute request_id=forged served_by=nobody"})
    line = await logged(caplog, answered(first=first))
    assert "secret" not in line
    assert "\n" not in line
    assert 'request_id="x\\nroute request_id=forged served_by=nobody"' in line


async def test_nothing_is_formatted_that_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    """With the logger off, no line."""
    with caplog.at_level(logging.WARNING, "kvfleet.routes"):
        await LogObserver().observe(answered())
    assert caplog.records == []
