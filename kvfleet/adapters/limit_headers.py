"""What answers say of rate limits, whoever says it: one reader for every family of headers that providers send.

========================================================  ==============================================================
``x-ratelimit-{limit,remaining,reset}-{requests,tokens}``  OpenAI, and Groq, Fireworks, LiteLLM after it; Azure without
                                                           `limit` and `reset`; Cerebras with the window's name behind
``x-ratelimit-{limit,remaining,reset}``                    OpenRouter, many gateways; Together with ``x-tokenlimit-…``
``anthropic-ratelimit-{what}-{limit,remaining,reset}``     Anthropic; resets are moments (RFC 3339)
``ratelimit-{limit,remaining,reset}``                      draft-ietf-httpapi-ratelimit-headers, up to 06
``ratelimit: limit=…, remaining=…, reset=…``               the same, 07
``ratelimit: "name";r=…;t=…`` with ``ratelimit-policy``    the same, since 08
========================================================  ==============================================================

`Retry-After` is read by `kvfleet.adapters.faults.retry_after_s`. Sources: OpenAI's and Anthropic's pages on rate limits
(https://platform.openai.com/docs/guides/rate-limits, https://docs.anthropic.com/en/api/rate-limits), and
https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import functools
import re
from collections.abc import Iterator, Mapping

import attrs

__all__ = ["ToldQuota", "quotas_of"]

_MOST_QUOTAS = 8
_MOST_CHARACTERS = 1000
_LONGEST_S = 400 * 86_400.0
_MOST_UNITS = 1e15

_NUMBERED = re.compile(r"x-(rate|token)limit-(limit|remaining|reset)(?:-([a-z0-9_-]{1,40}))?")
_ANTHROPIC = re.compile(r"anthropic-ratelimit-(requests|(?:input-|output-)?tokens)-(limit|remaining|reset)")
_DRAFT = re.compile(r"ratelimit-(limit|remaining|reset)")
_COUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:[,;].*)?", re.DOTALL)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|us|µs|ns|[dhms]))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|[dhms])")
_UNIT_S = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_ITEM = re.compile(r'(?:[^,"]|"[^"]*")+')
_PARAMETER = re.compile(r'(?:[^;"]|"[^"]*")+')


@attrs.frozen(kw_only=True)
class ToldQuota:
    """One limit, as an answer tells it.

    Attributes:
        name: What it limits, as in ``requests``, ``input-tokens`` or ``requests-day``; or the name of its policy.
        remaining: How many requests or tokens were left.
        limit: How many there are when it is whole; None if that is not said.
        reset_s: Seconds from the answer until it is whole again; None if that is not said.
        counts_tokens: True for tokens, False for requests.
        refills: True for a bucket that fills steadily until it is whole (OpenAI, Anthropic, Groq, Cerebras); False for
            a window that gives everything back at its end.
    """

    name: str
    remaining: float
    limit: float | None = None
    reset_s: float | None = None
    counts_tokens: bool = False
    refills: bool = False


def quotas_of(headers: Mapping[str, str], wall_s: float) -> tuple[ToldQuota, ...]:
    """The limits an answer tells; none for most engines, and that costs next to nothing.

    What makes no sense is left out: a negative number is how some say that they do not know.

    Args:
        headers: The answer's, with lower-case names.
        wall_s: Unix time in seconds, for resets told as moments; the answer's own `Date` goes before it.

    >>> told = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "12"}
    >>> told["x-ratelimit-reset-requests"] = "6m0s"
    >>> (quota,) = quotas_of(told, 0.0)
    >>> quota.name, quota.remaining, quota.limit, quota.reset_s
    ('requests', 12.0, 60.0, 360.0)
    """
    if "ratelimit" not in "".join(headers):
        return ()
    found = {quota.name: quota for quota in (*_plain(headers, wall_s), *_structured(headers))}
    return tuple(found.values())[:_MOST_QUOTAS]


def _reset_s(value: str | None, headers: Mapping[str, str], wall_s: float) -> float | None:
    """Seconds until a reset, told as ``6m0s``, ``20ms``, ``12.5``, a Unix time or a date; None if in no such way.

    Moments are of the backend's clock, which its `Date` tells; only they need it.
    """
    if value is None:
        return None
    if _DURATION.fullmatch(value):
        return _sane_s(sum(float(number) * _UNIT_S[unit] for number, unit in _PART.findall(value)))
    number = _count(value)
    if number is not None and number < 1e9:
        return _sane_s(number)
    at_s = _moment_s(value) if number is None else number
    if at_s is not None and at_s > 1e11:  # milliseconds since 1970, as OpenRouter has it
        at_s /= 1000
    return None if at_s is None else _sane_s(at_s - (_date_s(headers.get("date")) or wall_s))


def _sane_s(seconds: float) -> float | None:
    return max(seconds, 0.0) if seconds <= _LONGEST_S else None


def _date_s(value: str | None) -> float | None:
    """An HTTP date as Unix time."""
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() if value else None
    except (ValueError, TypeError, OverflowError):
        return None


def _moment_s(value: str) -> float | None:
    """A moment as Unix time: RFC 3339, taken for UTC if it has no offset, or an HTTP date."""
    try:
        moment = dt.datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()
    except (ValueError, OverflowError):
        return _date_s(value)


def _count(value: str | None) -> float | None:
    """A number that is not negative, of which more may follow after a comma (drafts up to 06); None if it is none."""
    match = _COUNT.fullmatch(value) if value else None
    number = float(match[1]) if match else _MOST_UNITS
    return number if number < _MOST_UNITS else None


def _plain(headers: Mapping[str, str], wall_s: float) -> Iterator[ToldQuota]:
    """The families with one header for each figure."""
    told: dict[tuple[str, bool], dict[str, str]] = {}
    for header, value in headers.items():
        if "limit-" in header and (place := _place_of(header)) is not None:
            name, refills, figure = place
            told.setdefault((name, refills), {})[figure] = value.strip()[:_MOST_CHARACTERS]
    for (name, refills), figures in told.items():
        remaining, limit = _count(figures.get("remaining")), _count(figures.get("limit"))
        if remaining is not None and limit != 0 and not figures.get("limit", "").startswith("-"):
            yield ToldQuota(
                name=name,
                remaining=remaining,
                limit=limit,
                reset_s=_reset_s(figures.get("reset"), headers, wall_s),
                counts_tokens="token" in name,
                refills=refills,
            )


@functools.lru_cache(maxsize=256)
def _place_of(header: str) -> tuple[str, bool, str] | None:
    """What a header tells: the quota's name, whether it refills steadily, and which of its figures."""
    if match := _NUMBERED.fullmatch(header):
        kind, figure, name = match.groups()
        return name or ("requests" if kind == "rate" else "tokens"), bool(name), figure
    if match := _ANTHROPIC.fullmatch(header):
        return match[1], True, match[2]
    if match := _DRAFT.fullmatch(header):
        return "requests", False, match[1]
    return None


