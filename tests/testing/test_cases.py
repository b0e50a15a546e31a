"""Files of pipeline tests: where they are found, and what they do not depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.testing.cases import CaseResult, load_suite, run_files, run_placed
from tests.testing.fleet import FLEET, indented, passes


class TestFiles:
    def test_a_folder_is_searched_for_tests(self, tmp_path: Path) -> None:
        """Files with tests are run in order, others passed over, and what is no YAML is told."""
        case = "- {name: %s, request: {prompt: a}, expect: {status: 200}}"
        for name in ("b", "a"):
            (tmp_path / f"{name}.yaml").write_text(FLEET + "tests:\n" + indented(case % name))
        (tmp_path / "plain.yml").write_text(FLEET)
        (tmp_path / "notes.txt").write_text("tests: []")
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "broken.yaml").write_text("a: [")
        seen: list[CaseResult] = []
        report = run_files([tmp_path], on_case=seen.append)
        assert [result.name for result in seen] == ["a", "b"]
        assert report.results == tuple(seen)
        (finding,) = report.findings
        assert (finding.file, finding.code) == (str(tmp_path / "sub" / "broken.yaml"), "syntax")

    def test_tests_may_stand_apart_from_their_pipeline(self, tmp_path: Path) -> None:
        """A test file names its pipeline, from where it stands; its mismatches are placed in the test file."""
        (tmp_path / "fleet.yaml").write_text(FLEET)
        file = tmp_path / "fleet.test.yaml"
        file.write_text(
            "pipeline: fleet.yaml\ntests:\n  - {name: x, request: {prompt: a}, expect: {selected: cloud}}\n"
        )
        (result,) = run_files([file]).results
        assert (result.file, result.line) == (str(file), 3)
        assert result.mismatches[0].file == str(file)

    def test_a_test_file_has_a_vocabulary_too(self, tmp_path: Path) -> None:
        """An unknown key beside `pipeline` and `tests` is a finding."""
        file = tmp_path / "fleet.test.yaml"
        file.write_text("pipeline: fleet.yaml\ntest: []\ntests: [{}]\n")
        (finding,) = run_files([file]).findings
        assert str(finding) == f"{file}:2:1: test: unknown key; did you mean tests?"

    def test_the_machines_environment_does_not_count(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Unset secrets have stand-ins, and KVFLEET__ variables change no test."""
        monkeypatch.setenv("KVFLEET__STRATEGY", "quality_first")
        secrets = FLEET + "gateway: {api_keys: {team: file:/nowhere/key}}\n"
        passes(tmp_path, "- {name: x, request: {prompt: a}, expect: {selected: small}}", secrets)

    def test_a_component_that_breaks_fails_its_case_only(self, tmp_path: Path) -> None:
        """A strategy that cannot take the request is a failed route, and the next case runs."""
        passes(
            tmp_path,
            """
            - {name: no messages, request: {body: {messages: []}}, expect: {outcome: failed, status: 400}}
            - {name: x, request: {prompt: a}, expect: {status: 200}}
            """,
        )

    def test_what_ends_a_case_by_force_is_told(self, tmp_path: Path) -> None:
        """A pipeline that cannot be built any more fails its case with the reason, and does not end the run."""
        file = tmp_path / "fleet.yaml"
        file.write_text(FLEET + "tests:\n  - {name: x, request: {prompt: a}, expect: {status: 200}}\n")
        (placed,) = load_suite(file, table=discover()).cases
        result = run_placed(placed, ComponentTable())
        assert result.passed is False
        assert result.note.startswith("ended by ConfigError: ")
        assert result.text().startswith(f"{file}:22: x (ended by ConfigError: ")
