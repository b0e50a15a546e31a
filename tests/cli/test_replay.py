"""`kvfleet replay`: a trace through pipelines, told as a table, as JSON and as a page, and gated on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.running import run

FLEET = """\
fleet_name: two
models:
  - {name: m, provider: vllm, endpoint: "http://a", replicas: ["http://b"], cost_per_1k_input_tokens: 0.001, cost_per_1k_output_tokens: 0.002}
strategy: hybrid_score
"""
TRACE = "shared_prefix:requests=60,prompts=3,system_tokens=2000"


@pytest.fixture
def pipeline(write: Callable[..., Path]) -> Path:
    """A fleet of two replicas."""
    return write(FLEET, "two.yaml")


def test_pipelines_are_compared_in_a_table(pipeline: Path, write: Callable[..., Path]) -> None:
    """A line for each file, and for each file with another strategy."""
    other = write(FLEET.replace("hybrid_score", "round_robin"), "other.yaml")
    code, out, _ = run("replay", TRACE, "-p", pipeline, "-p", other, "-s", "least_requests")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("shared_prefix: 60 requests over ")
    assert lines[1].split()[:3] == ["PIPELINE", "TTFT_MEAN", "TTFT_P50"]
    assert [line.split()[0] for line in lines[2:6]] == ["two", "two:least_requests", "other", "other:least_requests"]
    assert "$" in lines[2]


def test_expectations_decide_the_exit_status(pipeline: Path) -> None:
    """What fails is listed, with what it was."""
    held = run("replay", TRACE, "-p", pipeline, "--expect", "ttft_p99 < 1h", "--expect", "failed <= 0")
    assert (held[0], "failed" in held[1]) == (0, False)
    code, out, _ = run(
        "replay", TRACE, "-p", pipeline, "-s", "round_robin",
        "--expect", "ttft_p99 < 1us", "--expect", "two:round_robin.ttft_mean < 1h",
    )  # fmt: skip
    assert code == 1
    assert [line.split()[0] for line in out.splitlines() if "1us" in line] == ["failed", "failed"]
    assert "1h" not in out


def test_a_wrong_expectation_is_told_before_anything_runs(pipeline: Path) -> None:
    """With its column."""
    code, out, err = run("replay", TRACE, "-p", pipeline, "--expect", "ttft_p9 < 1s")
    assert (code, out) == (1, "")
    assert "--expect:1:1: there is no figure 'ttft_p9'; did you mean ttft_p9" in err


def test_figures_and_page_are_written(pipeline: Path, tmp_path: Path) -> None:
    """The same figures for the same seed."""
    found = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.json"
        page = tmp_path / f"{name}.html"
        options = ("--json", path, "--html", page, "--seed", "5", "--slo", "ttft < 50ms", "-n", "40")
        assert run("replay", TRACE, "-p", pipeline, *options)[0] == 0
        found.append(json.loads(path.read_text()))
        assert page.read_text().startswith("<!doctype html>")
    assert found[0] == found[1]
    assert (found[0]["trace"]["requests"], found[0]["slo"], found[0]["seed"]) == (40, "ttft <= 50 ms", 5)


def test_engines_can_be_described(pipeline: Path, tmp_path: Path) -> None:
    """A slow replica shows in the figures."""
    described = tmp_path / "engines.yaml"
    described.write_text("engines: {'http://b': {speed: 0.05}}")
    times = []
    for options in ((), ("--fleet", described)):
        path = tmp_path / "out.json"
        run("replay", TRACE, "-p", pipeline, "-s", "round_robin", "--json", path, *options)
        times.append(json.loads(path.read_text())["pipelines"][1]["replicas"][1]["ttft_mean"])
    assert times[1] > 5 * times[0]


def test_a_fleet_file_may_describe_its_engines_itself(write: Callable[..., Path], tmp_path: Path) -> None:
    """Two files that differ in nothing else are a comparison of machines."""
    one = write(FLEET + "simulation: {default: {preset: h100-8b}}\n", "fast.yaml")
    other = write(FLEET + "simulation: {default: {preset: l4-8b}, engines: {m: {preset: a100-8b}}}\n", "slow.yaml")
    code, _, _ = run("replay", TRACE, "-p", one, "-p", other, "--expect", "fast.ttft_mean < 0.8 * slow.ttft_mean")
    assert code == 0


def test_engines_of_nobody_are_told_with_their_place(write: Callable[..., Path], tmp_path: Path) -> None:
    """In the fleet file and in a description of its own."""
    path = write(FLEET + 'simulation:\n  engines:\n    "http://c": {speed: 2}\n', "two.yaml")
    code, _, err = run("replay", TRACE, "-p", path)
    assert code == 1
    assert "two.yaml:7:5: simulation.engines" in err
    assert "no replica, endpoint or model is called 'http://c'; did you mean" in err
    described = tmp_path / "engines.yaml"
    described.write_text("engines: {'http://b': {speed: 2}, n: {}}")
    assert "engines.yaml: engines.n: no replica" in run("replay", TRACE, "-p", path, "--fleet", described)[2]


def test_files_of_one_name_are_told_apart(write: Callable[..., Path], tmp_path: Path) -> None:
    """By their folders."""
    (tmp_path / "new").mkdir()
    paths = [write(FLEET, name) for name in ("two.yaml", "new/two.yaml")]
    _, out, _ = run("replay", TRACE, "-p", paths[0], "-p", paths[1])
    assert [line.split()[0] for line in out.splitlines()[2:4]] == [str(path.with_suffix("")) for path in paths]


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("nowhere.jsonl",), 1, "nowhere.jsonl: no such file"),
        (("burst:requests=1",), 2, "burst:requests=1: no such file, nor is a generated trace called so; did you mean"),
        ((TRACE, "--format", "azure"), 2, "--format is a file's"),
        ((TRACE, "-s", "best"), 2, "there is no select.best"),
        ((TRACE, "--slo", "ttft"), 1, "--slo:1:1: cannot be read"),
        ((TRACE, "--html", "/nowhere/page.html"), 2, "there is no directory /nowhere"),
        ((TRACE, "--json", "/"), 2, "/ is a directory"),
    ],
)
def test_what_is_wrong_is_told(pipeline: Path, args: tuple[str, ...], status: int, words: str) -> None:
    """In a line, without a traceback, and before anything is replayed."""
    code, out, err = run("replay", *args, "-p", pipeline)
    assert (code, out) == (status, "")
    assert words in " ".join(err.split())


def test_a_trace_that_cannot_be_read_is_told_by_line_and_remedy(pipeline: Path, tmp_path: Path) -> None:
    """And nothing runs."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": -1, "input_length": 5, "output_length": 1, "hash_ids": []}\n')
    code, out, err = run("replay", trace, "-p", pipeline)
    assert (code, out) == (1, "")
    assert f"{trace}:1: is no line of a Mooncake trace: timestamp is -1; give a number that is not negative" in err
