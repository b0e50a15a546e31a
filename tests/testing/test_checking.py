"""What is found wrong with pipeline tests before they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfleet.testing.cases import run_files
from tests.testing.fleet import FLEET, findings


class TestFindings:
    def test_every_wrong_name_is_found_before_anything_runs(self, tmp_path: Path) -> None:
        """Misspelt keys and names, each with its line, column and what was probably meant."""
        assert findings(
            tmp_path,
            """
            - name: misspelt
              request: {prompt: Hello, model: smal, models: [cluod], strategy: hybrid}
              given: {backends: {larg: {}}, health: {small: dwon}, load: {x: {}}, select: larg}
              expect: {selected: smal, attempts: [smal], dropped: {cloud: {by: filter.polcy}}, facts: {modalty: text}}
            """,
        ) == [
            "fleet.yaml:23:30: tests[0].request.model: unknown model 'smal'; did you mean small?",
            "fleet.yaml:23:52: tests[0].request.models[0]: unknown model 'cluod'; did you mean cloud?",
            "fleet.yaml:23:60: tests[0].request.strategy: unknown strategy 'hybrid'; did you mean hybrid_score?",
            "fleet.yaml:24:24: tests[0].given.backends.larg: unknown model 'larg'; did you mean large?",
            "fleet.yaml:24:44: tests[0].given.health.small: unknown state 'dwon'; did you mean down?",
            (
                "fleet.yaml:24:65: tests[0].given.load.x: unknown model 'x'; known: cloud, cloud@https://cloud.invalid,"
                " large, large@http://c.invalid:8000, small, small@http://a.invalid:8000, small@http://b.invalid:8000"
            ),
            "fleet.yaml:24:73: tests[0].given.select: unknown model 'larg'; did you mean large?",
            "fleet.yaml:25:14: tests[0].expect.selected: unknown model 'smal'; did you mean small?",
            "fleet.yaml:25:41: tests[0].expect.attempts[0]: unknown model 'smal'; did you mean small?",
            (
                "fleet.yaml:25:66: tests[0].expect.dropped.cloud.by: unknown stage 'filter.polcy';"
                " did you mean filter.policy?"
            ),
            "fleet.yaml:25:94: tests[0].expect.facts.modalty: unknown fact 'modalty'; did you mean modality?",
        ]

    @pytest.mark.parametrize(
        ("tests", "found"),
        [
            (
                "- {name: x, expect: {outcome: answered}}",
                "fleet.yaml:22:5: tests[0].request: the request has no prompt, messages or body; give one of them",
            ),
            (
                "- {name: x, request: {prompt: a, body: {x: 1}}, expect: {outcome: answered}}",
                "fleet.yaml:22:15: tests[0].request: the request has prompt and body; give one of them",
            ),
            (
                "- {name: x, request: {prompt: a}}",
                "fleet.yaml:22:5: tests[0].expect: nothing is expected; say what must hold",
            ),
            (
                "- {name: x, request: {prompt: a}, expect: {share: {small: {between: [0, 1]}}}}",
                "fleet.yaml:22:46: tests[0].expect.share: a share of one request says nothing; add `repeat:`",
            ),
            (
                "- {name: x, request: {prompt: a}, given: {rate_limits: {smal: {}}}, expect: {status: 200}}",
                "fleet.yaml:22:59: tests[0].given.rate_limits.smal: unknown model 'smal'; did you mean small?",
            ),
            (
                "- {name: x, repeat: 9, request: {prompt: a}, expect: {share: {small: {between: [1, 0]}}}}",
                (
                    "fleet.yaml:22:73: tests[0].expect.share.small.between: must be two numbers from 0 to 1,"
                    " the lesser first; write it as in [0.4, 0.6]"
                ),
            ),
            (
                "- {name: x, turns: [{request: {prompt: a}, expect: {status: 200}}], expect: {status: 200}}",
                (
                    "fleet.yaml:22:5: tests[0]: a case with turns has its requests and expectations there;"
                    " move `request` and `expect` into a turn"
                ),
            ),
            (
                "- {name: x, request: {prompt: a}, expects: {status: 200}}",
                "fleet.yaml:22:37: tests[0].expects: unknown key; did you mean expect?",
            ),
            (
                "- {name: x, request: {prompt: a}, given: {backends: {small: {fail: conect}}}, expect: {status: 200}}",
                (
                    "fleet.yaml:22:64: tests[0].given.backends.small.fail: 'conect' is not allowed here;"
                    " did you mean connect?"
                ),
            ),
        ],
    )
    def test_a_case_that_makes_no_sense_is_a_finding(self, tmp_path: Path, tests: str, found: str) -> None:
        """No request, two of them, nothing expected, shares of one, turns beside a request, unknown keys and faults."""
        (finding,) = findings(tmp_path, tests)
        assert finding == found

    def test_two_cases_of_one_name_are_a_finding(self, tmp_path: Path) -> None:
        """Names tell cases apart in reports."""
        case = "- {name: x, request: {prompt: a}, expect: {status: 200}}\n"
        (finding,) = findings(tmp_path, case * 2)
        assert finding == "fleet.yaml:23:6: tests[1].name: there is another test called 'x'; rename one"

    def test_a_wrong_pipeline_is_found_instead(self, tmp_path: Path) -> None:
        """The pipeline's own findings come, and no test runs."""
        tests = "- {name: x, request: {prompt: a}, expect: {status: 200}}"
        (finding,) = findings(tmp_path, tests, FLEET + "stratgy: cost_first\n")
        assert finding == "fleet.yaml:21:1: stratgy: unknown key; did you mean strategy?"
        (finding,) = findings(tmp_path, tests, FLEET + "strategy: hybrid_scor\n")
        assert "did you mean" in finding

    def test_a_file_that_was_named_must_have_tests(self, tmp_path: Path) -> None:
        """A named file without tests is a finding; a missing one an error."""
        file = tmp_path / "fleet.yaml"
        file.write_text(FLEET)
        report = run_files([file])
        assert [str(f) for f in report.findings] == [f"{file}:1:1: this file has no tests; add `tests:`"]
        assert report.is_ok is False
        with pytest.raises(FileNotFoundError, match="there is no file"):
            run_files([tmp_path / "none.yaml"])
