"""`kvfleet shadow`, `compare` and `rerun`: what was found, side by side, and what another pipeline would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from kvfleet.config.loader import load_config
from kvfleet.eval.shadow_store import ShadowRow, ShadowStore
from kvfleet.plugin.contract import RouteRequest
from kvfleet.runtime import Router
from tests.cli.running import run

MODELS = """\
models:
  - {name: cheap, provider: mock, cost_per_1k_output_tokens: 0.001, cost_per_1k_input_tokens: 0.001, options: {speed: 1000, reply: blue sky}}
  - {name: dear, provider: mock, cost_per_1k_output_tokens: 0.01, cost_per_1k_input_tokens: 0.01, quality_score: 0.9, options: {speed: 1000, reply: blue sea}}
"""
STAGES = """\
pipeline: [classify.prompt, classify.modality, filter.policy, score.cost, score.quality, select, execute, {use: observe.record, with: {content: %s}}]
"""
COST, QUALITY = "strategy: cost_first\n" + MODELS, "strategy: quality_first\n" + MODELS


@pytest.fixture
def recorded(tmp_path: Path, write: Callable[..., Path]) -> Callable[[str], Path]:
    """Records three requests that a fleet file's cheap model answered."""

    def make(content: str) -> Path:
        path = write(COST + STAGES % content, "recorded.yaml")

        async def ask() -> None:
            async with Router(load_config(path), polls=False, state_dir=tmp_path) as router:
                for number in range(3):
                    messages = [{"role": "user", "content": f"Hello {number}"}]
                    await router.dispatch(RouteRequest(body={"model": "auto", "messages": messages}))
                await router.settled()

        anyio.run(ask)
        return tmp_path / "requests.jsonl"

    return make


class TestShadow:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Path:
        """A store of three comparisons."""
        store = ShadowStore(tmp_path / "shadow.sqlite")
        row = {"primary": "a", "primary_ms": 10.0, "shadow_ms": 20.0, "similarity": 0.5}
        store.add(
            [
                ShadowRow(at_s=1.0, shadow="b", trace_id="abc", **row),  # type: ignore[arg-type]
                ShadowRow(at_s=2.0, shadow="b", error="no answer", **row),  # type: ignore[arg-type]
                ShadowRow(at_s=3.0, shadow="c", **row),  # type: ignore[arg-type]
            ]
        )
        store.close()
        return store.path

    def test_it_shows_each_pair_of_models(self, store: Path) -> None:
        """Requests, failures, and both models' measures."""
        status, out, _ = run("shadow", "--store", store, "--list", "2")
        assert status == 0
        assert out.splitlines()[1].split() == [
            "a",
            "b",
            "2",
            "1",
            "10.0",
            "ms",
            "→",
            "20.0",
            "ms",
            "-",
            "-",
            "0.50",
            "-",
        ]
        assert "no answer" in out

    def test_the_same_as_json_for_one_model(self, store: Path) -> None:
        """Machine-readable."""
        shown = json.loads(run("shadow", "--store", store, "--json", "-m", "b", "-n", "9")[1])
        assert [(one["shadow"], one["requests"], one["failed"]) for one in shown["summaries"]] == [("b", 2, 1)]
        assert len(shown["comparisons"]) == 2

    def test_no_store_is_told_with_the_remedy(self, tmp_path: Path) -> None:
        """What to do to get one; the default is in the state directory."""
        status, _, err = run("shadow", XDG_STATE_HOME=str(tmp_path))
        assert status == 1
        assert f"there are no comparisons at {tmp_path}/kvfleet/shadow.sqlite" in err
        assert "`shadow:`" in err


