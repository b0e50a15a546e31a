"""Bridges: identifiers and context, when spans are exported, and how export is set up."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

from kvfleet.config.schema import OtlpConfig, TelemetryConfig
from kvfleet.errors import ConfigError
from kvfleet.trace import names
from kvfleet.trace.otel import OTelBridge, OwnBridge, clean_tracestate, make_bridge, parse_traceparent, wants_export
from kvfleet.trace.spans import SpanKind
from tests.trace.building import fallback, stage
from tests.trace.test_roundtrip import drive, exporting

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", (TRACE, SPAN, "01")),
        (f" 00-{TRACE}-{SPAN}-00 ", (TRACE, SPAN, "00")),
        (f"00-{TRACE}-{SPAN}-03", (TRACE, SPAN, "01")),  # the random flag is none of version 00's
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", (TRACE, SPAN, "01")),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        ("", None),
    ],
)
def test_reading_a_traceparent(header: str, found: tuple[str, str, str] | None) -> None:
    """A traceparent is read as the W3C recommendation says, and anything else is none."""
    assert parse_traceparent(header) == found


@given(st.text())
def test_any_header(header: str) -> None:
    """No header's text breaks the reading."""
    assert parse_traceparent(header) is None
    assert clean_tracestate(header) in (header, "")


def test_a_route_of_our_own() -> None:
    """Without a caller a route gets fresh identifiers, and its attempts are its children, marked as sampled."""
    bridge = OwnBridge(random.Random(1))
    one, other = (bridge.start_route("r", kind=SpanKind.SERVER, start_ns=1) for _ in range(2))
    assert len({one.trace_id, other.trace_id}) == len({one.span_id, other.span_id}) == 2
    assert (len(one.trace_id), len(one.span_id), one.parent_span_id, one.is_recording) == (32, 16, "", False)
    attempt = bridge.start_attempt(one, "chat m", 2)
    assert parse_traceparent(attempt.traceparent) == (one.trace_id, attempt.span_id, "01")
    assert parse_traceparent(one.traceparent) == (one.trace_id, one.span_id, "01")
    assert attempt.span_id != one.span_id


@pytest.mark.parametrize("flag", ["00", "01"])
def test_a_callers_decision_travels_on(flag: str) -> None:
    """The caller's trace, its sampling decision and its vendors' state go on to the backend."""
    bridge = OwnBridge(random.Random(1))
    handle = bridge.start_route(
        "r", kind=SpanKind.SERVER, start_ns=1, traceparent=f"00-{TRACE}-{SPAN}-{flag}", tracestate="a=1,b=2"
    )
    assert (handle.trace_id, handle.parent_span_id) == (TRACE, SPAN)
    attempt = bridge.start_attempt(handle, "chat m", 2)
    assert parse_traceparent(attempt.traceparent) == (TRACE, attempt.span_id, flag)
    assert attempt.tracestate == "a=1,b=2"


@pytest.mark.parametrize("flag", ["00", "01"])
def test_a_span_that_comes_late(flag: str) -> None:
    """A grade given once the route has ended is a child of the route, and exported if the route was."""
    bridge, exporter = exporting(ParentBased(ALWAYS_ON))
    trace = fallback()
    handle = drive(bridge, trace, f"00-{TRACE}-{SPAN}-{flag}")
    exporter.clear()
    bridge.add_late(handle.traceparent, stage("observe", "judge", 0, 5, GRADE=0.5))
    found = [(one.name, one.parent.span_id, dict(one.attributes)[names.GRADE]) for one in exporter.get_finished_spans()]
    late = ("kvfleet.observe.judge", int(handle.span_id, 16), 0.5)
    assert found == ([late] if flag == "01" else [])
    OwnBridge().add_late(handle.traceparent, stage("observe", "judge", 0, 5))


def test_a_tracestate_that_must_not_travel() -> None:
    """A tracestate that could smuggle a header, or that is endless, stays behind."""
    assert clean_tracestate("a=1\r\nx-evil: 1") == ""
    assert clean_tracestate("a=" + "x" * 10_000) == ""
    assert clean_tracestate("a=1") == "a=1"


def test_an_invalid_traceparent_begins_a_new_trace() -> None:
    """With a broken header both bridges begin a trace of their own, and leave its tracestate behind."""
    for bridge in (OwnBridge(), OTelBridge(TracerProvider(shutdown_on_exit=False))):
        handle = bridge.start_route("r", kind=SpanKind.SERVER, start_ns=1, traceparent="00-zz", tracestate="a=1")
        assert (handle.parent_span_id, handle.tracestate, handle.trace_id != "0" * 32) == ("", "", True)


def otlp(**options: object) -> TelemetryConfig:
    """A ``telemetry:`` section."""
    return TelemetryConfig(otlp=OtlpConfig(**options))


HERE = "http://127.0.0.1:4318"


