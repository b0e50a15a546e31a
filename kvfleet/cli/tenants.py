"""``kvfleet tenants``: what tenants spent this month."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import httpx

from kvfleet.builtin.budget import BudgetAdmission, ledger_path
from kvfleet.cli import render
from kvfleet.cli.fleet import gateway_url
from kvfleet.cli.options import config_argument, json_option, read_fleet, reports
from kvfleet.clock import SystemClock
from kvfleet.config.schema import FleetConfig
from kvfleet.gateway.auth import admin_key
from kvfleet.money import money
from kvfleet.pipeline.build import read
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.policy.budget import month_of
from kvfleet.policy.ledger import read_month
from kvfleet.trace.rows import default_path

__all__ = ["tenants"]

_TIMEOUT_S = 2.0


@click.command()
@config_argument()
@click.option("--url", help="Where the gateway listens; by the file's `gateway:` section if not given.")
@json_option
@reports
def tenants(config: Path, *, url: str | None, as_json: bool) -> None:
    """Show what the fleet and its tenants spent this month.

    A running gateway is asked for its `/v1/tenants`. If none answers, the ledger that it wrote is read, which holds no
    reservations.
    """
    table = discover()
    settings = read_fleet(config, table)
    where = url or gateway_url(settings)
    live = _ask(where, settings)
    rows = live if live is not None else _from_ledger(settings, table)
    if as_json:
        render.echo_json({"fleet": settings.fleet_name, "live": live is not None, "data": rows})
        return
    source = f"live from {where}" if live is not None else f"from the ledger; no gateway answers at {where}"
    render.echo(f"{render.bold(settings.fleet_name)}  {render.dim(source)}\n")
    if rows:
        headers = ["account", "month", "spent", "held", "limit", "used", "requests", "refused", "state"]
        render.echo(render.table(headers, [_row(row) for row in rows], columns=render.width()))
    else:
        render.echo("no budget is enabled; see `budget:` and `tenants:`")


def _row(row: Mapping[str, Any]) -> list[str]:
    share = row["spent_pct"]
    state = render.warn("alert") if row["alert"] else render.good("ok")
    return [
        str(row["account"]),
        str(row["month"]),
        money(row["spent_usd"]),
        money(row["reserved_usd"]),
        money(row["limit_usd"]),
        "-" if share is None else f"{share:.1f} %",
        str(row["requests"]),
        str(row["refused"]),
        state,
    ]


def _ask(url: str, config: FleetConfig) -> list[dict[str, Any]] | None:
    """What a running gateway of this fleet says; None if there is none."""
    key = admin_key(config, os.environ)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/tenants", headers=headers, timeout=_TIMEOUT_S, trust_env=False)
        body = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    if answer.status_code != 200 or not isinstance(body, dict) or body.get("fleet") != config.fleet_name:
        return None
    found = body.get("data")
    return found if isinstance(found, list) else None


def _from_ledger(config: FleetConfig, table: ComponentTable) -> Sequence[dict[str, Any]]:
    """The same by what was written."""
    built, _ = read(config, table)
    rows: list[dict[str, Any]] = []
    for stage in (entry.instance for entry in built if isinstance(entry.instance, BudgetAdmission)):
        path = (
            Path(stage.path).expanduser() if stage.path else ledger_path(default_path(os.environ).parent, stage.fleet)
        )
        rows += stage.statements_of(read_month(path, month_of(SystemClock().time_ns())))
    return rows
