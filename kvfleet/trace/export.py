"""OpenTelemetry's SDK, set up to export spans. Imported only if spans are exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points, version
from typing import cast
from urllib.parse import unquote

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased

from kvfleet.config.findings import Finding, did_you_mean
from kvfleet.config.schema import OtlpConfig
from kvfleet.errors import ConfigError

__all__ = ["tracer_provider"]

_TRACES_PATH = "/v1/traces"
_GROUP = "opentelemetry_traces_exporter"
_DEFAULTS = OtlpConfig()


def tracer_provider(config: OtlpConfig, environ: Mapping[str, str]) -> TracerProvider:
    """A provider that exports in batches, in a thread of its own.

    Raises:
        ConfigError: for an exporter that is not installed.
    """
    exporters = _exporters(config, environ)
    provider = TracerProvider(
        resource=_resource(config, environ), sampler=_sampler(config, environ), shutdown_on_exit=False
    )
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _resource(config: OtlpConfig, environ: Mapping[str, str]) -> Resource:
    """The resource's name: the configuration's, the environment's, or the default, in this order."""
    name = config.service_name
    if name == _DEFAULTS.service_name:
        name = environ.get("OTEL_SERVICE_NAME") or _listed(environ).get(SERVICE_NAME) or name
    return Resource.create({SERVICE_NAME: name, SERVICE_VERSION: version("kvfleet")})


def _listed(environ: Mapping[str, str]) -> dict[str, str]:
    """``OTEL_RESOURCE_ATTRIBUTES``, as in ``service.name=gateway,team=ml``."""
    pairs = (pair.partition("=") for pair in environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","))
    return {key.strip(): unquote(value.strip()) for key, _, value in pairs}


def _sampler(config: OtlpConfig, environ: Mapping[str, str]) -> Sampler | None:
    """The sampler; None leaves it to ``OTEL_TRACES_SAMPLER``."""
    if config.sample_ratio == _DEFAULTS.sample_ratio and environ.get("OTEL_TRACES_SAMPLER"):
        return None
    return ParentBased(TraceIdRatioBased(config.sample_ratio))


def _exporters(config: OtlpConfig, environ: Mapping[str, str]) -> Sequence[SpanExporter]:
    if config.endpoint:
        return [OTLPSpanExporter(endpoint=traces_url(config.endpoint), headers=dict(config.headers) or None)]
    wanted = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    return [_exporter(name.strip(), config, environ) for name in wanted.split(",") if name.strip() not in ("", "none")]


def _exporter(name: str, config: OtlpConfig, environ: Mapping[str, str]) -> SpanExporter:
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or ""
    if name == "otlp" and protocol != "grpc":
        endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or ""
        if not endpoint and (base := environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
            endpoint = traces_url(base)
        return OTLPSpanExporter(endpoint=endpoint or None, headers=dict(config.headers) or None)
    key = "otlp_proto_grpc" if name == "otlp" else name
    found = entry_points(group=_GROUP, name=key)
    if not found:
        known = [entry.name for entry in entry_points(group=_GROUP)]
        message = f"OTEL_TRACES_EXPORTER asks for {key!r}, which is not installed"
        remedy = f"{did_you_mean(key, known)}; install its package, or set it to otlp with OTEL_EXPORTER_OTLP_PROTOCOL"
        raise ConfigError([Finding(message, f"{remedy}=http/protobuf", file="<environment>", code="unknown-exporter")])
    make = cast("Callable[[], SpanExporter]", next(iter(found)).load())
    return make()


def traces_url(endpoint: str) -> str:
    """The URL for traces of a collector's base URL.

    >>> traces_url("http://127.0.0.1:4318/"), traces_url("http://127.0.0.1:4318/v1/traces")
    ('http://127.0.0.1:4318/v1/traces', 'http://127.0.0.1:4318/v1/traces')
    """
    base = endpoint.rstrip("/")
    return base if base.endswith(_TRACES_PATH) else base + _TRACES_PATH
