"""What a pipeline test can expect, and how it reads if that does not hold."""

from __future__ import annotations

from pathlib import Path

from tests.testing.fleet import mismatches, passes, run

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
                shadowed: [cloud]
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
            "expect.shadowed: expected [cloud], got []",
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
