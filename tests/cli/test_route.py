"""`kvfleet simulate` and `explain`: decisions without a backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import run


def test_a_simulation_says_who_and_why(fleet: Path) -> None:
    """The summary that a live request would have."""
    status, out, _ = run("simulate", fleet, "--prompt", "Write a Python function")
    assert status == 0
    assert "Strategy: cost_first\nSelected: cheap\n" in out


def test_the_request_can_be_described(fleet: Path) -> None:
    """Data class, model and strategy count."""
    assert "Selected: dear" in run("simulate", fleet, "--data-class", "restricted")[1]
    assert "Selected: dear" in run("simulate", fleet, "--model", "dear")[1]
    assert "Strategy: latency_first" in run("simulate", fleet, "-s", "latency_first")[1]


def test_both_give_the_whole_explanation_as_json(fleet: Path) -> None:
    """Machine-readable, with stages and candidates."""
    for command in ("simulate", "explain"):
        shown = json.loads(run(command, fleet, "--json")[1])
        assert shown["selected_model"] == "cheap"
        assert "select" in [stage["kind"] for stage in shown["stages"]]
        assert [c["model"] for c in shown["candidates"]] == ["cheap", "cheap", "dear"]


def test_the_explanation_shows_every_stage(fleet: Path) -> None:
    """A tree, as `kvfleet trace show` prints it."""
    status, out, _ = run("explain", fleet, "--prompt", "Hello")
    assert status == 0
    for stage in ("filter.health", "score.cost", "select.cost_first"):
        assert stage in out


def test_nobody_left_is_told_with_the_reasons(fleet: Path) -> None:
    """Exit status 1, and who was dropped by what."""
    status, out, err = run("simulate", fleet, "--data-class", "restricted", "--model", "cheap")
    assert status == 1
    assert "Selected: none" in out
    assert err.startswith("Error: ")
    assert "cheap" in err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--model", "nobody", "no model is called 'nobody'"), ("--strategy", "cheapst", "cheapst")],
)
def test_an_unknown_name_is_told(fleet: Path, option: str, value: str, message: str) -> None:
    """A name that does not exist: exit status 1, no traceback; as JSON if asked."""
    status, _, err = run("simulate", fleet, option, value)
    assert status == 1
    assert message in err
    status, out, _ = run("simulate", fleet, option, value, "--json")
    assert status == 1
    assert message in json.loads(out)["error"]["message"]
