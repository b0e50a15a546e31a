"""What a fleet file says of who asks: the gateway, its keys, tenants, and what each may spend."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from kvfleet.config.fields import choice, flag, listing, mapping, number, secret, section, text
from kvfleet.config.limits import ClientLimits
from kvfleet.config.models import DATA_CLASSES

__all__ = ["AdminConfig", "BudgetConfig", "GatewayConfig", "KeyConfig", "TenantConfig"]


@attrs.frozen(kw_only=True)
class BudgetConfig:
    """What may be spent: by the month, by one request, by the minute."""

    enabled: bool = flag(doc="Hold requests to it.")
    monthly_budget_usd: float = number(1000.0, ge=0, unit="usd", doc="Most that a calendar month (UTC) may cost.")
    per_request_max_usd: float | None = number(
        1.0, gt=0, unit="usd", doc="Candidates with which one request could cost more are dropped."
    )
    alert_threshold_pct: float = number(
        80.0, gt=0, le=100, unit="%", doc="Share of the month's money at which an alert is logged and counted."
    )
    throttle_on_exceed: bool = flag(True, doc="Refuse requests beyond the month's money; else only alert.")
    requests_per_minute: int | None = number(None, ge=1, unit="requests", doc="Most requests in any minute.")
    tokens_per_minute: int | None = number(
        None, ge=1, unit="tokens", doc="Most tokens, of prompts and answers, in any minute."
    )
    unknown_price: str = choice(
        "refuse",
        of=("refuse", "allow"),
        doc="A model whose price nobody knows: refused when the fleet is checked, or used and counted as `unpriced`.",
    )


@attrs.frozen(kw_only=True)
class TenantConfig:
    """What one tenant may use, and prefers."""

    name: str = text("", doc="The tenant's name for people.")
    preferred_models: tuple[str, ...] = listing((), doc="Use these if any of them is left.", refers_to="model")
    blocked_models: tuple[str, ...] = listing((), doc="Never use these.", refers_to="model")
    allowed_data_classes: tuple[str, ...] = listing(
        ("public", "internal"), of=DATA_CLASSES, doc="Data classes this tenant may send.", example=["public"]
    )
    region: str = text("", doc="The region its requests come from, if the request does not say.")
    strategy: str = text(
        "",
        doc="The strategy for its requests, behind a request's own or its alias's; the pipeline's if empty.",
    )
    max_cost_per_request: float | None = number(
        None, gt=0, unit="usd", doc="Candidates with which a request is expected to cost more are dropped."
    )
    max_latency_ms: float | None = number(
        None, gt=0, unit="ms", doc="Candidates whose typical time to an answer is longer are dropped."
    )
    budget: BudgetConfig = section(BudgetConfig, doc="What the tenant may spend.")


@attrs.frozen(kw_only=True)
class KeyConfig:
    """One of the gateway's keys: whose it is, what it opens, and what may be spent with it.

    Give either `key` or `sha256`.
    """

    key: str = secret(doc="The key that clients send as a bearer token.")
    sha256: str = text(
        "",
        doc="The key's SHA-256 instead, so that the file holds no key; the key must be long and random.",
        pattern=r"|(?:sha256:)?[0-9A-Fa-f]{64}",
        pattern_doc="64 hexadecimal digits",
    )
    tenant: str = text("", doc="The tenant whose requests it makes; if empty, those of none.")
    role: str = choice(
        "client",
        of=("client", "admin"),
        doc="`client` asks, for its tenant alone, and sees its own statements; `admin` asks for any tenant and sees "
        "everything.",
    )
    budget: BudgetConfig = section(BudgetConfig, doc="What may be spent with it.")
    max_concurrent: int = number(0, ge=0, unit="requests", doc="Most of its requests in flight; no limit if 0.")


@attrs.frozen(kw_only=True)
class AdminConfig:
    """A listener of the operators' own: metrics, dashboard and reload leave the clients' listener for it."""

    host: str = text(
        "127.0.0.1",
        doc="Address to listen on, for this and for `telemetry.prometheus_port`; loopback unless you say so.",
    )
    port: int | None = number(
        None, ge=0, le=65535, doc="Port to listen on, 0 for any free one; if null, operators use the clients' listener."
    )


@attrs.frozen(kw_only=True)
class GatewayConfig:
    """The HTTP face."""

    host: str = text("127.0.0.1", doc="Address to listen on; loopback unless you say otherwise.")
    port: int = number(8000, ge=0, le=65535, doc="Port to listen on; 0 takes any free one.")
    admin: AdminConfig = section(AdminConfig, doc="A listener of the operators' own.")
    watch: bool = flag(doc="Reload when this file changes, or a file that a secret in it is read from.")
    api_key: str = secret(
        doc="Key that clients must send as a bearer token, or `sha256:` and its digest; none is asked for if empty."
    )
    api_keys: Mapping[str, str] = mapping(
        doc="Further keys, by a name that logs may show; a key named as a tenant is that tenant's. Values are secrets.",
        example={"team-a": "env:TEAM_A_KEY"},
        is_secret=True,
    )
    keys: Mapping[str, KeyConfig] = mapping(
        doc="Keys with a tenant, a role, a budget or limits of their own, by a name that logs and statements show.",
        example={"ml-ci": {"key": "env:ML_CI_KEY", "tenant": "team-ml", "max_concurrent": 4}},
    )
    cors_origins: tuple[str, ...] = listing((), doc="Origins allowed to call from a browser; none by default.")
    allowed_hosts: tuple[str, ...] = listing(
        (),
        doc="Names under which a gateway without keys on the loopback may be called, beside the loopback's own; a "
        "request whose `Host` is another is refused. With keys every name is allowed.",
        example=["gateway.test"],
    )
    passthrough_headers: tuple[str, ...] = listing(
        (), doc="Request headers passed on to the backend.", example=["X-Correlation-ID"]
    )
    strategy_header: str = text("X-KVFleet-Strategy", doc="Header with which a request asks for a strategy.")
    model_allowlist_header: str = text("X-KVFleet-Models", doc="Header with which a request narrows the models.")
    timeout_header: str = text("X-KVFleet-Timeout", doc="Header with a request's own deadline in milliseconds.")
    tenant_header: str = text("", doc="Header that names the tenant; off if empty.", example="X-Tenant-ID")
    data_class_header: str = text("X-KVFleet-Data-Class", doc="Header that names the request's data class.")
    region_header: str = text("X-KVFleet-Region", doc="Header that names the request's source region.")
    session_header: str = text("X-Session-ID", doc="Header that names the conversation.")
    response_id: str = choice(
        "request",
        of=("request", "backend"),
        doc="Whose identifier an answer's `id` is: the request's, as in `X-Request-ID`, or its backend's own.",
    )
    limits: ClientLimits = section(ClientLimits, doc="How large requests may be, and how slow clients.")
    request_timeout_seconds: float | None = number(
        None, gt=0, unit="s", doc="Longest a request may take, its whole stream included; no limit if absent."
    )
    max_body_bytes: int = number(20 * 1024 * 1024, gt=0, unit="bytes", doc="Largest request body.")
    max_concurrent: int = number(0, ge=0, unit="requests", doc="Most requests in flight; no limit if 0.")