def _structured(headers: Mapping[str, str]) -> Iterator[ToldQuota]:
    """The draft's single field; of its units only requests and tokens say something here."""
    field = headers.get("ratelimit", "")[:_MOST_CHARACTERS]
    if not field:
        return
    items = [_item(text) for text in _ITEM.findall(field)]
    together = {name: value for name, value, _ in items if value}
    if "remaining" in together:  # draft 07: one dictionary for one quota
        remaining, reset_s = _count(together["remaining"]), _count(together.get("reset"))
        if remaining is not None:
            yield ToldQuota(
                name="requests", remaining=remaining, limit=_count(together.get("limit")) or None, reset_s=reset_s
            )
        return
    policies = {name: of for name, _, of in map(_item, _ITEM.findall(headers.get("ratelimit-policy", "")[:2000]))}
    for name, _, parameters in items:
        policy = policies.get(name, {})
        remaining, unit = _count(parameters.get("r")), policy.get("qu", "requests")
        if name and remaining is not None and (unit == "requests" or "token" in unit):
            yield ToldQuota(
                name=name[:40],
                remaining=remaining,
                limit=_count(policy.get("q")) or None,
                reset_s=_count(parameters.get("t")),
                counts_tokens="token" in unit,
            )


def _item(text: str) -> tuple[str, str, dict[str, str]]:
    """One item of a structured list: its name, its value if it has one, and its parameters."""
    head, *rest = [part.strip() for part in _PARAMETER.findall(text)] or [""]
    name, _, value = head.partition("=")
    pairs = [part.partition("=") for part in rest]
    return name.strip('" '), value, {key.strip(): of.strip('" ') for key, _, of in pairs}
