"""Which web pages may call the gateway: those of the configured origins, and no other."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from kvfleet.errors import RouteError

__all__ = ["Cors"]

Pairs = list[tuple[bytes, bytes]]

_EXPOSED = b"x-request-id, x-kvfleet-model, x-kvfleet-replica, x-kvfleet-strategy, x-kvfleet-trace, retry-after"
_MOST_ASKED_BYTES = 2048


@attrs.frozen
class Cors:
    """Cross-origin rules.

    A browser asks before it sends JSON, but sends a "simple" request at once; so a request whose ``Origin`` is not
    allowed is refused, not only left without headers. Otherwise any page a person looks at could spend a local
    gateway's tokens.

    Attributes:
        origins: The allowed origins; ``*`` for all.
    """

    origins: frozenset[bytes]

    @classmethod
    def of(cls, origins: Iterable[str]) -> Cors:
        """The rules for these origins."""
        return cls(frozenset(origin.rstrip("/").encode() for origin in origins))

    def headers_for(self, origin: bytes | None) -> Pairs:
        """The headers for an answer to this origin; none for a client that is not a browser.

        Raises:
            RouteError: 403 for an origin that is not allowed.
        """
        if origin is None:
            return []
        if b"*" in self.origins:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        if origin not in self.origins:
            raise RouteError(
                "web pages of this origin may not call the gateway; see gateway.cors_origins",
                status=403,
                code="origin_not_allowed",
            )
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"Origin"),
        ]

    def preflight(self, methods: Iterable[str], asked_headers: bytes) -> Pairs:
        """Further headers for the answer to a browser's question, whose origin is allowed.

        Args:
            methods: What the path can do.
            asked_headers: The request headers the page wants to send; keys are asked for, so it may send any.
        """
        allowed = asked_headers if len(asked_headers) <= _MOST_ASKED_BYTES else b"authorization, content-type"
        return [
            (b"access-control-allow-methods", ", ".join(methods).encode()),
            (b"access-control-allow-headers", allowed or b"authorization, content-type"),
            (b"access-control-max-age", b"600"),
        ]
