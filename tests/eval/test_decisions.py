"""Which stage makes the difference between two decisions."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kvfleet.eval.decisions import move, report
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Span, Status, Trace


def decision(
    selected: str, drops: Mapping[str, str] = {}, *, strategy: str = "hybrid_score", among: str = "a b", error: str = ""
) -> Explanation:
    """A decision; `drops` has the filter by model."""
    candidates = tuple(f"{name}@http://{name}" for name in among.split())
    route = Span(
        "kvfleet.route", 1, 2, {names.CANDIDATES: candidates, names.STRATEGY: strategy, names.MODEL_SELECTED: selected}
    )
    spans = [route]
    for model, stage in drops.items():
        attributes = {
            names.STAGE_KIND: "filter", names.STAGE_NAME: stage, names.DROPPED: (f"{model}@http://{model}",),
            names.DROPPED_REASONS: ("may not",), names.DROPPED_RULES: ("",),
        }  # fmt: skip
        spans.append(Span(f"kvfleet.filter.{stage}", 1, 2, attributes))
    if error:
        route.status, route.message = Status.ERROR, error
    return Explanation(Trace("1" * 32, spans))


@pytest.mark.parametrize(
    ("before", "after", "stage", "reason"),
    [
        (decision("a"), decision("b", {"a": "policy"}), "filter.policy", "drops a: may not"),
        (decision("b", {"a": "tenant"}), decision("a"), "filter.tenant", "dropped a: may not"),
        (decision("a"), decision("b"), "select.hybrid_score", "ranks b before a"),
        (decision("a"), decision("b", strategy="cost_first"), "select.cost_first", "was select.hybrid_score"),
        (decision("a"), decision("b", among="b"), "request", "a is not a candidate"),
        (decision("a", among="a"), decision("b"), "request", "b was not a candidate"),
        (decision("a"), decision("", {"a": "x", "b": "y"}), "filter.x", "drops a: may not"),
        (decision("a"), decision("", error="broke"), "request", "broke"),
    ],
)
def test_the_stage_that_makes_the_difference_is_named(
    before: Explanation, after: Explanation, stage: str, reason: str
) -> None:
    """A filter that drops only here or only there, the strategy, or the request itself."""
    found = move(before, after)
    assert (found.is_moved, found.stage, found.reason) == (True, stage, reason)


def test_the_same_choice_is_no_move() -> None:
    """Even if other things differ, which are told."""
    found = move(decision("a"), decision("a", {"b": "policy"}))
    assert (found.is_moved, found.stage) == (False, "")
    assert [(change.part, change.what) for change in found.changes] == [
        ("stages", "filter.policy"),
        ("dropped", "b"),
    ]


def test_moves_are_counted_by_where_and_why() -> None:
    """The most frequent first, with an example; and how many each model gets."""
    a, b = decision("a"), decision("b", {"a": "policy"})
    found = report([move(a, b), move(a, b), move(b, a), move(a, a)])
    assert (found.requests, found.moved) == (4, 3)
    assert [(n, one.before, one.after, one.stage) for n, one in found.groups] == [
        (2, "a", "b", "filter.policy"), (1, "b", "a", "filter.policy"),
    ]  # fmt: skip
    assert (found.before, found.after) == ({"a": 3, "b": 1}, {"b": 2, "a": 2})
    assert found.to_dict()["groups"][0]["requests"] == 2
