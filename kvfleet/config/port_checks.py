"""What must hold of the ports that the gateway listens on: each is one of its own."""

from __future__ import annotations

from collections.abc import Iterator

from kvfleet.config.findings import Finding, Path
from kvfleet.config.schema import FleetConfig

__all__ = ["check_ports"]

_ANY = ("", "0.0.0.0", "::")  # noqa: S104 - told apart here, not listened on


def check_ports(config: FleetConfig) -> Iterator[Finding]:
    """The findings; 0 is any free port, and so nobody else's."""
    gateway, admin = config.gateway, config.gateway.admin
    wanted: list[tuple[Path, str, int | None]] = [
        (("gateway", "port"), gateway.host, gateway.port),
        (("gateway", "admin", "port"), admin.host, admin.port),
        (("telemetry", "prometheus_port"), admin.host, config.telemetry.prometheus_port),
    ]
    taken: list[tuple[str, str, int]] = []
    for path, host, port in wanted:
        if not port:
            continue
        for name, other, same in taken:
            if port == same and (host == other or host in _ANY or other in _ANY):
                yield config.origin.finding(
                    path, f"is the port of {name} too", "take another one", code="duplicate-port"
                )
                break
        taken.append((".".join(map(str, path)), host, port))
