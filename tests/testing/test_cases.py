"""Pipeline tests in YAML: what they can say, what they find wrong, and how a failing one reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from kvfleet.testing.cases import CaseResult, Report, run_files

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
    file.write_text(fleet + "tests:\n" + _indented(tests))
    return run_files([file])


def _indented(text: str) -> str:
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


_CLOUD_DROPPED = "dropped by filter.policy [data_class_enforcement]: not cleared for internal data"


class TestExpectations:
    def test_everything_that_can_be_expected_holds(self, tmp_path: Path) -> None:
        """One case with every key of the vocabulary that fits an answered request."""
        passes(
            tmp_path,
            """
            - name: all of it
              request: {prompt: Hello, tags: {domain: coding}, model: auto, operation: chat, region: eu}
              given: {health: {"small@http://b.invalid:8000": down}}
              expect:
                selected: small
                served_by: small@http://a.invalid:8000
                attempts: [small]
                ranking: [small, large]
                dropped:
                  small@http://b.invalid:8000: {by: filter.health}
                  cloud: {by: filter.policy, rule: data_class_enforcement}
                kept: [small, large]
                outcome: answered
                status: 200
                scores: {small: {min: 0.0, max: 1.0}, large: {max: 1.0}}
                cached: {small: {max: 4096}}
                facts: {modality: text}
            """,
        )

    def test_each_that_does_not_hold_is_told_with_its_place(self, tmp_path: Path) -> None:
        """Every kind of expectation, all of them wrong, in one list."""
        found = mismatches(
            tmp_path,
            """
            - name: nothing of it
              request: {prompt: Hello}
              expect:
                selected: cloud
                served_by: large
                attempts: []
                ranking: [large]
                dropped: {small: {by: filter.health}, cloud: {rule: no-such-rule}}
                kept: [cloud]
                outcome: failed
                error: no_candidates
                status: 503
                scores: {small: {min: 5}, large: {max: 0.1}, cloud: {}}
                cached: {large: {min: 1, max: 2}}
                facts: {modality: vision}
            """,
        )
        scores = [one for one in found if "scores" in one]
        assert [one for one in found if one not in scores] == [
            "expect.outcome: expected failed, got answered",
            "expect.error: expected no_candidates, got no error",
            "expect.status: expected 503, got 200",
            "expect.selected: expected cloud, got small",
            "expect.served_by: expected large, got small",
            "expect.attempts: expected [], got [small]",
            "expect.ranking: expected [large], got [small]",
            "expect.dropped.small: expected it to be dropped by filter.health, got it kept",
            f"expect.dropped.cloud: expected it to be dropped [no-such-rule], got it {_CLOUD_DROPPED}",
            f"expect.kept: expected cloud to be kept, got it {_CLOUD_DROPPED}",
            "expect.cached.large: expected 1 to 2, got 0",
            "expect.facts.modality: expected 'vision', got 'text'",
        ]
        assert [one.partition(", got")[0] for one in scores] == [
            "expect.scores.small: expected at least 5",
            "expect.scores.large: expected at most 0.1",
            "expect.scores.cloud: expected a value",
        ]

    def test_a_failing_case_reads_well(self, tmp_path: Path) -> None:
        """File and line, what was expected and what came, and the decision in words."""
        report = run(tmp_path, "- {name: goes to the cloud, request: {prompt: Hello}, expect: {served_by: cloud}}")
        (result,) = report.results
        assert (report.passed, report.failed, report.is_ok) == (0, 1, False)
        lines = result.text().splitlines()
        assert lines[:4] == [
            f"{tmp_path}/fleet.yaml:22: goes to the cloud",
            f"  {tmp_path}/fleet.yaml:22:66: expect.served_by: expected cloud, got small",
            "  The decision:",
            "    Strategy: hybrid_score",
        ]
        plain = report.to_dict()
        assert (plain["failed"], plain["results"][0]["mismatches"][0]["line"]) == (1, 22)

    def test_a_share_is_taken_over_the_repetitions(self, tmp_path: Path) -> None:
        """Over 200 requests a weighted choice keeps its shares; a wrong share is told."""
        tests = """
            - name: shares
              repeat: 200
              seed: 7
              request: {prompt: Hello, strategy: weighted, models: [small, large]}
              expect: {share: {large: {between: [0.35, 0.65]}, small: {between: [0.0, 0.1]}}}
            """
        report = run(tmp_path, tests)
        (result,) = report.results
        assert result.note == "over all 200 repetitions"
        assert [one.path for one in result.mismatches] == [("expect", "share", "small")]

    def test_the_same_seed_gives_the_same_choices(self, tmp_path: Path) -> None:
        """Two runs of a random choice agree to the last request, and another seed disagrees."""
        tests = """
            - name: chance
              repeat: 40
              seed: SEED
              request: {prompt: Hello, strategy: random}
              expect: {share: {large: {between: [2e-9, 3e-9]}}}
            """
        shares = [mismatches(tmp_path, tests.replace("SEED", seed))[0] for seed in ("1", "1", "2", "3", "4")]
        assert shares[0] == shares[1]
        assert len(set(shares)) > 1


class TestTheWorld:
    def test_a_failed_backend_is_left_for_the_next(self, tmp_path: Path) -> None:
        """Faults, statuses and retries: the attempts are those of the live engine."""
        passes(
            tmp_path,
            """
            - name: both small ones are down
              request: {prompt: Hello}
              given: {backends: {small: {fail: connect}}}
              expect: {selected: small, served_by: large, attempts: [small, small, large]}
            - name: everybody fails
              request: {prompt: Hello}
              given: {backends: {small: {fail: overloaded, status: 529}, large: {fail: server_error}}}
              expect: {outcome: failed, error: backend_failed, attempts: [small, small, large]}
            """,
        )

    def test_a_backend_may_fail_for_a_while(self, tmp_path: Path) -> None:
        """`fail_times` counts calls; the next turn is answered."""
        passes(
            tmp_path,
            """
            - name: it recovers
              given: {backends: {large: {fail: connect, fail_times: 1}}}
              turns:
                - {request: {prompt: Hello, model: large}, expect: {outcome: failed, attempts: [large]}}
                - {request: {prompt: Hello, model: large}, expect: {outcome: answered, attempts: [large]}}
            """,
        )

    def test_latency_is_virtual_and_may_be_a_timeout(self, tmp_path: Path) -> None:
        """A backend that takes an hour times out at the fallback's limit, in no time."""
        passes(
            tmp_path,
            """
            - name: an hour is too long
              request: {prompt: Hello, stream: true}
              given: {backends: {small: {latency_ms: 3600000}}}
              expect: {served_by: large, attempts: [small, small, large]}
            """,
        )

    def test_a_stream_may_break(self, tmp_path: Path) -> None:
        """After the first piece there is no other backend: the route ends as failed, at its 200."""
        passes(
            tmp_path,
            """
            - name: it breaks
              request: {prompt: Hello, stream: true}
              given: {backends: {small: {fail: disconnected, fail_after: 2}}}
              expect: {served_by: small, attempts: [small], outcome: failed, error: stream_interrupted, status: 200}
            """,
        )

    def test_turns_see_what_came_before(self, tmp_path: Path) -> None:
        """A conversation stays where it was, and time that passes between turns lets it go."""
        question = "Tell me all there is to know about the life of the honey bee, from egg to forager."
        passes(
            tmp_path,
            f"""
            - name: the second turn finds the first
              given: {{select: "small@http://b.invalid:8000"}}
              turns:
                - request: {{prompt: {question!r}}}
                  expect: {{served_by: "small@http://b.invalid:8000"}}
                - request:
                    messages:
                      - {{role: user, content: {question!r}}}
                      - {{role: assistant, content: This is a test's answer.}}
                      - {{role: user, content: Go on.}}
                  expect: {{cached: {{"small@http://b.invalid:8000": {{min: 10}}}}}}
                - after_s: 100000
                  request:
                    messages:
                      - {{role: user, content: {question!r}}}
                      - {{role: assistant, content: This is a test's answer.}}
                      - {{role: user, content: Go on.}}
                  expect: {{cached: {{small: {{max: 2}}}}}}
            """,
        )

    def test_load_is_what_the_engines_say(self, tmp_path: Path) -> None:
        """A replica whose engine reports a queue loses to its idle sibling."""
        passes(
            tmp_path,
            """
            - name: the idle one
              request: {prompt: Hello, strategy: latency_first, model: small}
              given: {load: {"small@http://a.invalid:8000": {running: 8, waiting: 30, kv_usage: 0.9}}}
              expect: {selected: "small@http://b.invalid:8000"}
            - name: the other idle one
              request: {prompt: Hello, strategy: latency_first, model: small}
              given: {load: {"small@http://b.invalid:8000": {waiting: 30}}}
              expect: {selected: "small@http://a.invalid:8000"}
            """,
        )

    def test_a_choice_can_be_forced(self, tmp_path: Path) -> None:
        """`select` puts somebody first whatever the strategy says, until a turn says otherwise."""
        passes(
            tmp_path,
            """
            - name: forced
              given: {select: large}
              turns:
                - {request: {prompt: Hello}, expect: {selected: large}}
                - {request: {prompt: Hello, strategy: random}, expect: {selected: large}}
                - {request: {prompt: Hello}, given: {select: small}, expect: {selected: small}}
            """,
        )

    def test_requests_of_every_operation(self, tmp_path: Path) -> None:
        """Messages, bodies, text completions; who serves what is the registry's word."""
        passes(
            tmp_path,
            """
            - {name: messages, request: {messages: [{role: user, content: Hi}]}, expect: {outcome: answered}}
            - {name: body, request: {body: {messages: [{role: user, content: Hi}], n: 2}}, expect: {status: 200}}
            - {name: text, request: {prompt: Hi, operation: completion}, expect: {outcome: answered}}
            - name: nobody embeds
              request: {prompt: Hi, operation: embedding}
              expect: {outcome: no_candidates, error: no_candidates, status: 503}
            - name: a public request may go to the cloud
              request: {prompt: Hi, data_class: public, models: [cloud]}
              expect: {served_by: cloud}
            - name: an internal one may not
              request: {prompt: Hi, models: [cloud]}
              expect: {status: 403, dropped: {cloud: {by: filter.policy}}}
            """,
        )


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


