"""The one record of a decision: spans in OpenTelemetry's data model, as plain objects.

The engine writes stage spans, an attempt writes its own; everything a person sees of a decision is a view of these.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import attrs

__all__ = ["AttributeValue", "Shape", "Span", "SpanKind", "Status", "Step", "Trace"]

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]
"""What OpenTelemetry allows as an attribute. Sequences are homogeneous tuples."""


class SpanKind(enum.StrEnum):
    """OpenTelemetry's kinds, as far as they are used here."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


class Status(enum.StrEnum):
    """OpenTelemetry's span statuses."""

    UNSET = "unset"
    OK = "ok"
    ERROR = "error"


@attrs.define
class Span:
    """One step.

    Attributes:
        name: Bounded by the configuration, never by a user's data.
        start_ns, end_ns: Unix time in nanoseconds.
        attributes: See `kvfleet.trace.names`.
        status, message: `message` says what went wrong if the status is an error.
        kind: As in OpenTelemetry.
        span_id: 16 hex digits; empty for a stage's span, which nobody refers to.
    """

    name: str
    start_ns: int
    end_ns: int = 0
    attributes: dict[str, AttributeValue] = attrs.field(factory=dict)
    status: Status = Status.UNSET
    message: str = ""
    kind: SpanKind = SpanKind.INTERNAL
    span_id: str = ""

    @property
    def duration_ms(self) -> float:
        """Milliseconds between start and end."""
        return (self.end_ns - self.start_ns) / 1e6

    def fail(self, message: str) -> None:
        """Mark the span as failed."""
        self.status, self.message = Status.ERROR, message


@attrs.frozen(eq=False)
class Shape:
    """What the spans of one stage have in common: everything but the values.

    Attributes:
        name: The span's name.
        fixed: Attributes that are the same each time.
        names: Names of the values, in their order.
        about: Name of the attribute that lists what the values stand for, replicas for instance; empty for none.
    """

    name: str
    fixed: Mapping[str, AttributeValue]
    names: tuple[str, ...]
    about: str = ""


class Step(NamedTuple):
    """A span of which only the values are kept, as long as nobody looks at it.

    A route records a dozen of these, and they are written to the store as they are: a `Span` with a dictionary of
    attributes for each would cost more than the stages themselves. A tuple is the cheapest there is to make.

    Attributes:
        shape: Everything else.
        values: One for each of the shape's names.
        about: What the values stand for.
        start_ns, end_ns: As in a span.
    """

    shape: Shape
    values: tuple[Any, ...]
    about: tuple[str, ...] = ()
    start_ns: int = 0
    end_ns: int = 0

    def span(self) -> Span:
        """The same as a span."""
        shape = self.shape
        attributes = dict(shape.fixed)
        if shape.about:
            attributes[shape.about] = self.about
        attributes.update(zip(shape.names, self.values, strict=True))
        return Span(shape.name, self.start_ns, self.end_ns, attributes)


@attrs.define(eq=False)
class Trace:
    """All spans of one route; the first is the route's own, the others are its children in order of their start.

    Attributes:
        trace_id: 32 hex digits.
        records: The spans, some of them as steps still; whoever writes appends steps here. The first is a span.
        parent_span_id: 16 hex digits of the caller's span; empty if nobody called with a ``traceparent``.
        full: Those that never were steps: the route's, the attempts', and those of stages that had more to say.
    """

    trace_id: str
    records: list[Span | Step] = attrs.field(factory=list, alias="spans")
    parent_span_id: str = ""
    full: list[Span] = attrs.field(init=False, repr=False)

    @full.default
    def _find_full(self) -> list[Span]:
        return [record for record in self.records if type(record) is not Step]  # type: ignore[misc]

    def add(self, span: Span) -> None:
        """Record a span."""
        self.records.append(span)
        self.full.append(span)

    @property
    def route(self) -> Span:
        """The route's own span."""
        return cast("Span", self.records[0])

    @property
    def spans(self) -> list[Span]:
        """The records as spans; steps become spans when first looked at."""
        records = self.records
        for place, record in enumerate(records):
            if type(record) is Step:
                records[place] = record.span()
        return cast("list[Span]", records)

    @property
    def stages(self) -> list[Span]:
        """The stages' and attempts' spans."""
        return self.spans[1:]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        mine, theirs = (self.trace_id, self.parent_span_id), (other.trace_id, other.parent_span_id)
        return mine == theirs and self.spans == other.spans

    __hash__ = None  # type: ignore[assignment]  # it grows
