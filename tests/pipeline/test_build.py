"""The build's findings, by their exact words: components, options, order, facts and providers of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfleet.config.loader import check_config
from kvfleet.pipeline.build import check
from kvfleet.plugin.manager import discover

TABLE = discover()
HEAD = "models:\n  - {name: small, provider: mock}\n"


def findings(tmp_path: Path, text: str) -> list[str]:
    """Every finding of a file, without the folder it stands in."""
    path = tmp_path / "f.yaml"
    path.write_text(text)
    config, found = check_config(path)
    assert config is not None, found
    return [str(one).removeprefix(f"{tmp_path}/") for one in (*found, *check(config, TABLE))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "pipeline:\n  - filter.helth\n  - select\n  - execute\n",
            ["f.yaml:4:5: pipeline[0]: there is no filter.helth; did you mean filter.health?"],
        ),
        (
            "pipeline:\n  - filtr.health\n  - select\n  - execute\n",
            ["f.yaml:4:5: pipeline[0]: 'filtr.health' is no stage: 'filtr' is no kind of stage; did you mean filter?"],
        ),
        (
            "strategy: cost_frist\n",
            ["f.yaml:3:1: strategy: there is no select.cost_frist; did you mean select.cost_first?"],
        ),
        (
            "aliases: {fast: {strategy: latencyfirst}}\ntenants: {a: {strategy: canary}, b: {strategy: ucb1}}\n",
            [
                "f.yaml:3:18: aliases.fast.strategy: unknown strategy 'latencyfirst'; did you mean latency_first?",
                (
                    "f.yaml:4:15: tenants.a.strategy: select.canary needs options; write it out in a pipeline: that has "
                    "it as its own strategy"
                ),
            ],
        ),
        (
            "pipeline:\n  - filter.capabilities\n  - select\n  - execute\n",
            [
                (
                    "f.yaml:4:5: pipeline[0]: filter.capabilities needs the fact 'prompt', which no stage before it "
                    "gives; put classify.prompt before it"
                ),
                (
                    "f.yaml:4:5: pipeline[0]: filter.capabilities needs the fact 'modality', which no stage before it "
                    "gives; put classify.modality before it"
                ),
            ],
        ),
        (
            "pipeline:\n  - {use: filter.policy, on_error: skip}\n  - select\n  - execute\n",
            ["f.yaml:4:26: pipeline[0].on_error: filter.policy must hold and cannot be skipped; remove on_error"],
        ),
        (
            "pipeline:\n  - select\n  - {use: execute, on_error: skip}\n",
            [
                (
                    "f.yaml:5:20: pipeline[1].on_error: execute.fallback cannot be skipped: without it there is no answer; "
                    "remove on_error"
                )
            ],
        ),
        (
            "pipeline:\n  - select\n  - execute\n  - {use: observe.log, on_error: fail}\n",
            [
                "f.yaml:6:24: pipeline[2].on_error: observe.log runs after the answer, and cannot fail it; remove on_error"
            ],
        ),
        (
            "pipeline:\n  - select\n  - {use: execute, with: {max_atempts: 2}}\n",
            ["f.yaml:5:27: pipeline[1].with.max_atempts: unknown key; did you mean max_attempts?"],
        ),
    ],
)
def test_findings(tmp_path: Path, text: str, said: list[str]) -> None:
    """Each stands at its line and says what to do."""
    assert findings(tmp_path, HEAD + text) == said


def test_an_unknown_provider_is_found_beside_the_rest(tmp_path: Path) -> None:
    """Findings of models and of stages come together."""
    found = findings(tmp_path, "models:\n  - {name: a, endpoint: http://a, provider: vlm}\nstrategy: bset\n")
    assert found[0].startswith("f.yaml:3:1: strategy: there is no select.bset; ")
    assert found[1] == "f.yaml:2:35: models[0].provider: there is no adapter 'vlm'; did you mean vllm?"


def test_a_rule_is_read_even_if_something_else_is_wrong(tmp_path: Path) -> None:
    """An unknown action does not wait until the rest is mended."""
    text = (
        "pipeline:\n  - use: filter.policy\n    with:\n"
        "      rules: [{name: r, condition: always, action: blok}]\n  - filter.helth\n  - select\n  - execute\n"
    )
    found = findings(tmp_path, HEAD + text)
    assert any("there is no filter.helth" in one for one in found)
    assert any("blok" in one and "did you mean block?" in one for one in found)
