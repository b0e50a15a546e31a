"""``kvfleet fleet`` and ``kvfleet health``: what the fleet is, and how it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import attrs
import click
import httpx

from kvfleet.adapters.base import EndpointHealth, InferenceAdapter
from kvfleet.cli import render
from kvfleet.cli.options import config_argument, json_option, read_fleet, reports
from kvfleet.config.expand import strategy_of
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.gateway.auth import KEY_VARIABLE, admin_key
from kvfleet.gateway.replicas import ReplicaNames
from kvfleet.money import money
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.registry.models import ModelRegistry
from kvfleet.runtime import Router

__all__ = ["ask_gateway", "check_health", "fleet", "gateway_url", "health", "health_table"]

_GATEWAY_TIMEOUT_S = 2.0
_MOST_NAMED = 3
_LIVE = (
    "in_flight", "running", "waiting", "kv_usage", "expected_ttfb_s", "rate_limit_left", "rate_limited_for_s",
    "cache_mode", "cache_why", "breaker", "share", "panic",
)  # fmt: skip


@click.command()
@config_argument()
@click.option("--url", help="Where the gateway listens; by the file's `gateway:` section if not given.")
@json_option
@reports
def fleet(config: Path, *, url: str | None, as_json: bool) -> None:
    """Show the models and their replicas.

    If a gateway with this file's fleet runs where the file says, its view is shown too: which replicas may be used, and
    their load. It is asked for its own `/health`; no backend is.
    """
    settings = read_fleet(config, discover())
    replicas = ModelRegistry.from_configs(settings.models).replicas
    where = url or gateway_url(settings)
    live, why_not = ask_gateway(where, settings)
    rows = [_row(model, live, name) for model, name in zip(replicas, _names(replicas), strict=True)]
    if as_json:
        render.echo_json(
            {
                "fleet": settings.fleet_name,
                "strategy": _strategy(settings, live),
                "live": live is not None,
                "gateway": where,
                "why_not_live": why_not,
                "replicas": [attrs.asdict(row) for row in rows],
            }
        )
        return
    source = f"live from {where}" if live is not None else f"as configured; {why_not}"
    render.echo(f"{render.bold(settings.fleet_name)}  {_strategy(settings, live)}  {render.dim(source)}\n")
    render.echo(_fleet_table(rows, is_live=live is not None))


@attrs.frozen(kw_only=True)
class Row:
    """One replica as the table shows it; what only a gateway knows is None without one."""

    model: str
    endpoint: str
    provider: str
    region: str
    quality: float
    usd_per_1k_input: float | None
    is_enabled: bool
    state: str | None = None
    in_flight: int | None = None
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    expected_ttfb_s: float | None = None
    rate_limit_left: float | None = None
    rate_limited_for_s: float | None = None
    cache_mode: str | None = None
    cache_why: str | None = None
    breaker: str | None = None
    share: float | None = None
    panic: bool | None = None


def _strategy(config: FleetConfig, live: Mapping[str, Any] | None) -> str:
    """The strategy that decides: as the gateway says or, without one, as the file's pipeline has it."""
    if live is not None and live.get("strategy"):
        return str(live["strategy"])
    written = (stage.use.partition(".")[2] for stage in config.pipeline if stage.use.startswith(Kind.SELECT))
    return next(written, "") or strategy_of(config)


def _names(replicas: Sequence[ModelConfig]) -> list[str]:
    by_id = ReplicaNames.of(replicas).by_id
    return [by_id[model.id] for model in replicas]


def _row(model: ModelConfig, live: Mapping[str, Any] | None, name: str) -> Row:
    said: Mapping[str, Any] = ((live or {}).get("endpoints") or {}).get(name) or {}
    known = {key: said.get(key) for key in _LIVE}
    return Row(
        model=model.name,
        endpoint=model.endpoint,
        provider=model.provider,
        region=model.region,
        quality=model.quality_score,
        usd_per_1k_input=model.cost_per_1k_input_tokens,
        is_enabled=model.enabled,
        state=_state(said) if said else None,
        **known,
    )


def _state(said: Mapping[str, Any]) -> str:
    return "up" if said.get("healthy") else f"out: {said.get('reason') or 'unavailable'}"


def _fleet_table(rows: Sequence[Row], *, is_live: bool) -> str:
    if is_live:
        has_limits = any(row.rate_limit_left is not None for row in rows)
        headers = [
            "model",
            "endpoint",
            "in flight",
            "queue",
            "kv",
            "cache",
            *(["limit left"] * has_limits),
            "ttft",
            "state",
        ]
        cells = [
            [
                row.model,
                row.endpoint,
                _figure(row.in_flight),
                _figure(row.waiting),
                _figure(row.kv_usage, "{:.0%}"),
                _cache(row),
                *([_figure(row.rate_limit_left, "{:.0%}")] * has_limits),
                _figure(row.expected_ttfb_s, "{:.2f} s"),
                _coloured(row),
            ]
            for row in rows
        ]
    else:
        headers = ["model", "endpoint", "provider", "region", "quality", "1k in", "state"]
        cells = [
            [
                row.model,
                row.endpoint,
                row.provider,
                row.region or "-",
                f"{row.quality:g}",
                money(row.usd_per_1k_input),
                _coloured(row),
            ]
            for row in rows
        ]
    return render.table(headers, cells, columns=render.width())


def _cache(row: Row) -> str:
    """How the cache is known; with the reason where it should be known better."""
    mode = (row.cache_mode or "-").replace("_", " ")
    return f"{mode}: {row.cache_why}" if row.cache_why else mode


