"""A fleet file for the tests of pipeline tests, and ways to run them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

from kvfleet.testing.cases import Report, run_files

FLEET = """\
models:
  - name: small
    endpoint: http://a.invalid:8000
    replicas: ["http://b.invalid:8000"]
    provider: vllm
    latency_p50_ms: 100
    quality_score: 0.6
  - name: large
    endpoint: http://c.invalid:8000
    provider: vllm
    capabilities: {max_context_window: 4096}
    latency_p50_ms: 400
    quality_score: 0.9
  - name: cloud
    endpoint: https://cloud.invalid
    provider: openai_compat
    api_key: env:KVFLEET_TEST_KEY_THAT_IS_NEVER_SET
    allowed_data_classes: [public]
    cost_per_1k_input_tokens: 0.01
    cost_per_1k_output_tokens: 0.03
"""


def run(folder: Path, tests: str, fleet: str = FLEET) -> Report:
    """Run some tests of the fleet."""
    file = folder / "fleet.yaml"
    file.write_text(fleet + "tests:\n" + indented(tests))
    return run_files([file])


def indented(text: str) -> str:
    """Tests as they stand under `tests:`."""
    return "".join(f"  {line}\n" for line in dedent(text).strip().splitlines())


def passes(folder: Path, tests: str, fleet: str = FLEET) -> None:
    """Every test must pass."""
    report = run(folder, tests, fleet)
    assert [str(finding) for finding in report.findings] == []
    assert [result.text() for result in report.results if not result.passed] == []
    assert report.passed > 0


def mismatches(folder: Path, tests: str) -> list[str]:
    """What did not hold, without the file's name."""
    report = run(folder, tests)
    assert [str(finding) for finding in report.findings] == []
    return [str(one).partition(": ")[2] for result in report.results for one in result.mismatches]


def findings(folder: Path, tests: str, fleet: str = FLEET) -> list[str]:
    """What is wrong with the tests, without the folder."""
    report = run(folder, tests, fleet)
    assert report.results == ()
    return [str(finding).removeprefix(f"{folder}/") for finding in report.findings]
