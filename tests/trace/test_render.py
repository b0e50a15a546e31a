"""The tree, and the difference between two: whole pictures."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfleet.trace import names
from kvfleet.trace.diff import diff
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.flow import Flow, Paint, printable
from kvfleet.trace.render import render
from kvfleet.trace.spans import Trace
from tests.trace.building import A1, A2, B, fallback, nobody, page, route, stage, traces

WIDE = """\
route 4f1c9a2b  answered by llama-3-8b@gpu-1:8000 in 10.4 s  first byte 10.1 s  $0.00031
2026-05-28 20:26:40 UTC  request req-1  chat for auto, streamed  tenant team-ml  data internal  fleet gpu-fleet
  pipeline 0a1b2c3d4e5f
├ classify.prompt      0.04 ms  prompt 312 tokens
├ classify.pii         0.09 ms  pii email, phone_us
├ filter.policy        0.02 ms  4 → 3
│   ✗ gpt-4o  has_pii == true: private models only  [pii-to-private]
├ filter.tenant        0.01 ms  3 stay
├ filter.health        0.01 ms  3 stay
├ affinity.prefix      0.03 ms  llama-3-8b@gpu-1:8000 256 tokens (approximate)  nothing at 2 others
├ score.cost           0.01 ms  llama-3-70b $0.0009  llama-3-8b@gpu-1:8000 $0.0002  llama-3-8b@gpu-2:8000 $0.0002
├ score.latency        0.01 ms  llama-3-8b@gpu-1:8000 210 ms  llama-3-8b@gpu-2:8000 350 ms
├ select.hybrid_score  0.03 ms  exploit
│     1 llama-3-70b            0.750  cost 0  quality 0.9  cache_affinity 0
│     2 llama-3-8b@gpu-1:8000  0.620  cost 1  quality 0.6  cache_affinity 1
│     3 llama-3-8b@gpu-2:8000  0.550  cost 1  quality 0.6  cache_affinity 0
├ attempt 1             10.0 s  ✗ llama-3-70b  timeout: no first token within 10 s
└ attempt 2             402 ms  ✓ llama-3-8b@gpu-1:8000  first byte 52.0 ms  312 (256 cached) in / 64 out tokens  stop"""

NARROW = """\
route 4f1c9a2b  answered by llama-3-8b@gpu-1:8000 in 10.4 s  first byte 10.1 s
  $0.00031
2026-05-28 20:26:40 UTC  request req-1  chat for auto, streamed  tenant team-ml
  data internal  fleet gpu-fleet  pipeline 0a1b2c3d4e5f
