"""What differs between two routes: what was asked, who was left, how they scored, who answered, how fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs

from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import AttributeValue
from kvfleet.trace.wording import duration, labels, quantity

__all__ = ["Change", "diff"]

_REQUEST = {
    "operation": names.OPERATION,
    "model asked for": names.MODEL_REQUESTED,
    "stream": names.STREAM,
    "tenant": names.TENANT,
    "data class": names.DATA_CLASS,
    "region": names.REGION,
    "fleet": names.FLEET,
    "pipeline": names.PIPELINE_HASH,
    "strategy": names.STRATEGY,
}
_Facet = tuple[str, str, str]


@attrs.frozen(kw_only=True)
class Change:
    """One thing that differs.

    Attributes:
        part: request, facts, stages, dropped, scores, attempts or outcome.
        what: Of what.
        before, after: As text; empty where one route has no such thing.
    """

    part: str
    what: str
    before: str
    after: str

    def to_dict(self) -> dict[str, str]:
        """The same as plain JSON types."""
        return attrs.asdict(self)


def diff(before: Explanation, after: Explanation) -> tuple[Change, ...]:
    """Everything that differs, in the order of a route; times of single stages are left out."""
    short = labels((*before.replicas, *after.replicas))
    old = {(part, what): value for part, what, value in _facets(before, short)}
    new = {(part, what): value for part, what, value in _facets(after, short)}
    keys = sorted({**old, **new}, key=lambda key: _PARTS.index(key[0]))
    return tuple(
        Change(part=part, what=what, before=old.get((part, what), ""), after=new.get((part, what), ""))
        for part, what in keys
        if old.get((part, what)) != new.get((part, what))
    )


_PARTS = ("request", "facts", "stages", "dropped", "scores", "attempts", "outcome")


def _facets(one: Explanation, short: Mapping[str, str]) -> Iterator[_Facet]:
    """Everything comparable of a route, as text."""
    attributes = one.trace.route.attributes
    for what, name in _REQUEST.items():
        if name in attributes:
            yield "request", what, _shown(attributes[name])
    yield "request", "candidates", ", ".join(sorted(short[replica] for replica in one.replicas))
    for stage in one.stages:
        for fact, value in stage.facts.items():
            yield "facts", fact, _shown(value)
        yield "stages", stage.key, "skipped" if stage.is_skipped else f"failed: {stage.error}" if stage.error else "ran"
    for drop in one.drops:
        rule = f" [{drop.rule}]" if drop.rule else ""
        yield "dropped", short[drop.candidate], f"{drop.stage}: {drop.reason}{rule}"
    yield from _scores(one, short)
    for attempt in one.attempts:
        ended = f"failed: {attempt.fault}" if attempt.fault else "answered"
        yield "attempts", str(attempt.number), f"{short.get(attempt.replica, attempt.replica)} {ended}"
    yield from _outcome(one, short)


def _scores(one: Explanation, short: Mapping[str, str]) -> Iterator[_Facet]:
    for candidate in one.candidates:
        for column, (value, unit) in candidate.columns.items():
            yield "scores", f"{column} of {short[candidate.id]}", quantity(value, unit)
        if candidate.cached_tokens is not None:
            yield "scores", f"cached of {short[candidate.id]}", quantity(candidate.cached_tokens, "tokens")
        if candidate.total_score is not None:
            ranked = f"{quantity(candidate.total_score, candidate.unit)} (rank {candidate.rank})"
            yield "scores", f"total of {short[candidate.id]}", ranked


def _outcome(one: Explanation, short: Mapping[str, str]) -> Iterator[_Facet]:
    told: Sequence[tuple[str, str]] = (
        ("selected", short.get(one.selected_replica, one.selected_model)),
        ("served by", short.get(one.served_replica, one.served_by)),
        ("outcome", one.outcome),
        ("error", one.error),
        ("time", duration(one.total_latency_ms)),
        ("first byte", "" if one.ttfb_s is None else duration(one.ttfb_s * 1000)),
        ("cost", "" if one.cost_usd is None else quantity(one.cost_usd, "usd")),
    )
    for what, value in told:
        yield "outcome", what, value
    if one.usage is not None:
        yield "outcome", "prompt tokens", f"{one.usage.prompt_tokens:,}"
        yield "outcome", "cached tokens", f"{one.usage.cached_tokens or 0:,}"
        yield "outcome", "answer tokens", f"{one.usage.completion_tokens:,}"


def _shown(value: AttributeValue) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(str(item) for item in value)
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
