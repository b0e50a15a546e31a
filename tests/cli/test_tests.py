"""`kvfleet test`: the tests that fleet files carry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.cli.running import run

MODELS = "models:\n  - {name: a, provider: mock}\n  - {name: b, provider: mock, quality_score: 0.9}\n"
GOOD = "  - {name: the better one wins, request: {prompt: Hello}, expect: {selected: b}}\n"
WRONG = "  - {name: the worse one wins, request: {prompt: Hello}, expect: {selected: a}}\n"


def test_what_passes_is_listed_and_counted(write: Callable[..., Path]) -> None:
    """One line a test, below its file."""
    path = write(f"strategy: quality_first\n{MODELS}tests:\n{GOOD}")
    status, out, _ = run("test", path)
    assert status == 0
    lines = out.splitlines()
    assert (lines[0], lines[2]) == (str(path), "1 test passed")
    assert lines[1].startswith("  ✓ the better one wins")
    assert run("test", "--quiet", path)[1] == "1 test passed\n"


def test_a_failure_says_what_was_expected(write: Callable[..., Path]) -> None:
    """Place, expectation, and the decision's own words; exit status 1."""
    path = write(f"strategy: quality_first\n{MODELS}tests:\n{GOOD}{WRONG}")
    status, out, _ = run("test", path.parent)
    assert status == 1
    assert f"{path}:7:" in out
    assert "expected a" in out
    assert "Selected: b" in out
    assert out.splitlines()[-1] == "1 test passed, 1 failed"


def test_results_as_json(write: Callable[..., Path]) -> None:
    """For programs, with the findings of what failed."""
    path = write(f"strategy: quality_first\n{MODELS}tests:\n{GOOD}{WRONG}")
    status, out, _ = run("test", path, "--json")
    shown = json.loads(out)
    assert (status, shown["passed"], shown["failed"]) == (1, 1, 1)
    assert [result["passed"] for result in shown["results"]] == [True, False]


def test_a_folder_without_tests_is_no_success(tmp_path: Path) -> None:
    """A wrong path in a CI job is noticed."""
    status, _, err = run("test", tmp_path)
    assert status == 1
    assert err == "Error: no tests there; they stand under `tests:` in a fleet file\n"
    assert run("test", tmp_path, "--json")[0] == 1


def test_a_path_that_does_not_exist_is_told(tmp_path: Path) -> None:
    """No traceback."""
    status, _, err = run("test", tmp_path / "none")
    assert (status, err) == (1, f"Error: there is no file {tmp_path / 'none'}\n")


def test_a_file_that_is_wrong_is_not_run(write: Callable[..., Path]) -> None:
    """Its findings are printed instead."""
    path = write(f"stratgy: x\n{MODELS}tests:\n{GOOD}")
    status, out, _ = run("test", path)
    assert status == 1
    assert out.startswith(f"{path}:1:1: stratgy: ")
