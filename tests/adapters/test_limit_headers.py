"""Rate limits as answers tell them, in every dialect that providers are known to speak."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.limit_headers import ToldQuota, quotas_of

WALL_S = 1_755_780_000.0
DATE = "Thu, 21 Aug 2025 12:41:00 GMT"


def told(
    name: str, remaining: float, limit: float | None = None, reset_s: float | None = None, **more: Any
) -> ToldQuota:
    """A quota of requests, unless its name says tokens."""
    return ToldQuota(
        name=name, remaining=remaining, limit=limit, reset_s=reset_s, counts_tokens="token" in name, **more
    )


def test_openai() -> None:
    """Requests and tokens, each a bucket that fills until its reset."""
    headers = {
        "openai-processing-ms": "410",
        "x-ratelimit-limit-requests": "5000",
        "x-ratelimit-limit-tokens": "160000",
        "x-ratelimit-remaining-requests": "4999",
        "x-ratelimit-remaining-tokens": "159976",
        "x-ratelimit-reset-requests": "12ms",
        "x-ratelimit-reset-tokens": "6m0s",
    }
    assert quotas_of(headers, WALL_S) == (
        told("requests", 4999, 5000, 0.012, refills=True),
        told("tokens", 159976, 160000, 360, refills=True),
    )


def test_azure_tells_what_is_left_and_no_more() -> None:
    """Limit and reset are not said; and what it does not know is -1."""
    assert quotas_of({"x-ratelimit-remaining-requests": "79", "x-ratelimit-remaining-tokens": "61353"}, WALL_S) == (
        told("requests", 79, refills=True),
        told("tokens", 61353, refills=True),
    )
    unknown = {"x-ratelimit-limit-tokens": "-1", "x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "0"}
    assert quotas_of(unknown, WALL_S) == ()
    assert quotas_of({**unknown, "x-ratelimit-remaining-tokens": "0"}, WALL_S) == ()


def test_anthropic_tells_moments_by_its_own_clock() -> None:
    """Resets count from the answer's date, so a machine whose clock is wrong still waits as long as it should."""
    headers = {
        "date": DATE,
        "anthropic-ratelimit-input-tokens-limit": "80000",
        "anthropic-ratelimit-input-tokens-remaining": "1000",
        "anthropic-ratelimit-input-tokens-reset": "2025-08-21T12:41:59Z",
        "anthropic-ratelimit-output-tokens-limit": "16000",
        "anthropic-ratelimit-output-tokens-remaining": "16000",
        "anthropic-ratelimit-output-tokens-reset": "2025-08-21T12:41:00Z",
        "anthropic-ratelimit-requests-limit": "1000",
        "anthropic-ratelimit-requests-remaining": "999",
        "anthropic-ratelimit-requests-reset": "2025-08-21T12:40:59Z",
        "anthropic-ratelimit-unified-status": "allowed",
    }
    expected = (
        told("input-tokens", 1000, 80000, 59, refills=True),
        told("output-tokens", 16000, 16000, 0, refills=True),
        told("requests", 999, 1000, 0, refills=True),
    )
    assert quotas_of(headers, WALL_S) == quotas_of(headers, 0.0) == expected


def test_cerebras_names_the_window() -> None:
    """Two quotas of one kind would otherwise be taken for one."""
    headers = {
        "x-ratelimit-limit-requests-day": "1000",
        "x-ratelimit-remaining-requests-day": "955",
        "x-ratelimit-reset-requests-day": "33011.382867097855",
        "x-ratelimit-limit-tokens-minute": "60000",
        "x-ratelimit-remaining-tokens-minute": "8298",
        "x-ratelimit-reset-tokens-minute": "11.382867097854614",
    }
    day, minute = quotas_of(headers, WALL_S)
    assert day == told("requests-day", 955, 1000, 33011.382867097855, refills=True)
    assert minute == told("tokens-minute", 8298, 60000, 11.382867097854614, refills=True)


@pytest.mark.parametrize(
    ("reset", "seconds"),
    [("30", 30), (str(int(WALL_S + 45)), 45), (str(int(WALL_S + 45) * 1000), 45), ("-1", None), ("soon", None)],
)
def test_a_bare_limit_is_a_window_of_requests(reset: str, seconds: float | None) -> None:
    """Its reset is told in seconds, in Unix time, or in milliseconds of it (OpenRouter)."""
    headers = {"x-ratelimit-limit": "50", "x-ratelimit-remaining": "0", "x-ratelimit-reset": reset}
    assert quotas_of(headers, WALL_S) == (told("requests", 0, 50, seconds),)


