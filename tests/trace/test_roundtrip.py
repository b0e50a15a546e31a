"""One record, many views: what goes out through OpenTelemetry comes back as the same explanation."""

from __future__ import annotations

import orjson
import pytest
from google.protobuf.json_format import MessageToJson
from hypothesis import HealthCheck, given, settings
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import DEFAULT_OFF, DEFAULT_ON

from kvfleet.trace.attributes import is_attempt
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.otel import Bridge, OTelBridge, OwnBridge, RouteHandle
from kvfleet.trace.otlp import from_otlp, to_otlp
from kvfleet.trace.spans import Trace
from tests.trace.building import fallback, nobody, page, traces

SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{}"


def drive(bridge: Bridge, trace: Trace, traceparent: str = "", tracestate: str = "") -> RouteHandle:
    """Pass a trace through a bridge as the route and its attempts do; its identifiers become the bridge's."""
    handle = bridge.start_route(
        trace.route.name,
        kind=trace.route.kind,
        start_ns=trace.route.start_ns,
        traceparent=traceparent,
        tracestate=tracestate,
    )
    trace.trace_id, trace.route.span_id, trace.parent_span_id = handle.trace_id, handle.span_id, handle.parent_span_id
    for span in trace.stages:
        if is_attempt(span):
            attempt = bridge.start_attempt(handle, span.name, span.start_ns)
            span.span_id = attempt.span_id
            bridge.end_attempt(attempt, span)
    bridge.end_route(handle, trace)
    return handle


def exporting(sampler: object = DEFAULT_ON) -> tuple[OTelBridge, InMemorySpanExporter]:
    """A bridge to OpenTelemetry's SDK, and what it exports."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OTelBridge(provider), exporter


def received(exporter: InMemorySpanExporter) -> tuple[Trace, ...]:
    """What a collector would read: the exporter's own encoding, as protobuf's JSON."""
    return from_otlp(MessageToJson(encode_spans(exporter.get_finished_spans())))


@SLOW
@given(traces())
def test_an_explanation_survives_the_sdk(trace: Trace) -> None:
    """The explanation rebuilt from exported spans equals the one recorded, whatever the trace."""
    bridge, exporter = exporting()
    drive(bridge, trace)
    (back,) = received(exporter)
    assert Explanation(back).to_dict() == Explanation(trace).to_dict()
    assert Explanation(back).summary() == Explanation(trace).summary()
    assert back.route == trace.route


@SLOW
@given(traces())
def test_a_trace_survives_otlp_json(trace: Trace) -> None:
    """A trace written as OTLP JSON and read again is the same trace."""
    text = orjson.dumps(to_otlp([trace]))
    assert from_otlp(text) == (trace,)


@pytest.mark.parametrize("make", [page, fallback, nobody])
def test_a_whole_trace_survives_the_sdk(make: type) -> None:
    """For traces whose steps do not start together, not the explanation alone but the trace comes back the same."""
    trace = make()
    bridge, exporter = exporting()
    drive(bridge, trace)
    assert received(exporter) == (trace,)


def test_a_child_of_the_callers_span() -> None:
    """A route under a caller's sampled traceparent belongs to the caller's trace, and so do the attempts."""
    bridge, exporter = exporting()
    trace = fallback()
    handle = drive(bridge, trace, PARENT.format("01"), "vendor=1")
    assert (handle.trace_id, handle.parent_span_id) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert {span.context.trace_id for span in exporter.get_finished_spans()} == {int(handle.trace_id, 16)}
    assert received(exporter) == (trace,)


def test_an_unsampled_caller() -> None:
    """Under an unsampled parent nothing is exported; the own record is whole, and the flag travels on."""
    bridge, exporter = exporting()
    trace, twin = fallback(), fallback()
    handle = drive(bridge, trace, PARENT.format("00"))
    assert exporter.get_finished_spans() == ()
    assert not handle.is_recording
    assert handle.traceparent.endswith("-00")
    assert bridge.start_attempt(handle, "chat m", 1).traceparent.endswith("-00")
    assert Explanation(trace).summary() == Explanation(twin).summary()
    assert len(trace.spans) == len(twin.spans)


def test_a_sampler_that_declines() -> None:
    """A route that the sampler declines has identifiers of its own and exports nothing."""
    bridge, exporter = exporting(DEFAULT_OFF)
    trace = page()
    handle = drive(bridge, trace)
    assert exporter.get_finished_spans() == ()
    assert int(handle.trace_id, 16)
    assert handle.span_id != bridge.start_attempt(handle, "chat m", 1).span_id


def test_the_programs_own_span() -> None:
    """A program that has a current span sees the route as its child; an explicit traceparent wins over it."""
    bridge, _ = exporting()
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("program")
    with tracer.start_as_current_span("work") as span:
        handle = bridge.start_route("kvfleet.route", kind=page().route.kind, start_ns=1)
        other = bridge.start_route("kvfleet.route", kind=page().route.kind, start_ns=1, traceparent=PARENT.format("01"))
    context = span.get_span_context()
    assert (int(handle.trace_id, 16), int(handle.parent_span_id, 16)) == (context.trace_id, context.span_id)
    assert other.trace_id == "0af7651916cd43dd8448eb211c80319c"


@SLOW
@given(traces())
def test_both_bridges_leave_the_record_alone(trace: Trace) -> None:
    """Nothing but identifiers differs between a record made with OpenTelemetry and one made without."""
    before = Explanation(trace).summary()
    drive(OwnBridge(), trace)
    assert Explanation(trace).summary() == before
