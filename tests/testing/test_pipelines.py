"""The pipelines that come with kvfleet: each is valid, names its schema, and passes the tests it carries."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfleet.config.loader import check_config
from kvfleet.plugin.manager import discover
from kvfleet.testing.cases import load_suite, run_placed

PIPELINES = sorted((Path(__file__).parent.parent.parent / "pipelines").glob("*.yaml"))
TABLE = discover()
CASES = [
    pytest.param(placed, id=f"{path.stem}: {placed.case.name}")
    for path in PIPELINES
    for placed in load_suite(path, table=TABLE).cases
]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_it_is_valid_and_has_tests(path: Path) -> None:
    """No finding of any kind, and at least five tests."""
    suite = load_suite(path, table=TABLE)
    assert [str(finding) for finding in suite.findings] == []
    assert len(suite.cases) >= 5


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_it_names_its_schema(path: Path) -> None:
    """Editors complete and check it by the schema beside the docs."""
    first, _, _ = path.read_text().partition("\n")
    assert first == "# yaml-language-server: $schema=../docs/reference/fleet.schema.json"


@pytest.mark.parametrize("placed", CASES)
def test_its_own_tests_pass(placed: object) -> None:
    """Each case holds in the real engine."""
    result = run_placed(placed, TABLE)  # type: ignore[arg-type]
    assert result.passed, result.text()


def test_only_the_cloud_key_has_to_be_set() -> None:
    """Without any environment every pipeline is valid, but for the one key that the hybrid one reads."""
    found = [str(finding) for path in PIPELINES for finding in check_config(path, environ={})[1]]
    assert len(found) == 1
    assert found[0].endswith(
        "the environment variable OPENAI_API_KEY is not set; set OPENAI_API_KEY, or correct the reference"
    )


def test_there_are_the_promised_ones() -> None:
    """A first look, a self-hosted fleet with policies, a hybrid one, and one with its stages written out."""
    assert {path.stem for path in PIPELINES} >= {
        "explicit-stages",
        "hybrid-cloud-fallback",
        "quickstart",
        "self-hosted-policies",
    }
