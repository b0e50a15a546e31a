"""What a fleet file says of clients and answers: how large they may be, how many may connect, and how slow they are."""

from __future__ import annotations

import attrs

from kvfleet.config.fields import number

__all__ = ["ClientLimits"]


@attrs.frozen(kw_only=True)
class ClientLimits:
    """How large requests and events may be, and how slow clients.

    The defaults for clients are those of HAProxy's and Envoy's edge guides.
    """

    max_header_bytes: int = number(
        32 * 1024,
        ge=1024,
        le=1024 * 1024,
        unit="bytes",
        doc="Largest head of a request, target included; else 431.",
    )
    max_headers: int = number(100, ge=8, le=10_000, unit="headers", doc="Most headers of a request; else 431.")
    max_json_depth: int = number(
        64, ge=8, le=256, unit="levels", doc="Deepest nesting of a request's body; else 400 `invalid_json`."
    )
    max_connections: int = number(
        0, ge=0, unit="connections", doc="Most open connections of clients; one more gets a 503. No limit if 0."
    )
    max_event_bytes: int = number(
        8 * 1024 * 1024,
        ge=64 * 1024,
        le=256 * 1024 * 1024,
        unit="bytes",
        doc="Largest event of an engine's stream, which is held until it is whole; a larger one breaks the answer off.",
    )
    header_timeout_seconds: float = number(
        10, gt=0, unit="s", doc="Time for a request's head, from the connection's beginning or the head's; else 408."
    )
    body_timeout_seconds: float = number(30, gt=0, unit="s", doc="Longest pause amid a request's body.")
    read_timeout_seconds: float = number(
        120, gt=0, unit="s", doc="Longest time in which a client reads nothing of an answer that waits for it."
    )
    idle_timeout_seconds: float = number(75, gt=0, unit="s", doc="Longest pause between two requests of a connection.")