├ classify.prompt      0.04 ms  prompt 312 tokens
├ classify.pii         0.09 ms  pii email, phone_us
├ filter.policy        0.02 ms  4 → 3
│   ✗ gpt-4o  has_pii == true: private models only  [pii-to-private]
├ filter.tenant        0.01 ms  3 stay
├ filter.health        0.01 ms  3 stay
├ affinity.prefix      0.03 ms  llama-3-8b@gpu-1:8000 256 tokens (approximate)
│                               nothing at 2 others
├ score.cost           0.01 ms  llama-3-70b $0.0009
│                               llama-3-8b@gpu-1:8000 $0.0002
│                               llama-3-8b@gpu-2:8000 $0.0002
├ score.latency        0.01 ms  llama-3-8b@gpu-1:8000 210 ms
│                               llama-3-8b@gpu-2:8000 350 ms
├ select.hybrid_score  0.03 ms  exploit
│     1 llama-3-70b            0.750  cost 0  quality 0.9  cache_affinity 0
│     2 llama-3-8b@gpu-1:8000  0.620  cost 1  quality 0.6  cache_affinity 1
│     3 llama-3-8b@gpu-2:8000  0.550  cost 1  quality 0.6  cache_affinity 0
├ attempt 1             10.0 s  ✗ llama-3-70b
│                               timeout: no first token within 10 s
└ attempt 2             402 ms  ✓ llama-3-8b@gpu-1:8000  first byte 52.0 ms
                                312 (256 cached) in / 64 out tokens  stop"""


@pytest.mark.parametrize(("columns", "picture"), [(120, WIDE), (80, NARROW)])
def test_the_picture(columns: int, picture: str) -> None:
    """A route at 120 and at 80 columns."""
    assert render(Explanation(fallback()), columns=columns) == picture
    assert max(map(len, picture.splitlines())) <= columns


def test_nobody_left() -> None:
    """A route that ended in a filter, and its error below."""
    assert render(Explanation(nobody())) == (
        "route 9d02be11  no_candidates after 0.06 ms\n"
        "2026-05-28 20:26:40 UTC  request req-1  chat  data confidential\n"
        "├ filter.policy  0.02 ms  3 → 2\n"
        "│   ✗ gpt-4o  confidential data stays on private models  [confidential]\n"
        "└ filter.health  0.01 ms  2 → 0  the first again in 12.0 s\n"
        "    ✗ llama-3-8b@gpu-1:8000  breaker open for 12 s\n"
        "    ✗ llama-3-8b@gpu-2:8000  unhealthy\n"
        "✗ no_candidates  no model may or can serve this request"
    )


@pytest.mark.parametrize(
    ("outcome", "span", "line"),
    [
        ("cached", stage("answer", "exact_cache", 1, 500, ANSWERED=True), "└ answer.exact_cache  0.50 ms  had the answer"),
        ("failed", stage("answer", "exact_cache", 1, 500, ANSWERED=False), "└ answer.exact_cache  0.50 ms  had no answer"),
        ("refused", stage("admit", "concurrency", 1, 1, ADMITTED=False, REFUSAL="64 in flight", RETRY_AFTER_S=2.0), "└ admit.concurrency <0.01 ms  refused: 64 in flight; again in 2.00 s"),
        ("failed", stage("affinity", "prefix", 1, 9, SCORED=(A1, B), SCORE_VALUES=(0.0, 0.0), SCORE_MODES=("none", "none")), "└ affinity.prefix  0.01 ms  nothing cached"),
    ],
)  # fmt: skip
def test_single_stages(outcome: str, span: object, line: str) -> None:
    """What an answer stage, an admission and an affinity stage did."""
    assert line in render(Explanation(route(span, took_us=600, outcome=outcome))).splitlines()  # type: ignore[arg-type]


def test_why_caches_are_known_no_better() -> None:
    """An affinity stage names whose caches are not known exactly, those with one reason together; JSON has it too."""
    affinity = stage("affinity", "prefix", 1, 9, SCORED=(A1, A2, B), SCORE_VALUES=(64.0, 0.0, 0.0), SCORE_MODES=("degraded", "none", "exact"), SCORE_REASONS=("degraded: lost", "degraded: lost", ""))  # fmt: skip
    explanation = Explanation(route(affinity, took_us=20, outcome="answered", CANDIDATES=(A1, A2, B)))
    assert render(explanation, columns=120).splitlines()[-2:] == [
        "└ affinity.prefix  0.01 ms  llama-3-8b@gpu-1:8000 64 tokens (degraded)  nothing at 2 others",
        "    ? llama-3-8b@gpu-1:8000, llama-3-8b@gpu-2:8000  degraded: lost",
    ]
    assert explanation.stages[0].to_dict()["reasons"] == {A1: "degraded: lost", A2: "degraded: lost"}


def test_what_other_choices_would_have_come_to() -> None:
    """Stands below the ranking in the totals' unit; JSON has it by the choices' names."""
    choice = stage("select", "expected_latency", 1, 9, SCORED=(A1, B), SCORE_VALUES=(0.25, 0.5), SCORE_UNIT="s")
    choice.attributes |= {"kvfleet.instead.second_choice_s": 0.5, "kvfleet.instead.round_robin_s": 0.375}
    explanation = Explanation(route(choice, took_us=20, outcome="answered", CANDIDATES=(A1, B)))
    assert render(explanation).splitlines()[-1] == "        instead  second choice 500 ms  round robin 375 ms"
    assert explanation.stages[0].to_dict()["instead"] == {"second_choice_s": 0.5, "round_robin_s": 0.375}


def test_a_stage_that_failed() -> None:
    """A stage that failed and was skipped says so, in red."""
    broken = stage("score", "moon", 1, 9, STAGE_SKIPPED=True)
    broken.fail("ContractError: no column")
    shown = render(
        Explanation(route(broken, took_us=20, outcome="answered")), paint=Paint(bad=lambda text: f"<{text}>")
    )
    assert shown.splitlines()[-1] == "└ score.moon  0.01 ms  <failed: ContractError: no column, and was skipped>"


def test_a_large_fleet() -> None:
    """Of 512 replicas a ranking shows the best five and the one that answered; a drop of many names four."""
    ids = tuple(f"m@http://gpu-{i}:8000" for i in range(512))
    values = tuple(1 - i / 1000 for i in range(512))
    trace = route(
        stage("filter", "health", 1, 9, CANDIDATES_IN=600, CANDIDATES_OUT=512, DROPPED=tuple(f"old@http://x-{i}:1" for i in range(88)), DROPPED_REASONS=("unhealthy",) * 88, DROPPED_RULES=("",) * 88),
        stage("score", "quality", 11, 9, SCORED=ids, SCORE_VALUES=values, SCORE_UNIT="utility"),
        stage("select", "hybrid_score", 21, 9, SCORED=ids, SCORE_VALUES=values, SCORE_UNIT="utility"),
        took_us=40, outcome="answered", CANDIDATES=ids, REPLICA_SELECTED=ids[0], REPLICA_SERVED=ids[300],
    )  # fmt: skip
    lines = render(Explanation(trace)).splitlines()
    assert "│   ✗ old@x-0:1, old@x-1:1, old@x-2:1, old@x-3:1, and 84 more  unhealthy" in lines
    assert lines[-2:] == ["    301 m@gpu-300:8000  0.700", "        … and 506 more"]
    assert len(lines) == 2 + 2 + 1 + 1 + 6 + 1
    assert len(render(Explanation(trace), most=10**6).splitlines()) == 2 + 2 + 1 + 1 + 512


def test_colours() -> None:
    """The headline is bold, an answer green, a failure red; without paint there is no mark at all."""
    marked = Paint(good=lambda t: f"g<{t}>", bad=lambda t: f"r<{t}>", bold=lambda t: f"b<{t}>")
    shown = render(Explanation(fallback()), paint=marked)
    for piece in ("b<route 4f1c9a2b>", "g<answered by", "r<✗ llama-3-70b>", "g<✓ llama-3-8b@gpu-1:8000>"):
        assert piece in shown
    assert "\x1b" not in render(Explanation(fallback()))


def test_nothing_that_a_terminal_obeys() -> None:
    """A caller's identifier cannot move the cursor or colour the terminal."""
    trace = page()
    trace.route.attributes[names.REQUEST_ID] = "\x1b[2Jgone\r\n\u202e"
    assert "request �[2Jgone���" in render(Explanation(trace))
    assert printable("plain → text") == "plain → text"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces(), st.sampled_from([None, 40, 80]))