@pytest.mark.parametrize(
    ("endpoint", "environ", "wanted"),
    [
        ("", {}, False),
        (HERE, {}, True),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": HERE}, True),
        ("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": HERE}, True),
        ("", {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ("", {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": HERE}, False),
        (HERE, {"OTEL_TRACES_EXPORTER": "none"}, True),
        (HERE, {"OTEL_SDK_DISABLED": "TRUE"}, False),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_when_spans_are_exported(endpoint: str, environ: dict[str, str], wanted: bool) -> None:
    """The configuration wins over the environment, and the switch that turns the SDK off over both."""
    assert wants_export(otlp(endpoint=endpoint), environ) is wanted
    if not wanted:
        assert isinstance(make_bridge(otlp(endpoint=endpoint), environ), OwnBridge)


class Collector(ThreadingHTTPServer):
    """An OTLP/HTTP collector on loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[str, dict[str, str], ExportTraceServiceRequest]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> list[tuple[str, str]]:
        """Service and name of each span that came."""
        return [
            (resource.resource.attributes[i].value.string_value, span.name)
            for _, _, request in self.received
            for resource in request.resource_spans
            for i, attribute in enumerate(resource.resource.attributes)
            if attribute.key == "service.name"
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, dict(self.headers), ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that listens."""
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


async def test_export_by_configuration(collector: Collector) -> None:
    """A route goes to the configured collector with the configured name and headers; closing flushes it."""
    bridge = make_bridge(
        otlp(endpoint=collector.url, service_name="edge", headers={"x-team": "ml"}), {"OTEL_SERVICE_NAME": "other"}
    )
    drive(bridge, fallback())
    await bridge.aclose()
    await bridge.aclose()
    path, headers, _ = collector.received[0]
    assert (path, headers["x-team"]) == ("/v1/traces", "ml")
    found = collector.spans()
    assert {service for service, _ in found} == {"edge"}
    assert sorted(name for _, name in found) == sorted(span.name for span in fallback().spans)


@pytest.mark.parametrize(
    ("environ", "service"),
    [
        ({}, "kvfleet"),
        ({"OTEL_SERVICE_NAME": "gateway"}, "gateway"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "team=ml,service.name=by%20list"}, "by list"),
    ],
)
async def test_export_by_the_standard_variables(collector: Collector, environ: dict[str, str], service: str) -> None:
    """The standard variables alone are enough for an export, and name the service."""
    bridge = make_bridge(TelemetryConfig(), {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, **environ})
    drive(bridge, fallback())
    await bridge.aclose()
    assert {service for service, _ in collector.spans()} == {service}
    assert len(collector.spans()) == len(fallback().spans)


@pytest.mark.parametrize(
    ("options", "environ", "traceparent", "exported"),
    [
        ({"sample_ratio": 0.0}, {}, "", False),
        ({"sample_ratio": 0.0}, {}, f"00-{TRACE}-{SPAN}-01", True),
        ({"sample_ratio": 1.0}, {}, f"00-{TRACE}-{SPAN}-00", False),
        ({}, {"OTEL_TRACES_SAMPLER": "always_off"}, "", False),
        ({"sample_ratio": 0.9999999}, {"OTEL_TRACES_SAMPLER": "always_off"}, "", True),
    ],
)
async def test_sampling(  # noqa: PLR0917 - pytest fills them in by name
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, float],
    environ: dict[str, str],
    traceparent: str,
    exported: bool,
) -> None:
    """The caller's decision holds; else the configured ratio; else the standard variable."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)  # the SDK reads its sampler there
    bridge = make_bridge(otlp(endpoint=collector.url, **options), environ)
    drive(bridge, fallback(), traceparent)
    await bridge.aclose()
    assert bool(collector.spans()) is exported


async def test_a_collector_that_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Closing waits for a hanging collector no longer than the deadline, and says that spans may be lost."""
    release = threading.Event()
    bridge = OTelBridge(TracerProvider(shutdown_on_exit=False), shutdown=lambda: release.wait(30) and None)
    started = time.monotonic()
    await bridge.aclose(0.05)
    assert time.monotonic() - started < 5
    assert "otlp_shutdown_timeout" in caplog.text
    release.set()


async def test_a_provider_of_somebody_elses() -> None:
    """A bridge does not shut down a provider that it did not make."""
    closed: list[str] = []

    class Provider(TracerProvider):
        def shutdown(self) -> None:
            closed.append("shut down")

    await OTelBridge(Provider(shutdown_on_exit=False)).aclose()
    assert closed == []


def test_an_exporter_that_is_not_installed() -> None:
    """An unknown exporter is a finding that lists what there is."""
    with pytest.raises(
        ConfigError,
        match=r"^<environment>: OTEL_TRACES_EXPORTER asks for 'zipkin', which is not installed; known: .*otlp_proto_http.*; install its package",
    ):
        make_bridge(TelemetryConfig(), {"OTEL_TRACES_EXPORTER": "zipkin"})
    with pytest.raises(ConfigError, match=r"'otlp_proto_grpc', which is not installed"):
        make_bridge(TelemetryConfig(), {"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


def python(code: str) -> str:
    """What a piece of code prints in a fresh interpreter."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=root)  # noqa: S603
    return done.stdout


def test_an_exporter_by_its_name() -> None:
    """Any installed exporter can be named, as OpenTelemetry's own console exporter."""
    printed = python(
        "import anyio\n"
        "from kvfleet.config.schema import TelemetryConfig\n"
        "from kvfleet.trace.otel import make_bridge\n"
        "from tests.trace.building import fallback\n"
        "from tests.trace.test_roundtrip import drive\n"
        "bridge = make_bridge(TelemetryConfig(), {'OTEL_TRACES_EXPORTER': 'console'})\n"
        "drive(bridge, fallback())\n"
        "anyio.run(bridge.aclose)\n"
    )
    assert f'"name": "{names.ROUTE_SPAN}"' in printed


def test_the_sdk_is_not_imported_without_export() -> None:
    """A bridge of kvfleet's own, and the explanation, import neither OpenTelemetry nor an HTTP client."""
    imported = python(
        "import sys\n"
        "from kvfleet.trace import otel, explanation, otlp\n"
        "from kvfleet.config.schema import TelemetryConfig\n"
        "otel.make_bridge(TelemetryConfig(), {})\n"
        "print(*sys.modules)\n"
    )
    assert "kvfleet.trace.otel" in imported.split()
    heavy = {name.split(".")[0] for name in imported.split()} & {"opentelemetry", "httpx", "requests"}
    assert heavy == set()