def _figure(value: float | None, form: str = "{}") -> str:
    return "-" if value is None else form.format(value)


def _coloured(row: Row) -> str:
    if not row.is_enabled:
        return render.dim("disabled")
    if row.state is None:
        return "enabled"
    if row.state == "up" and row.rate_limited_for_s:
        return render.warn(f"limited for {row.rate_limited_for_s:.0f} s")
    if row.state == "up" and (told := _not_quite_well(row)):
        return render.warn(told)
    return render.good(row.state) if row.state == "up" else render.bad(row.state)


def _not_quite_well(row: Row) -> str:
    """What is to be said of a replica that may be called; empty for nothing."""
    if row.panic:
        return "panic: too few are well, so all are used"
    if row.breaker == "half_open":
        return "half-open: one call may try"
    return f"slow start: {row.share:.0%} of its share" if row.share is not None and row.share < 1 else ""


def gateway_url(config: FleetConfig) -> str:
    """Where this file's gateway is reached from this machine."""
    host = config.gateway.host
    near = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - read, not bound
    return f"http://{near}:{config.gateway.port}"


def ask_gateway(url: str, config: FleetConfig) -> tuple[Mapping[str, Any] | None, str]:
    """What a running gateway says of its fleet in ``/health``; None with the reason if it does not.

    Args:
        url: Where it listens.
        config: Names the fleet that is meant, and holds the key.
    """
    key = admin_key(config, os.environ)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/health", headers=headers, timeout=_GATEWAY_TIMEOUT_S, trust_env=False)
        body = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None, f"no gateway answers at {url}"
    if answer.status_code in (401, 403):
        return None, f"the gateway at {url} asks for a key; set gateway.api_key, or {KEY_VARIABLE}"
    if not isinstance(body, dict) or "endpoints" not in body:
        return None, f"what listens at {url} is not a kvfleet gateway"
    if body.get("fleet") != config.fleet_name:
        return None, f"the gateway at {url} runs another fleet, {body.get('fleet')!r}"
    return body, ""


@click.command()
@config_argument()
@json_option
@click.pass_context
@reports
def health(ctx: click.Context, config: Path, *, as_json: bool) -> None:
    """Ask every backend whether it is up and serves its model, now and from here.

    Exit status 1 if any replica of an enabled model is down, or of an engine that lists other models and refuses this
    one. `kvfleet fleet` asks a running gateway instead, and no
    backend.
    """
    table = discover()
    settings = read_fleet(config, table)
    found = check_health(settings, table)
    if as_json:
        is_well = all(one.healthy for _, one in found)
        render.echo_json({"healthy": is_well, "replicas": [_health_dict(model, one) for model, one in found]})
    else:
        render.echo(health_table(found))
        down = sum(not one.healthy for _, one in found)
        told = f"{len(found) - down} of {render.count(len(found), 'replica')} up"
        render.echo("\n" + (render.bad(told) if down else render.good(told)))
    if any(not one.healthy for _, one in found):
        ctx.exit(1)


def check_health(config: FleetConfig, table: ComponentTable) -> list[tuple[ModelConfig, EndpointHealth]]:
    """Check the replica of every enabled model.

    Raises:
        ConfigError: with every finding of the file.
    """

    async def run() -> list[tuple[ModelConfig, EndpointHealth]]:
        router = Router(config, table=table, polls=False)
        try:
            found = await router.health_check_all()
        finally:
            await router.aclose()
        adapters = router.services.adapters
        return [
            (model, _of_replica(adapters.get(model.id), model, found.get(model.endpoint)))
            for model in router.models
            if model.enabled
        ]

    render.progress("asking the backends …")
    return anyio.run(run)


def _of_replica(adapter: InferenceAdapter | None, model: ModelConfig, found: EndpointHealth | None) -> EndpointHealth:
    """What was found of a replica's endpoint, and whether that serves the replica's model."""
    if found is None:
        return EndpointHealth(endpoint=model.endpoint, healthy=False, error="was not checked")
    why_not = adapter.why_unlisted(found.models) if adapter is not None and found.healthy else ""
    if adapter is None or not why_not:
        return found
    if adapter.refuses_unlisted:
        return attrs.evolve(found, healthy=False, error=why_not)
    return attrs.evolve(found, error=f"{why_not}, or answers under any name")


def _says(one: EndpointHealth) -> str:
    if one.error:
        return one.error if not one.healthy else render.warn(one.error)
    more = f" and {len(one.models) - _MOST_NAMED} more" if len(one.models) > _MOST_NAMED else ""
    return ", ".join(one.models[:_MOST_NAMED]) + more


def health_table(found: Sequence[tuple[ModelConfig, EndpointHealth]]) -> str:
    """A table of what health checks found."""
    rows = [
        [
            model.name,
            model.endpoint,
            model.provider,
            render.good("up") if one.healthy else render.bad("down"),
            f"{one.latency_ms:.0f} ms" if one.healthy else "-",
            _says(one),
        ]
        for model, one in found
    ]
    return render.table(["model", "endpoint", "provider", "state", "took", "says"], rows, columns=render.width())


def _health_dict(model: ModelConfig, one: EndpointHealth) -> dict[str, Any]:
    return {
        "model": model.name,
        "endpoint": model.endpoint,
        "provider": model.provider,
        "healthy": one.healthy,
        "latency_ms": one.latency_ms,
        "error": one.error,
        "queue_depth": one.queue_depth,
        "active_requests": one.active_requests,
        "kv_usage": one.kv_usage,
        "models": list(one.models),
    }
