"""What must hold of the gateway's keys: each is one, has a name of its own, and belongs to a tenant that there is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvfleet.config.findings import Finding, Path, did_you_mean
from kvfleet.config.schema import FleetConfig

__all__ = ["DIGEST", "check_keys"]

DIGEST = "sha256:"
"""What stands before a digest where a key could stand."""

_TAKEN = ("default", "command line")
"""What `gateway.api_key` and ``--api-key`` are called."""


def check_keys(config: FleetConfig) -> Iterator[Finding]:
    """The findings."""
    gateway, place = config.gateway, config.origin.finding
    plain: dict[Path, str] = {("gateway", "api_key"): gateway.api_key}
    plain |= {("gateway", "api_keys", name): key for name, key in gateway.api_keys.items()}
    plain |= {("gateway", "keys", name, "key"): one.key for name, one in gateway.keys.items()}
    for where, key in plain.items():
        if key.startswith(DIGEST) and not re.fullmatch(r"[0-9A-Fa-f]{64}", key.removeprefix(DIGEST)):
            what, remedy = "is no SHA-256: 64 hexadecimal digits follow `sha256:`", "`kvfleet keys hash` makes one"
            yield place(where, what, remedy, code="key")
    for name, one in gateway.keys.items():
        path: Path = ("gateway", "keys", name)
        if bool(one.key) == bool(one.sha256):
            what = "has both `key` and `sha256`" if one.key else "has neither `key` nor `sha256`"
            yield place(path, what, "give one of them", code="key")
        if one.tenant and one.tenant not in config.tenants:
            remedy = did_you_mean(one.tenant, config.tenants)
            yield place((*path, "tenant"), f"there is no tenant {one.tenant!r}", remedy, code="unknown-tenant")
        if name in gateway.api_keys or name in _TAKEN:
            yield place(path, "another key has this name", "rename one of them", code="duplicate-key")
        yield from _check_limits(config, name)


def _check_limits(config: FleetConfig, name: str) -> Iterator[Finding]:
    """Limits that no stage of a written pipeline holds the key to."""
    one, used = config.gateway.keys[name], {stage.use for stage in config.pipeline}
    wanted = (
        ("admit.budget", "budget", one.budget.enabled),
        ("admit.concurrency", "max_concurrent", one.max_concurrent),
    )
    for use, field, is_on in wanted:
        if config.pipeline and is_on and use not in used:
            what, remedy = "no stage of `pipeline:` holds the key to this", f"add `- {use}`, or remove it"
            yield config.origin.finding(("gateway", "keys", name, field), what, remedy, code="unused-section")