def test_any_trace_can_be_drawn(trace: Trace, columns: int | None) -> None:
    """Whatever a trace holds, it can be drawn, with a line for each of its spans."""
    lines = render(Explanation(trace), columns=columns).splitlines()
    assert sum(line.startswith(("├ ", "└ ")) for line in lines) == len(trace.stages)


@given(st.lists(st.text("abc de", min_size=1, max_size=120), min_size=1, max_size=5), st.integers(20, 60))
def test_lines_keep_to_the_width(texts: list[str], columns: int) -> None:
    """No line is wider than asked, unless a single word is; and no word is lost."""
    flow = Flow(columns)
    flow.add("├ ", [(text, str) for text in texts], then="│ ")
    words = " ".join(texts).split()
    found = " ".join(line[2:] for line in flow.lines).split()
    assert found == words
    longest = max(max((len(word) for word in text.split(" ")) if len(text) > 40 else [len(text)]) for text in texts)
    assert max(map(len, flow.lines)) <= max(columns, longest + 2)


def test_two_routes_that_decided_alike() -> None:
    """Two routes with the same decision do not differ, whatever the time of day."""
    later = fallback()
    for span in later.spans:
        span.start_ns += 10**12
        span.end_ns += 10**12
    assert diff(Explanation(fallback()), Explanation(later)) == ()


def test_what_differs() -> None:
    """A difference names its part, and both values as text, in the order of a route."""
    other = fallback()
    other.route.attributes |= {names.DATA_CLASS: "public", names.REPLICA_SERVED: B, names.MODEL_SERVED: "llama-3-70b"}
    other.stages[1].attributes[names.FACT_PREFIX + "pii"] = ()
    del other.stages[2].attributes[names.DROPPED]
    other.stages[8].attributes[names.SCORE_VALUES] = (0.75, 0.7, 0.55)
    changes = [(c.part, c.what, c.before, c.after) for c in diff(Explanation(fallback()), Explanation(other))]
    assert changes == [
        ("request", "data class", "internal", "public"),
        ("facts", "pii", "email, phone_us", ""),
        ("dropped", "gpt-4o", "filter.policy: has_pii == true: private models only [pii-to-private]", ""),
        ("scores", "total of llama-3-8b@gpu-1:8000", "0.620 (rank 2)", "0.700 (rank 2)"),
        ("outcome", "served by", "llama-3-8b@gpu-1:8000", "llama-3-70b"),
    ]
