"""`kvfleet tenants` and `prices`: what was spent, and what models cost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import anyio.to_thread
import pytest

from kvfleet.builtin.budget import ledger_path
from kvfleet.clock import SystemClock
from kvfleet.config.loader import load_config
from kvfleet.gateway.server import running
from kvfleet.policy.budget import Spending, month_of, nano
from kvfleet.policy.ledger import Ledger
from kvfleet.trace.rows import default_path
from tests.cli.running import run

NOBODY = "http://127.0.0.1:9"
FLEET = """
fleet_name: paid
models:
  - {name: big, provider: mock, cost_per_1k_input_tokens: 1, cost_per_1k_output_tokens: 1}
budget: {enabled: true, monthly_budget_usd: 100}
tenants:
  a: {budget: {enabled: true, monthly_budget_usd: 10}}
telemetry: {trace_store: {enabled: false}}
"""


@pytest.fixture
def paid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fleet with budgets, and a state directory of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "paid.yaml"
    path.write_text(FLEET)
    return path


def test_without_a_gateway_the_ledger_is_read(paid: Path) -> None:
    """And the command says so."""
    ledger = Ledger(ledger_path(default_path(os.environ).parent, "paid"))
    month = month_of(SystemClock().time_ns())
    ledger.open(month)
    ledger.book("tenant/a", month, Spending(nano_usd=nano(9), requests=3))
    ledger.close()
    status, out, _ = run("tenants", paid, "--url", NOBODY)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"paid  from the ledger; no gateway answers at {NOBODY}"
    assert lines[3].split() == [
        "fleet",
        month,
        "$0.00",
        "$0.00",
        "$100.00",
        "0.0",
        "%",
        "0",
        "0",
        "ok",
    ]
    assert lines[4].split()[-4:] == ["%", "3", "0", "alert"]


async def test_a_running_gateway_is_asked(paid: Path) -> None:
    """Its statement is shown, reservations included."""
    async with running(load_config(paid)) as serving:
        status, out, _ = await anyio.to_thread.run_sync(lambda: run("tenants", paid, "--url", serving.url, "--json"))
    assert status == 0
    body = json.loads(out)
    assert body["live"]
    assert [row["account"] for row in body["data"]] == ["fleet", "tenant/a"]


def test_a_fleet_without_budgets_is_told_so(fleet: Path) -> None:
    """An empty table would look like nobody spent anything."""
    status, out, _ = run("tenants", fleet, "--url", NOBODY)
    assert status == 0
    assert "no budget is enabled" in out


def test_prices_tell_what_a_model_is_priced_as_and_where_that_was_read() -> None:
    """For a million tokens."""
    status, out, _ = run("prices", "gpt-4o-2024-08-06")
    assert status == 0
    assert out.splitlines()[1].split()[:7] == ["gpt-4o-2024-08-06", "gpt-4o", "$2.50", "$1.25", "$10.00", "$1.25", "/"]


def test_an_unknown_price_is_unknown() -> None:
    """Exit status 1; null as JSON."""
    status, out, _ = run("prices", "my-model", "gpt-5.4", "--json")
    assert status == 1
    body = json.loads(out)
    assert body["my-model"] is None
    assert body["gpt-5.4"]["long_context_from_tokens"] == 272_000
    assert run("prices")[1].count("\n") > 90
