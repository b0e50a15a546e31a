"""Every feature of the page has tests that exist; `nox -s page` runs them and prints the table."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.page.promises import Promise, belongs, exists, read_promises
from tests.page.table import rows, shown

KEY_FEATURES = (
    "KV-Cache Affinity Routing",
    "Multi-Objective Scoring",
    "14 Routing Strategies",
    "6 Adapter Backends",
    "Policy Engine",
    "OpenAI-Compatible Gateway",
    "Explainable Routing",
    "Fallback & Retry Chains",
    "Rate Limit Awareness",
    "Vision/Multimodal Routing",
    "Model Cost Sync",
    "Admin Dashboard",
    "Shadow Traffic",
    "Prometheus Metrics",
    "Budget & Quotas",
    "Tenant-Aware Routing",
    "Semantic Cache",
    "Replay Engine",
    "Capability Filtering",
    "Per-Request Overrides",
    "Model Type Classification",
    "Shared Connection Pool",
)
"""The page's table of key features, row by row."""

PARTS = {
    "key feature": len(KEY_FEATURES),
    "section": 45,
    "Routing": 12,
    "Policy": 8,
    "Gateway": 11,
    "Caches": 1,
    "State": 3,
    "Prices": 1,
    "Configuration": 4,
    "Dashboard and metrics": 1,
    "The page's own slips": 4,
    "road map": 4,
}
"""How many sentences stand under each heading of what must hold, how many sections the page has, and of its road map."""

PROMISES = read_promises()


def test_every_row_of_the_table_is_promised() -> None:
    """In the page's order, each with a test that asks a running gateway."""
    rows_ = [promise for promise in PROMISES if promise.part == "key feature"]
    assert tuple(promise.name for promise in rows_) == KEY_FEATURES
    assert [promise.name for promise in rows_ if not promise.live] == []


def test_every_enhancement_is_promised() -> None:
    """E-1 to E-10, each with a test that asks a running gateway."""
    named = " ".join(promise.name for promise in PROMISES if promise.live)
    assert [
        number
        for number in range(1, 11)
        if f"E-{number}" not in named.replace("(", " ").replace(")", " ").replace(",", " ").split()
    ] == []


def test_nothing_that_must_hold_is_forgotten() -> None:
    """As many promises as there are sentences."""
    assert Counter(promise.part for promise in PROMISES) == PARTS
    assert len({(promise.part, promise.name) for promise in PROMISES}) == len(PROMISES)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: f"{promise.part}: {promise.name[:50]}")
def test_a_promise_has_tests_that_exist(promise: Promise) -> None:
    """Each by its name, which a renamed test would lose."""
    assert promise.nodes
    assert [node for node in promise.nodes if not exists(node)] == []


def test_the_table_tells_what_is_not_kept() -> None:
    """A failure, a test that is not there, and a promise without tests."""
    outcomes = {
        "a.py::test_x[1]": "passed",
        "a.py::test_x[2]": "failed",
        "b.py::T::test_y": "passed",
        "d.py::test_s": "skipped",
    }
    promises = [
        Promise("part", "kept", ("b.py",), ("b.py::T::test_y",)),
        Promise("part", "broken", ("a.py::test_x",)),
        Promise("part", "lost", ("b.py", "c.py::test_z")),
        Promise("part", "empty", ()),
        Promise("part", "partly", ("b.py", "d.py")),
        Promise("part", "skipped", ("d.py",)),
    ]
    table = rows(promises, outcomes)
    assert [row.is_kept for row in table] == [True, False, False, False, True, False]
    assert table[1].cells() == ("broken", "1 failed, 1 passed", "-", "NOT KEPT")
    assert "there is no c.py::test_z" in shown(table)
    assert shown(table).endswith("6 promises, 2 kept")


def test_a_test_that_is_not_there_does_not_exist() -> None:
    """Neither in a file that is, nor in one that is not; and a name is not the beginning of another."""
    here = "tests/page/test_promises.py"
    assert exists(here)
    assert exists(f"{here}::test_nothing_that_must_hold_is_forgotten")
    assert not exists(f"{here}::test_nothing")
    assert not exists("tests/page/test_nowhere.py")
    assert not belongs(f"{here}::test_ab", f"{here}::test_a")
