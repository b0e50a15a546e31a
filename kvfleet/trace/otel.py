"""Live context for routes and attempts, with or without OpenTelemetry.

The trace is kvfleet's own record. A bridge gives it identifiers, passes W3C context on to the backends, and, if
OpenTelemetry exports are wanted, replays the record as spans: the route and each attempt live, because context travels
under them, the stages after the fact with their true times, and only if the route is sampled.
"""

from __future__ import annotations

import logging
import random
import re
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import attrs

from kvfleet.config.schema import TelemetryConfig
from kvfleet.trace.attributes import is_attempt
from kvfleet.trace.spans import Span, SpanKind, Status, Trace

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

__all__ = ["AttemptHandle", "Bridge", "OTelBridge", "OwnBridge", "RouteHandle", "make_bridge", "wants_export"]

log = logging.getLogger(__name__)

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_LONGEST_TRACESTATE = 8192
_SAMPLED = "01"


@attrs.frozen
class RouteHandle:
    """A route's place in the distributed trace.

    Attributes:
        trace_id, span_id: 32 and 16 hex digits.
        parent_span_id: The caller's span; empty if there is none.
        is_recording: True if the stages' spans will be exported.
        flags: The W3C trace flags, two hex digits.
        tracestate: The W3C list of vendors' state, as it travels on.
        live: OpenTelemetry's span and its context, if there is one.
    """

    trace_id: str
    span_id: str
    parent_span_id: str = ""
    is_recording: bool = False
    flags: str = _SAMPLED
    tracestate: str = ""
    live: Any = None

    @property
    def traceparent(self) -> str:
        """The W3C header's value."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


@attrs.frozen
class AttemptHandle:
    """An attempt's place: what its call sends along."""

    span_id: str
    traceparent: str
    tracestate: str = ""
    live: Any = None


class Bridge(Protocol):
    """Between kvfleet's record and the distributed trace it is a part of."""

    def start_route(
        self, name: str, *, kind: SpanKind, start_ns: int, traceparent: str = "", tracestate: str = ""
    ) -> RouteHandle:
        """Begin a route, as a child of the caller's span if it sent a ``traceparent``."""

    def start_attempt(self, handle: RouteHandle, name: str, start_ns: int) -> AttemptHandle:
        """Begin a call to a backend."""

    def end_attempt(self, handle: AttemptHandle, span: Span) -> None:
        """End it, as its record says."""

    def end_route(self, handle: RouteHandle, trace: Trace) -> None:
        """End the route, as its record says, and export the stages if it is sampled."""

    def add_late(self, traceparent: str, span: Span) -> None:
        """Export a span of a route that has ended, by the route's ``traceparent``."""

    async def aclose(self, deadline_s: float = 5.0) -> None:
        """Send what is still waiting, for at most so long. Twice is safe."""


@attrs.define
class OwnBridge:
    """Identifiers and W3C context without OpenTelemetry.

    A caller's decision about sampling is passed on. A trace that begins here is marked as sampled, because its record
    is kept, and because the other mark would make engines that trace by themselves stop.
    """

    rng: random.Random = attrs.field(factory=random.Random, repr=False)

    def start_route(
        self,
        name: str,  # noqa: ARG002 - the record has it
        *,
        kind: SpanKind,  # noqa: ARG002 - the record has it
        start_ns: int,  # noqa: ARG002 - the record has it
        traceparent: str = "",
        tracestate: str = "",
    ) -> RouteHandle:
        """See `Bridge`."""
        span_id = f"{self.rng.getrandbits(64) or 1:016x}"
        parent = parse_traceparent(traceparent) if traceparent else None
        if parent is None:
            return RouteHandle(f"{self.rng.getrandbits(128) or 1:032x}", span_id)
        trace_id, parent_id, flags = parent
        return RouteHandle(trace_id, span_id, parent_id, False, flags, clean_tracestate(tracestate))

    def start_attempt(self, handle: RouteHandle, name: str, start_ns: int) -> AttemptHandle:  # noqa: ARG002
        """See `Bridge`."""
        span_id = f"{self.rng.getrandbits(64) or 1:016x}"
        return AttemptHandle(span_id, f"00-{handle.trace_id}-{span_id}-{handle.flags}", handle.tracestate)

    def end_attempt(self, handle: AttemptHandle, span: Span) -> None:
        """See `Bridge`; nothing is exported."""

    def end_route(self, handle: RouteHandle, trace: Trace) -> None:
        """See `Bridge`; nothing is exported."""

    def add_late(self, traceparent: str, span: Span) -> None:
        """See `Bridge`; nothing is exported."""

    async def aclose(self, deadline_s: float = 5.0) -> None:
        """See `Bridge`; there is nothing to send."""