class TestCompare:
    def test_one_prompt_side_by_side(self, write: Callable[..., Path]) -> None:
        """Time, tokens, cost and the answer of each."""
        status, out, _ = run("compare", write(COST), "--prompt", "Hi")
        assert status == 0
        assert [line.split()[0] for line in out.splitlines()[1:]] == ["cheap", "dear"]
        assert "blue sky" in out
        assert "blue sea" in out

    def test_a_file_of_prompts_as_json(self, write: Callable[..., Path], tmp_path: Path) -> None:
        """Texts, prompts and messages; only the models asked for."""
        prompts = tmp_path / "p.jsonl"
        prompts.write_text(
            '"one"\n\n{"prompt": "two"}\n{"messages": [{"role": "user", "content": "three"}], "max_tokens": 1}\n'
        )
        shown = json.loads(run("compare", write(COST), "--file", prompts, "--models", "dear", "--json")[1])
        assert [one["prompt"] for one in shown["prompts"]] == ["one", "two", "three"]
        assert [len(one["answers"]) for one in shown["prompts"]] == [1, 1, 1]
        assert shown["prompts"][2]["answers"]["dear"]["usage"]["completion_tokens"] == 1
        assert [(one["model"], one["answered"], one["failed"]) for one in shown["models"]] == [("dear", 3, 0)]

    def test_a_model_that_fails_is_shown_with_its_fault(self, write: Callable[..., Path]) -> None:
        """And the others' answers all the same."""
        path = write(COST.replace("reply: blue sea", "fail: overloaded"))
        status, out, _ = run("compare", path, "-p", "Hi")
        assert status == 0
        assert "failed: injected fault: overloaded" in out
        assert "blue sky" in out

    @pytest.mark.parametrize(
        ("line", "message"),
        [("{", "p.jsonl:1: is not JSON"), ("5", "p.jsonl:1: must be a text"), ("", "holds no prompt")],
    )
    def test_a_wrong_file_is_told_with_its_line(
        self, write: Callable[..., Path], tmp_path: Path, line: str, message: str
    ) -> None:
        """Where and what."""
        prompts = tmp_path / "p.jsonl"
        prompts.write_text(line)
        status, _, err = run("compare", write(COST), "--file", prompts)
        assert status == 1
        assert message in err

    def test_wrong_arguments(self, write: Callable[..., Path]) -> None:
        """An unknown model, and no prompt at all."""
        assert "there are cheap, dear" in run("compare", write(COST), "-p", "x", "-m", "nobody")[2]
        assert run("compare", write(COST))[0] == 2


class TestRerun:
    def test_the_file_that_decided_decides_the_same(self, recorded: Callable[[str], Path], tmp_path: Path) -> None:
        """With the recorded seeds, and without the text."""
        status, out, _ = run("rerun", recorded("false"), tmp_path / "recorded.yaml")
        assert status == 0
        assert "3 requests, 0 would go elsewhere (0%)" in out
        assert "3 requests without content" in out

    def test_another_pipeline_tells_who_goes_elsewhere_and_why(
        self, recorded: Callable[[str], Path], write: Callable[..., Path]
    ) -> None:
        """By the strategy, or by the filter that drops the former choice."""
        record = recorded("false")
        out = run("rerun", record, write(QUALITY, "q.yaml"))[1]
        assert "3 requests, 3 would go elsewhere (100%)" in out
        assert "select.quality_first  was select.cost_first" in out
        gated = MODELS.replace("{name: cheap,", "{name: cheap, allowed_data_classes: [public],")
        shown = json.loads(run("rerun", record, write("strategy: cost_first\n" + gated, "g.yaml"), "--json")[1])
        assert [(g["requests"], g["before"], g["after"], g["stage"]) for g in shown["groups"]] == [
            (3, "cheap", "dear", "filter.policy")
        ]
        assert len(shown["moves"]) == 3
        assert "dropped" in {change["part"] for change in shown["moves"][0]["changes"]}

    def test_two_files_are_compared_with_each_other(
        self, recorded: Callable[[str], Path], write: Callable[..., Path]
    ) -> None:
        """What was recorded then only says what was asked."""
        record = recorded("false")
        quality = write(QUALITY, "q.yaml")
        assert "0 would go elsewhere" in run("rerun", record, quality, "--against", quality, "-n", "2")[1]
        out = run("rerun", record, quality, "--against", write(COST, "c.yaml"))[1]
        assert "select.cost_first" in out
        assert run("rerun", record, quality, "--against", quality, "--models", "dear")[0] == 2

    def test_a_model_that_is_gone_leaves_the_request_with_nobody(
        self, recorded: Callable[[str], Path], write: Callable[..., Path]
    ) -> None:
        """A fleet without the models of before."""
        other = "models: [{name: new, provider: mock}]\n"
        shown = json.loads(run("rerun", recorded("false"), write(other, "o.yaml"), "--json")[1])
        assert (shown["groups"][0]["after"], shown["groups"][0]["stage"]) == ("new", "request")

    def test_recorded_requests_are_put_to_models(
        self, recorded: Callable[[str], Path], write: Callable[..., Path]
    ) -> None:
        """And their answers compared with the recorded ones."""
        shown = json.loads(run("rerun", recorded("true"), write(COST), "--models", "dear,cheap", "--json")[1])
        assert shown["requests"] == 3
        assert [(one["model"], one["answered"]) for one in shown["models"]] == [("cheap", 3), ("dear", 3)]
        same, other = (one["similarity"] for one in shown["models"])
        assert same == 1.0
        assert 0.0 < other < 1.0

    def test_without_content_models_cannot_be_asked(
        self, recorded: Callable[[str], Path], write: Callable[..., Path]
    ) -> None:
        """The option that is missing is named."""
        status, _, err = run("rerun", recorded("false"), write(COST), "--models", "dear")
        assert status == 1
        assert "content: true" in err
