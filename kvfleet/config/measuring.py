"""What a fleet file says of what is measured, and where it goes."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from kvfleet.config.fields import flag, mapping, number, section, text

__all__ = ["OtlpConfig", "TelemetryConfig", "TraceStoreConfig"]

_URL = r"https?://[^\s/?#@]+(?:/[^\s?#]*)?"


@attrs.frozen(kw_only=True)
class TraceStoreConfig:
    """The local store behind `kvfleet trace`."""

    enabled: bool = flag(True, doc="Keep traces of a running gateway.")
    path: str = text("", doc="The SQLite file; in the user's state directory if empty.")
    max_megabytes: float = number(256, ge=1, doc="Largest size of the file; the oldest traces go first.")
    max_age_days: float = number(7, gt=0, doc="Oldest trace kept.")


@attrs.frozen(kw_only=True)
class OtlpConfig:
    """OpenTelemetry export. The standard `OTEL_*` variables work too; what is written here wins."""

    endpoint: str = text(
        "",
        doc="OTLP/HTTP collector, as in `http://127.0.0.1:4318`; no export if empty.",
        pattern=_URL,
        pattern_doc="an http:// or https:// URL",
    )
    headers: Mapping[str, str] = mapping(doc="Headers for the collector; values may be secrets.", is_secret=True)
    service_name: str = text("kvfleet", doc="`service.name` of the exported spans.")
    sample_ratio: float = number(1.0, ge=0, le=1, doc="Share of routes exported, unless the caller decided already.")


@attrs.frozen(kw_only=True)
class TelemetryConfig:
    """What is measured, and where it goes."""

    prometheus_enabled: bool = flag(True, doc="Serve `/metrics` on the gateway.")
    prometheus_port: int | None = number(None, ge=0, le=65535, doc="Serve metrics on a port of their own too.")
    health_check_interval_seconds: float = number(30, gt=0, unit="s", doc="Time between health checks of a replica.")
    load_poll_interval_seconds: float = number(1, gt=0, unit="s", doc="Time between readings of a replica's metrics.")
    structured_logs: bool = flag(doc="Log JSON lines instead of plain text.")
    log_route_decisions: bool = flag(doc="Log one line for each route.")
    capture_content: bool = flag(doc="Put prompts and answers into traces. Off unless you need it.")
    otlp: OtlpConfig = section(OtlpConfig, doc="OpenTelemetry export.")
    trace_store: TraceStoreConfig = section(TraceStoreConfig, doc="The local store behind `kvfleet trace`.")
