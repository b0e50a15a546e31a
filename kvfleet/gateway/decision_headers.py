"""What an answer's headers tell of the decision behind it."""

from __future__ import annotations

from collections.abc import Sequence

from kvfleet.gateway.replicas import ReplicaNames
from kvfleet.plugin.contract import Answer
from kvfleet.trace import names as n
from kvfleet.trace.spans import Span, SpanKind, Trace

__all__ = ["decision_headers"]

Pairs = list[tuple[bytes, bytes]]


def decision_headers(answer: Answer, trace: Trace, names: ReplicaNames) -> Pairs:
    """Model, replica (by its opaque name), strategy, trace identifier, and times in milliseconds.

    A short-circuit answer (from a cache) has no model and no replica. ``x-kvfleet-cache`` (hit, near or miss) is there
    if a stage looked for one.
    """
    route, spans = trace.route, trace.full  # attempts and answers from a cache are among them
    headers = [
        (b"x-kvfleet-strategy", str(route.attributes.get(n.STRATEGY, "")).encode()),
        (b"x-kvfleet-trace", trace.trace_id.encode()),
        (b"server-timing", _timing(trace, spans)),
    ]
    if answer.served_by is not None:
        model, replica = names.header_values(answer.served_by)
        headers += [(b"x-kvfleet-model", model), (b"x-kvfleet-replica", replica)]
    last = None
    for span in spans:
        if n.ANSWERED in span.attributes:
            last = span.attributes
    if last is not None:
        word = b"miss" if not last[n.ANSWERED] else b"near" if last.get(n.ANSWER_MATCH) == "near" else b"hit"
        headers.append((b"x-kvfleet-cache", word))
    return headers


def _timing(trace: Trace, spans: Sequence[Span]) -> bytes:
    """``Server-Timing``: the decision, and the time to the answering backend's first byte (W3C Server Timing)."""
    route = trace.route
    calls = [span for span in spans if span.kind is SpanKind.CLIENT]
    if not calls:
        return b"route;dur=%.3f" % ((trace.records[-1].end_ns - route.start_ns) / 1e6)
    decided_ms = (calls[0].start_ns - route.start_ns) / 1e6
    served = calls[-1]
    if len(calls) > 1:
        number = route.attributes.get(n.ATTEMPT_SERVED)
        served = next((span for span in calls if span.attributes.get(n.ATTEMPT) == number), served)
    ttfb_s = served.attributes.get(n.TTFB_S)
    if not isinstance(ttfb_s, float):
        return b"route;dur=%.3f" % decided_ms
    return b"route;dur=%.3f, backend;dur=%.3f" % (decided_ms, ttfb_s * 1e3)
