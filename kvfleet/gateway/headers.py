"""What a request's headers say, read in one pass."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from kvfleet.config.findings import Finding
from kvfleet.config.origin import NOWHERE, Origin
from kvfleet.config.schema import DATA_CLASSES, GatewayConfig
from kvfleet.errors import BadRequestError, ConfigError

__all__ = ["HeaderNames", "Headers", "header_findings", "new_request_id", "read_by_conditions", "request_id"]

Headers = Mapping[bytes, bytes]
"""The headers of a request that the gateway looks at, by lower-case name."""

_PLAIN = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,254}[\x21-\x7e])?")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@,-]{1,128}")
_IN_CONDITION = re.compile(r"\bheaders\.([A-Za-z0-9_-]+)", re.IGNORECASE)
_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

# A backend's credential, framing and hop-by-hop headers are never the client's to set.
_NEVER_PASSED = frozenset(
    {
        "accept-encoding",
        "api-key",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "traceparent",
        "tracestate",
        "transfer-encoding",
        "upgrade",
        "x-api-key",
        "x-request-id",
    }
)


@attrs.frozen
class HeaderNames:
    """Which headers mean what, as configured; empty for one that is switched off."""

    strategy: bytes
    models: bytes
    timeout: bytes
    tenant: bytes
    data_class: bytes
    region: bytes
    session: bytes
    passed: tuple[bytes, ...]
    conditions: tuple[bytes, ...]
    _single: frozenset[bytes] = attrs.field(repr=False, alias="single")
    _wanted: frozenset[bytes] = attrs.field(repr=False, alias="wanted")

    @classmethod
    def of(cls, config: GatewayConfig, conditions: Iterable[str] = ()) -> HeaderNames:
        """The names of a configuration, and of the headers that policy conditions read.

        Raises:
            ConfigError: for a header that must not be passed through, or whose name is not one.
        """
        findings = header_findings(config)
        if findings:
            raise ConfigError(findings)
        control = {field: getattr(config, option).lower().encode() for field, option in _CONTROL.items()}
        passed = tuple(name.lower().encode() for name in config.passthrough_headers)
        read = tuple(name.lower().encode() for name in conditions)
        single = frozenset({*_SINGLE, *control.values()} - {b""})
        wanted = frozenset({*single, *passed, *read, *_SEVERAL})
        return cls(**control, passed=passed, conditions=read, single=single, wanted=wanted)

    def read(self, headers: Iterable[tuple[bytes, bytes]]) -> Headers:
        """The headers that are looked at.

        Raises:
            BadRequestError: if one that may stand once is there twice, since two readers might obey different ones.
        """
        wanted = self._wanted
        found: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in wanted:
                if name not in found:
                    found[name] = value.strip(b" \t")  # what stands around it counts for nothing (RFC 9110, 5.5)
                elif name in self._single:
                    raise BadRequestError(f"the header {name.decode()} is sent twice", code="duplicate_header")
                else:
                    found[name] += b", " + value
        return found

    def passed_on(self, headers: Headers) -> tuple[tuple[str, str], ...]:
        """The headers the backend is to see."""
        return tuple([(n.decode(), headers[n].decode("latin-1")) for n in self.passed if n in headers])

    def for_conditions(self, headers: Headers) -> Mapping[str, str]:
        """The headers that policy conditions read."""
        return {n.decode(): headers[n].decode("latin-1") for n in self.conditions if n in headers}


def read_by_conditions(components: Iterable[Any]) -> tuple[str, ...]:
    """The request headers that a pipeline's components read; never a credential.

    Args:
        components: The pipeline's; those with ``rules`` that have a ``condition`` count, and the names a component
            lists as ``reads_headers``.
    """
    components = tuple(components)
    rules = [rule for component in components for rule in getattr(component, "rules", ())]
    texts = [rule.condition for rule in rules if isinstance(getattr(rule, "condition", None), str)]
    found = {name.lower() for text in texts for name in _IN_CONDITION.findall(text)}
    found.update(name.lower() for component in components for name in getattr(component, "reads_headers", ()))
    return tuple(sorted(found - _NEVER_PASSED))


_CONTROL = {
    "strategy": "strategy_header",
    "models": "model_allowlist_header",
    "timeout": "timeout_header",
    "tenant": "tenant_header",
    "data_class": "data_class_header",
    "region": "region_header",
    "session": "session_header",
}
_HINTS = frozenset({b"x-request-timeout", b"x-stainless-timeout", b"x-stainless-read-timeout"})
_SEVERAL = (b"origin", b"access-control-request-headers", b"traceparent", b"tracestate")
_SINGLE = frozenset(
    {
        b"host",
        b"transfer-encoding",
        b"authorization",
        b"x-api-key",
        b"content-length",
        b"content-encoding",
        b"x-request-id",
        *_HINTS,
    }
)


_WRITE = "use letters, digits and -"


def header_findings(config: GatewayConfig, origin: Origin = NOWHERE) -> list[Finding]:
    """Findings about the headers a configuration names: those that may never pass, and names that are none."""
    found = []
    for index, name in enumerate(config.passthrough_headers):
        path = ("gateway", "passthrough_headers", index)
        if name.lower() in _NEVER_PASSED:
            remedy = "take it out; the gateway or the backend's own `api_key` sets it"
            found.append(origin.finding(path, f"{name} cannot be passed through", remedy, code="passthrough"))
        elif not _FIELD_NAME.fullmatch(name):
            found.append(origin.finding(path, f"{name!r} is not a header's name", _WRITE, code="pattern"))
    for option in _CONTROL.values():
        name = getattr(config, option)
        if name and not _FIELD_NAME.fullmatch(name):
            found.append(
                origin.finding(("gateway", option), f"{name!r} is not a header's name", _WRITE, code="pattern")
            )
    return found


def new_request_id() -> str:
    """An identifier for a request that brought none."""
    return f"req-{secrets.token_hex(12)}"


def request_id(headers: Headers, new: Callable[[], str] = new_request_id) -> str:
    """The caller's identifier if it is 1..128 harmless characters, else a new one."""
    sent = headers.get(b"x-request-id")
    if sent is not None and _REQUEST_ID.fullmatch(sent):
        return sent.decode()
    return new()


def text_of(headers: Headers, name: bytes) -> str:
    """A header's text, empty if it is absent (or `name` is, because it is switched off).

    Raises:
        BadRequestError: if it is not 1..256 printable ASCII characters.
    """
    value = headers.get(name)
    if value is None:
        return ""
    text = value.decode("latin-1").strip()
    if text and not _PLAIN.fullmatch(text):
        raise BadRequestError(
            f"the header {name.decode()} must be at most 256 printable ASCII characters", param=name.decode()
        )
    return text


def names_of(headers: Headers, name: bytes) -> frozenset[str] | None:
    """The comma-separated names in a header; None if it is absent.

    Raises:
        BadRequestError: if it names nobody.
    """
    if name not in headers:
        return None
    text = headers[name].decode("latin-1")
    found = frozenset(part.strip() for part in text.split(",")) - {""}
    if not found:
        raise BadRequestError(f"the header {name.decode()} names no model", param=name.decode())
    return found


def data_class_of(headers: Headers, name: bytes) -> str:
    """The data class a header names; empty if it is absent.

    Raises:
        BadRequestError: for one that does not exist.
    """
    text = text_of(headers, name)
    if text and text not in DATA_CLASSES:
        known = ", ".join(DATA_CLASSES)
        raise BadRequestError(f"the header {name.decode()} must be one of {known}", param=name.decode())
    return text
