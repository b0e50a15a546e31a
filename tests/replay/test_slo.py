"""Service levels: what a good answer is."""

from __future__ import annotations

import pytest

from kvfleet.errors import ConfigError
from kvfleet.replay.slo import SLO, parse_slo


def test_a_service_level_is_read_with_its_units() -> None:
    """Each time once or not at all."""
    assert parse_slo("ttft < 2s, tpot<=50ms , e2e < 1 min") == SLO(ttft_s=2.0, tpot_s=0.05, e2e_s=60.0)
    assert str(parse_slo("tpot < 50ms, ttft < 2s")) == "ttft <= 2 s, tpot <= 50 ms"


@pytest.mark.parametrize(
    ("times", "is_good"),
    [((2.0, 0.05, 100.0), True), ((2.1, 0.05, 3.0), False), ((1.0, 0.06, 3.0), False), ((1.0, None, 3.0), True)],
)
def test_an_answer_is_good_if_it_keeps_every_limit(times: tuple[float, float | None, float], is_good: bool) -> None:
    """An answer of one token has no time between tokens to be judged by."""
    assert parse_slo("ttft < 2s, tpot < 50ms").is_met(*times) is is_good


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("ttfb < 2s", 1, "there is no 'ttfb'; did you mean ttft?"),
        ("ttft < 2", 9, "needs a unit; units are us, ms, s, min, h"),
        ("ttft < 2 parsecs", 10, "'parsecs' is no unit of time"),
        ("ttft < 2s; tpot < 1s", 10, "expected a comma, not ';'"),
        ("ttft < 2s,", 11, "cannot be read"),
        ("", 1, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_column(text: str, column: int, words: str) -> None:
    """In the words of every other finding."""
    with pytest.raises(ConfigError) as caught:
        parse_slo(text)
    assert caught.value.findings[0].column == column
    assert words in str(caught.value)