def test_together_has_tokens_apart() -> None:
    """Under another name."""
    headers = {
        "x-ratelimit-limit": "10",
        "x-ratelimit-remaining": "9",
        "x-tokenlimit-limit": "3000",
        "x-tokenlimit-remaining": "20",
    }
    assert quotas_of(headers, WALL_S) == (told("requests", 9, 10), told("tokens", 20, 3000))


@pytest.mark.parametrize(
    ("headers", "quotas"),
    [
        (
            {"ratelimit-limit": "100, 100;w=60", "ratelimit-remaining": "50", "ratelimit-reset": "5"},
            [told("requests", 50, 100, 5)],
        ),
        ({"ratelimit": "limit=100, remaining=50, reset=5"}, [told("requests", 50, 100, 5)]),
        ({"ratelimit": "limit=100, reset=5"}, []),
        ({"ratelimit": "limit=0, remaining=0, reset=5"}, [told("requests", 0, None, 5)]),
        (
            {
                "ratelimit": '"burst";r=50;t=30, "daily";r=7;pk=:cHsdsRa894==:',
                "ratelimit-policy": '"burst";q=100;w=60,"daily";q=1000;w=86400;pk=:cHsdsRa894==:',
            },
            [told("burst", 50, 100, 30), told("daily", 7, 1000)],
        ),
        (
            {
                "ratelimit": '"bytes";r=5, "both";r=6, "llm";r=7;t=1',
                "ratelimit-policy": '"bytes";q=9;qu="content-bytes","both";q=9;qu="concurrent-requests","llm";q=9;qu="tokens"',
            },
            [ToldQuota(name="llm", remaining=7, limit=9, reset_s=1, counts_tokens=True)],
        ),
        ({"ratelimit": "default;r=3"}, [told("default", 3)]),
        ({"ratelimit": '"a;b";r=3, "c'}, [told("a;b", 3)]),
        ({"ratelimit": "nonsense"}, []),
    ],
)
def test_the_drafts_of_the_ietf(headers: dict[str, str], quotas: list[ToldQuota]) -> None:
    """All of them are in use; of units only requests and tokens count."""
    assert list(quotas_of(headers, WALL_S)) == quotas


def test_resets_are_told_in_many_ways() -> None:
    """Durations as Go writes them, plain seconds, and dates of both kinds."""
    ways = {
        "1s": 1,
        "20ms": 0.02,
        "6m0s": 360,
        "1h2m3.5s": 3723.5,
        "2m59.56s": 179.56,
        "1d": 86_400,
        "12.5": 12.5,
        "2025-08-21T12:41:30Z": 30,
        "2025-08-21T14:41:30+02:00": 30,
        "2025-08-21T12:41:30": 30,
        "Thu, 21 Aug 2025 12:42:00 GMT": 60,
        "99999d": None,
        "": None,
        "1s later": None,
    }
    found = {}
    for way in ways:
        headers = {"date": DATE, "x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": way}
        (quota,) = quotas_of(headers, 0.0)
        found[way] = quota.reset_s
    assert found == pytest.approx(ways)


def test_an_answer_without_limits_tells_none() -> None:
    """As most engines' do, and names that only look like it."""
    assert quotas_of({"content-type": "application/json", "x-rate": "1", "limit-requests": "3"}, WALL_S) == ()
    assert quotas_of({"x-ratelimit-limit-requests": "5"}, WALL_S) == ()
    assert quotas_of({"x-ratelimit-remaining-requests": "many"}, WALL_S) == ()


NAMES = st.sampled_from(
    [
        *(
            f"x-ratelimit-{f}-{k}"
            for f in ("limit", "remaining", "reset")
            for k in ("requests", "tokens", "tokens-day")
        ),
        *(f"anthropic-ratelimit-tokens-{f}" for f in ("limit", "remaining", "reset")),
        *("ratelimit", "ratelimit-policy", "ratelimit-remaining", "ratelimit-reset", "x-ratelimit-remaining", "date"),
    ]
)
VALUES = st.one_of(
    st.text(max_size=40), st.from_regex(r'[0-9a-z";=,: .+-]{0,60}', fullmatch=True), st.integers().map(str)
)


@given(st.dictionaries(NAMES, VALUES, max_size=12))
def test_whatever_a_backend_says_is_read_or_left_out(headers: dict[str, str]) -> None:
    """Nothing raises, and every figure found can be reckoned with."""
    for quota in quotas_of(headers, WALL_S):
        assert 0 <= quota.remaining < 1e15
        assert quota.limit is None or 0 < quota.limit < 1e15
        assert quota.reset_s is None or quota.reset_s >= 0


def test_many_quotas_are_not_all_kept() -> None:
    """A backend cannot make us keep a thousand of them."""
    headers = {f"x-ratelimit-remaining-{i}": "1" for i in range(1000)}
    assert len(quotas_of(headers, WALL_S)) == 8
