"""The pipelines that come with kvfleet: each is valid, names its schema, and passes the tests it carries."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from kvfleet.adapters.base import ChatMessage
from kvfleet.config.loader import check_config, load_config
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
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


async def test_the_quickstart_answers_with_its_own_engines() -> None:
    """No fake here: the mock engines answer, and the second turn finds the first in its engine's cache."""
    config = load_config(Path(__file__).parent.parent.parent / "pipelines" / "quickstart.yaml", environ={})
    fast = [attrs.evolve(model, options={**model.options, "speed": 1e9}) for model in config.models]
    async with Router(attrs.evolve(config, models=tuple(fast)), polls=False, seed=1) as router:
        talk = [ChatMessage("system", "You are patient. " * 40), ChatMessage("user", "What is a hive?")]
        first, why = await router.route(talk)
        await router.settled()
        talk += [ChatMessage("assistant", first.content), ChatMessage("user", "And a swarm?")]
        second, why_again = await router.route(talk)
        async with router.stream(talk) as stream:
            streamed = "".join([chunk.content async for chunk in stream])
    assert first.content.startswith("This is demo-small, a mock engine of kvfleet")
    assert why.served_replica == why_again.served_replica
    assert second.usage is not None
    assert second.usage.cached_tokens is not None
    assert second.usage.cached_tokens > 100
    assert streamed == second.content


def test_there_are_the_promised_ones() -> None:
    """A first look, a self-hosted fleet with policies, a hybrid one, and one with its stages written out."""
    assert {path.stem for path in PIPELINES} >= {
        "explicit-stages",
        "hybrid-cloud-fallback",
        "quickstart",
        "self-hosted-policies",
    }
