"""Expectations: what CI may say of a replay."""

from __future__ import annotations

import pytest

from kvfleet.errors import ConfigError
from kvfleet.replay.expect import parse_expectation, shown
from kvfleet.replay.measures import FIGURES

FIGURES_OF = {
    "a": {"ttft_mean": 1.0, "ttft_p99": 4.0, "cached_share": 0.5, "imbalance": 1.5, "failed": 0, "goodput_rps": 3.0},
    "b": {"ttft_mean": 2.0, "ttft_p99": 6.0, "cached_share": 0.25, "imbalance": 2.5, "failed": 3, "goodput_rps": 2.0},
}


def holds(text: str) -> list[bool]:
    """The verdicts, in the order of the pipelines."""
    return [one.holds for one in parse_expectation(text, list(FIGURES_OF)).check(FIGURES_OF)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttft_p99 < 5s", [True, False]),
        ("ttft_p99<5000ms", [True, False]),
        ("ttft_p99 <= 0.1 min", [True, True]),
        ("4s >= ttft_p99", [True, False]),
        ("cached_share > 30%", [True, False]),
        ("cached_share > 0.3", [True, False]),
        ("imbalance < 2", [True, False]),
        ("failed <= 0", [True, False]),
        ("goodput_rps > 2.5/s", [True, False]),
        ("a.ttft_mean < 0.9 * b.ttft_mean", [True]),
        ("a.ttft_mean < 0.5 * b.ttft_mean", [False]),
        ("0.4 * b.ttft_mean < a.ttft_mean", [True]),
        ("ttft_mean <= a.ttft_mean", [True, False]),
        ("ttft_p99 < 4.5 * ttft_mean", [True, True]),
        ("b.ttft_p99 < 5 s", [False]),
        ("tpot_mean < 1 s", [False, False]),  # nobody knows it
    ],
)
def test_an_expectation_is_checked_for_each_pipeline_it_speaks_of(text: str, expected: list[bool]) -> None:
    """Units are converted; a figure without a pipeline is every pipeline's own; what is unknown does not hold."""
    assert holds(text) == expected


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("ttft_p98 < 5s", 1, "there is no figure 'ttft_p98'; did you mean ttft_p"),
        ("ttft_p99 < 5", 12, "ttft_p99 is a time and needs a unit; units are us, ms, s, min, h"),
        ("ttft_p99 < 5 %", 12, "ttft_p99 has no unit '%'"),
        ("imbalance < 2s", 13, "imbalance has no unit 's'"),
        ("c.ttft_p99 < 5s", 1, "no pipeline is called 'c'"),
        ("ttft_p99 = 5s", 10, "expected a comparison: <, <=, > or >="),
        ("ttft_p99 < 5s, tpot_mean < 1s", 14, "expected nothing more; give --expect again for another one"),
        ("1 < 2", 1, "compares two numbers; figures are ttft_mean"),
        ("ttft_p99 < 2s * ttft_mean", 13, "a factor has no unit"),
        ("ttft_p99 < cached_share", 12, "cached_share cannot be compared with ttft_p99; their units differ"),
        ("ttft_p99 <", 11, "expected a figure or a number"),
        ("", 1, "expected a figure or a number"),
        ("ttft_p99 < 2 *", 15, "expected a figure"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_column(text: str, column: int, words: str) -> None:
    """And with what would be right."""
    with pytest.raises(ConfigError) as caught:
        parse_expectation(text, ["a", "b"])
    finding = caught.value.findings[0]
    assert (finding.file, finding.line, finding.column) == ("--expect", 1, column)
    assert words in str(finding)


def test_labels_may_look_like_file_names_and_strategies() -> None:
    """As the command makes them."""
    labels = ["self-hosted.v2", "self-hosted.v2:least_requests"]
    for label in labels:
        assert parse_expectation(f"{label}.ttft_mean < 1s", labels).left.label == label


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ttft_mean", 0.0123, "12.3 ms"),
        ("cached_share", 0.5, "50.0%"),
        ("cost_usd", 1234.5, "$1,234.50"),
        ("cost_usd", 2.14e-05, "$0.0000214"),
        ("failed", 3, "3"),
        ("output_tokens_per_s", 1234.6, "1,235"),
        ("imbalance", 1.0, "1"),
        ("imbalance", None, "-"),
    ],
)
def test_values_are_shown_in_their_unit(name: str, value: float | None, text: str) -> None:
    """Times with a unit of their size."""
    assert shown(value, FIGURES[name]) == text
