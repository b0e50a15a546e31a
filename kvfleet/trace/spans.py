"""The one record of a decision: spans in OpenTelemetry's data model, as plain objects.

The engine writes stage spans, an attempt writes its own; everything a person sees of a decision is a view of these.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import attrs

__all__ = ["AttributeValue", "Span", "SpanKind", "Status", "Trace"]

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


@attrs.define
class Trace:
    """All spans of one route; the first is the route's own, the others are its children in order of their start.

    Attributes:
        trace_id: 32 hex digits.
        parent_span_id: 16 hex digits of the caller's span; empty if nobody called with a ``traceparent``.
        spans: See above.
    """

    trace_id: str
    spans: list[Span] = attrs.field(factory=list)
    parent_span_id: str = ""

    @property
    def route(self) -> Span:
        """The route's own span."""
        return self.spans[0]

    @property
    def stages(self) -> list[Span]:
        """The stages' and attempts' spans."""
        return self.spans[1:]
