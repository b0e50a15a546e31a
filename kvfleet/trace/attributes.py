"""Typed reading of a span's attributes.

Spans may come from a file that somebody else wrote, so an attribute of the wrong type counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue, Span, Trace

__all__ = [
    "Attributes",
    "answering_attempts",
    "count",
    "flag",
    "is_attempt",
    "is_stage",
    "number",
    "numbers",
    "text",
    "texts",
    "verdicts_of",
    "with_prefix",
]

Attributes = Mapping[str, AttributeValue]


def is_stage(span: Span) -> bool:
    """True for a stage's span."""
    return names.STAGE_KIND in span.attributes


def is_attempt(span: Span) -> bool:
    """True for an attempt's span."""
    return names.ATTEMPT in span.attributes


def answering_attempts(spans: Sequence[Span]) -> list[Span]:
    """The attempts whose answer may be the one given: the one that the route names, else all; `spans` are a trace's."""
    number_ = count(spans[0].attributes, names.ATTEMPT_SERVED) if spans else None
    return [s for s in spans if is_attempt(s) and number_ in (None, s.attributes[names.ATTEMPT])]


def verdicts_of(trace: Trace) -> dict[int, tuple[float, str]]:
    """What judges said of the attempts' answers, by the attempts' numbers: the confidence (-1 if unknown), and why."""
    route = trace.route.attributes
    by_attempt = (names.CONFIDENCE_ATTEMPTS, names.CONFIDENCE_VALUES, names.CONFIDENCE_REASONS)
    if not all(isinstance(route.get(name), tuple | list) for name in by_attempt):
        return {}
    numbers_, values, reasons = (
        numbers(route, by_attempt[0]),
        numbers(route, by_attempt[1]),
        texts(route, by_attempt[2]),
    )
    return {int(n): (value, why) for n, value, why in zip(numbers_, values, reasons, strict=False)}


def text(attributes: Attributes, name: str) -> str:
    """A text, or an empty one."""
    value = attributes.get(name)
    return value if isinstance(value, str) else ""


def number(attributes: Attributes, name: str) -> float | None:
    """A number, or None."""
    value = attributes.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def count(attributes: Attributes, name: str) -> int | None:
    """A whole number, or None."""
    value = attributes.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def flag(attributes: Attributes, name: str) -> bool:
    """True if the attribute is there and true."""
    return attributes.get(name) is True


def texts(attributes: Attributes, name: str) -> tuple[str, ...]:
    """An array of texts, or an empty one."""
    value = attributes.get(name)
    return tuple([str(v) for v in value]) if isinstance(value, tuple | list) else ()


def numbers(attributes: Attributes, name: str) -> tuple[float, ...]:
    """An array of numbers, or an empty one."""
    value = attributes.get(name)
    if not isinstance(value, tuple | list):
        return ()
    return tuple([float(v) for v in value if isinstance(v, int | float)])


def with_prefix(attributes: Attributes, prefix: str) -> dict[str, AttributeValue]:
    """The attributes whose names begin so, by the rest of their names."""
    return {name[len(prefix) :]: value for name, value in attributes.items() if name.startswith(prefix)}