class OTelBridge:
    """The record as OpenTelemetry spans, through any tracer provider.

    Without a ``traceparent`` the route becomes a child of the program's current span, if there is one.

    Args:
        provider: Gives the tracer; its sampler decides what is exported.
        shutdown: Called by `aclose` in a thread of its own; None leaves the provider to whoever made it.
    """

    def __init__(self, provider: TracerProvider, *, shutdown: Callable[[], None] | None = None) -> None:
        # OpenTelemetry's API takes 90 ms to import, and most commands do without.
        from opentelemetry import context, trace  # noqa: PLC0415
        from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415

        self._trace = trace
        self._empty = context.Context()
        self._propagator = tracecontext.TraceContextTextMapPropagator()
        self._tracer = provider.get_tracer("kvfleet")
        self._shutdown = shutdown
        self._kinds = {kind: getattr(trace.SpanKind, kind.name) for kind in SpanKind}
        self._statuses = {status: getattr(trace.StatusCode, status.name) for status in Status}

    def start_route(
        self, name: str, *, kind: SpanKind, start_ns: int, traceparent: str = "", tracestate: str = ""
    ) -> RouteHandle:
        """See `Bridge`."""
        api = self._trace
        context = None
        if traceparent:
            carrier = {"traceparent": traceparent, "tracestate": clean_tracestate(tracestate)}
            context = self._propagator.extract(carrier, self._empty)
        parent = api.get_current_span(context).get_span_context()
        span = self._tracer.start_span(name, context, self._kinds[kind], start_time=start_ns)
        own = span.get_span_context()
        return RouteHandle(
            f"{own.trace_id:032x}",
            f"{own.span_id:016x}",
            f"{parent.span_id:016x}" if parent.is_valid else "",
            span.is_recording(),
            f"{own.trace_flags:02x}",
            own.trace_state.to_header(),
            (span, api.set_span_in_context(span, self._empty)),
        )

    def start_attempt(self, handle: RouteHandle, name: str, start_ns: int) -> AttemptHandle:
        """See `Bridge`."""
        span = self._tracer.start_span(name, handle.live[1], self._kinds[SpanKind.CLIENT], start_time=start_ns)
        own = span.get_span_context()
        span_id = f"{own.span_id:016x}"
        traceparent = f"00-{handle.trace_id}-{span_id}-{own.trace_flags:02x}"
        return AttemptHandle(span_id, traceparent, own.trace_state.to_header(), span)

    def end_attempt(self, handle: AttemptHandle, span: Span) -> None:
        """See `Bridge`."""
        self._end(handle.live, span)

    def end_route(self, handle: RouteHandle, trace: Trace) -> None:
        """See `Bridge`."""
        live, context = handle.live
        if live.is_recording():
            for span in trace.stages:
                if not is_attempt(span):
                    self._end(self._tracer.start_span(span.name, context, start_time=span.start_ns), span)
        self._end(live, trace.route)

    def add_late(self, traceparent: str, span: Span) -> None:
        """See `Bridge`."""
        context = self._propagator.extract({"traceparent": traceparent}, self._empty)
        self._end(self._tracer.start_span(span.name, context, start_time=span.start_ns), span)

    def _end(self, live: Any, span: Span) -> None:
        if live.is_recording():
            live.set_attributes(span.attributes)
            if span.status is not Status.UNSET:
                live.set_status(self._statuses[span.status], span.message or None)
        live.end(span.end_ns or span.start_ns)

    async def aclose(self, deadline_s: float = 5.0) -> None:
        """See `Bridge`."""
        shutdown, self._shutdown = self._shutdown, None
        if shutdown is None:
            return
        # A thread of its own, as a daemon: a collector that does not answer must not hold up the end of the program.
        thread = threading.Thread(target=shutdown, name="kvfleet-otlp-shutdown", daemon=True)
        thread.start()
        await anyio.to_thread.run_sync(thread.join, deadline_s)
        if thread.is_alive():
            log.warning("otlp_shutdown_timeout deadline_s=%s some spans may be lost", deadline_s)


def parse_traceparent(header: str) -> tuple[str, str, str] | None:
    """Trace, parent span and flags of a W3C ``traceparent``; None if it is not a valid one.

    See https://www.w3.org/TR/trace-context/#traceparent-header.

    >>> parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    ('0af7651916cd43dd8448eb211c80319c', 'b7ad6b7169203331', '01')
    """
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or not trace_id.strip("0") or not span_id.strip("0"):
        return None
    # Only the flags that version 00 knows travel on: sampled.
    return trace_id, span_id, "01" if int(flags, 16) & 1 else "00"


def clean_tracestate(header: str) -> str:
    """A ``tracestate`` fit to be sent on; empty if it is too long or not printable."""
    return header if len(header) <= _LONGEST_TRACESTATE and header.isprintable() else ""


def wants_export(config: TelemetryConfig, environ: Mapping[str, str]) -> bool:
    """True if the configuration or the standard ``OTEL_*`` variables ask for OTLP export.

    ``OTEL_SDK_DISABLED=true`` turns everything off. An endpoint in the configuration wins over
    ``OTEL_TRACES_EXPORTER``; that wins over an endpoint in the environment.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if config.otlp.endpoint:
        return True
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter:
        return exporter != "none"
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return any(environ.get(name) for name in endpoints)


def make_bridge(config: TelemetryConfig, environ: Mapping[str, str]) -> Bridge:
    """The bridge that the configuration asks for: OpenTelemetry's if spans are exported, else kvfleet's own.

    What is written in the configuration wins over the environment; what it leaves at its default does not.

    Args:
        config: The ``telemetry:`` section.
        environ: The environment. OpenTelemetry's SDK itself reads the process's own for what is not decided here
            (timeouts, compression, certificates, batch sizes, limits, further resource attributes).

    Raises:
        ConfigError: for an exporter that is not installed.
    """
    if not wants_export(config, environ):
        return OwnBridge()
    from kvfleet.trace.export import tracer_provider  # noqa: PLC0415 - the SDK takes 70 ms, and few routers export

    provider = tracer_provider(config.otlp, environ)
    return OTelBridge(provider, shutdown=provider.shutdown)