class TestFiles:
    def test_a_folder_is_searched_for_tests(self, tmp_path: Path) -> None:
        """Files with tests are run in order, others passed over, and what is no YAML is told."""
        case = "- {name: %s, request: {prompt: a}, expect: {status: 200}}"
        for name in ("b", "a"):
            (tmp_path / f"{name}.yaml").write_text(FLEET + "tests:\n" + _indented(case % name))
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


class TestPytestPlugin:
    def _pytest(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
        environ = {**os.environ, "PYTEST_ADDOPTS": "", "NO_COLOR": "1"}
        return subprocess.run(  # noqa: S603 - our own interpreter
            command, cwd=folder, capture_output=True, text=True, check=False, env=environ
        )

    def test_a_named_file_is_collected_and_a_failure_reads_well(self, tmp_path: Path) -> None:
        """The cases are items; a failing one shows the mismatch and the decision, and no Python traceback."""
        cases = (
            "  - {name: holds, request: {prompt: a}, expect: {selected: small}}\n"
            "  - {name: does not, request: {prompt: a}, expect: {selected: cloud}}\n"
        )
        (tmp_path / "fleet.yaml").write_text(FLEET + "tests:\n" + cases)
        done = self._pytest(tmp_path, "fleet.yaml", "-rA")
        assert "PASSED fleet.yaml::holds" in done.stdout
        assert "FAILED fleet.yaml::does not" in done.stdout
        assert "fleet.yaml:23:53: expect.selected: expected cloud, got small" in done.stdout
        assert "Selected: small" in done.stdout
        assert "Traceback" not in done.stdout
        assert done.returncode == 1

    def test_the_ini_option_names_folders(self, tmp_path: Path) -> None:
        """Only what lies under `kvfleet_pipelines` is collected; a wrong file is a collection error with its findings."""
        (tmp_path / "pipelines").mkdir()
        (tmp_path / "pytest.ini").write_text("[pytest]\nkvfleet_pipelines = pipelines\n")
        case = "tests:\n  - {name: holds, request: {prompt: a}, expect: {selected: small}}\n"
        (tmp_path / "pipelines" / "good.yaml").write_text(FLEET + case)
        (tmp_path / "elsewhere.yaml").write_text(FLEET + case)
        done = self._pytest(tmp_path)
        assert "1 passed" in done.stdout
        (tmp_path / "pipelines" / "bad.yaml").write_text(FLEET + case.replace("selected: small", "selected: smal"))
        done = self._pytest(tmp_path)
        assert "unknown model 'smal'; did you mean small?" in done.stdout
        assert done.returncode == 2

    def test_it_costs_nothing_where_it_is_not_used(self) -> None:
        """Loading the plugin imports nothing of kvfleet beyond its own packages."""
        code = (
            "import sys, kvfleet.testing.pytest_plugin;"
            "print(sorted(m for m in sys.modules if m.startswith(('kvfleet', 'httpx', 'opentelemetry', 'ruamel'))))"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own interpreter
        assert done.stdout.strip() == "['kvfleet', 'kvfleet.testing', 'kvfleet.testing.pytest_plugin']"
