"""`kvfleet fleet` and `health`: what the fleet is, and how it is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio.to_thread
import pytest

from kvfleet.cli.fleet import gateway_url
from kvfleet.config.loader import load_config
from kvfleet.config.schema import FleetConfig, GatewayConfig
from kvfleet.gateway.server import running
from tests.cli.running import run
from tests.faults.site import site

NOBODY = "http://127.0.0.1:9"
"""The discard port: nobody listens there."""


@pytest.fixture
async def gateway(fleet: Path) -> AsyncIterator[str]:
    """A gateway that serves the fleet file; gives its URL."""
    config = load_config(fleet)
    async with running(config) as serving:
        yield serving.url


def test_without_a_gateway_the_file_is_shown(fleet: Path) -> None:
    """Every replica as configured, and it says so."""
    status, out, _ = run("fleet", fleet, "--url", NOBODY)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"demo  cost_first  as configured; no gateway answers at {NOBODY}"
    assert [line.split()[:3] for line in lines[3:]] == [
        ["cheap", "mock://cheap-1", "mock"],
        ["cheap", "mock://cheap-2", "mock"],
        ["dear", "mock://dear", "mock"],
    ]


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("models: [{name: own, provider: mock}]\n", "expected_latency"),
        ("models: [{name: own, provider: mock}]\npipeline: [select.random, execute]\n", "random"),
        ("models: [{name: own, provider: mock}]\nstrategy: ucb1\npipeline: [select, execute]\n", "ucb1"),
    ],
)
async def test_the_strategy_is_the_one_that_decides(text: str, strategy: str, write: Callable[..., Path]) -> None:
    """A file that names none has one all the same, a pipeline names its own; the gateway says the same."""
    file = write(text)
    _, out, _ = run("fleet", file, "--url", NOBODY)
    assert out.split()[1] == strategy
    async with running(load_config(file)) as serving:
        _, out, _ = await anyio.to_thread.run_sync(run, "fleet", file, "--url", serving.url)
    assert out.split()[1] == strategy


async def test_a_running_gateway_is_asked(fleet: Path, gateway: str) -> None:
    """Its view of each replica is shown, and it says so."""
    status, out, _ = await anyio.to_thread.run_sync(run, "fleet", fleet, "--url", gateway)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"demo  cost_first  live from {gateway}"
    assert [line.split()[-1] for line in lines[3:]] == ["up", "up", "up"]


async def test_the_live_view_as_json(fleet: Path, gateway: str) -> None:
    """The same for programs."""
    _, out, _ = await anyio.to_thread.run_sync(run, "fleet", fleet, "--url", gateway, "--json")
    shown = json.loads(out)
    assert (shown["live"], shown["gateway"], shown["fleet"]) == (True, gateway, "demo")
    assert [(r["endpoint"], r["state"], r["in_flight"]) for r in shown["replicas"]] == [
        ("mock://cheap-1", "up", 0),
        ("mock://cheap-2", "up", 0),
        ("mock://dear", "up", 0),
    ]


async def test_a_replica_near_its_rate_limit_says_so(fleet: Path) -> None:
    """What is left, and for how long it is left alone; a column that is there only if a limit is known."""
    async with running(load_config(fleet)) as serving:
        _, before, _ = await anyio.to_thread.run_sync(run, "fleet", fleet, "--url", serving.url)
        told = {"ratelimit": "limit=60, remaining=0, reset=30"}
        serving.router.services.limits.begin("dear@mock://dear").heard(told)
        _, out, _ = await anyio.to_thread.run_sync(run, "fleet", fleet, "--url", serving.url)
    assert "LIMIT LEFT" not in before
    assert "LIMIT LEFT" in out.splitlines()[2]
    assert "  0%  " in out.splitlines()[-1]
    assert out.splitlines()[-1].rstrip().endswith(("limited for 30 s", "limited for 29 s"))


async def test_a_replica_that_comes_back_says_how_far_it_is(fleet: Path) -> None:
    """Left alone with the reason, tried by one call, then with part of its share."""
    async with running(load_config(fleet)) as serving:
        health = serving.router.services.health
        said = []

        async def look() -> None:
            _, out, _ = await anyio.to_thread.run_sync(run, "fleet", fleet, "--url", serving.url)
            said.append(out.splitlines()[-1].rstrip())

        health.eject("mock://dear", "latency", "it takes 12 times as long as the others", 600.0)
        await look()
        health.retain([])
        health.eject("mock://dear", "latency", "it takes 12 times as long as the others", 0.0)
        await look()
        health.begin("mock://dear")
        health.record_success("mock://dear")
        await look()
    assert said[0].endswith("out: circuit open after it takes 12 times as long as the others")
    assert said[1].endswith("half-open: one call may try")
    assert "slow start: " in said[2]


async def test_how_each_cache_is_known(write: Callable[..., Path]) -> None:
    """By the engine's own word, by what was sent there, or not at all; and why it is not known better."""
    told = "kv_events: {source: trtllm}, prompt_blocks: {mode: engine}"
    text = f"models:\n  - {{name: a, provider: mock, {told}}}\n  - {{name: b, provider: mock}}\n"
    async with running(load_config(write(text, "told.yaml"))) as serving:
        _, out, _ = await anyio.to_thread.run_sync(run, "fleet", write(text, "told.yaml"), "--url", serving.url)
        _, told, _ = await anyio.to_thread.run_sync(
            run, "fleet", write(text, "told.yaml"), "--url", serving.url, "--json"
        )
    assert "  CACHE  " in out.splitlines()[2]
    assert ["approximate: not connected" in line for line in out.splitlines()[3:]] == [True, False]
    assert [one["cache_mode"] for one in json.loads(told)["replicas"]] == ["approximate", "approximate"]
    unused = text + "cache_affinity: {enabled: false}\n"
    async with running(load_config(write(unused, "unused.yaml"))) as serving:
        _, out, _ = await anyio.to_thread.run_sync(run, "fleet", write(unused, "unused.yaml"), "--url", serving.url)
    assert "load only" in out.splitlines()[-1]


async def test_another_fleets_gateway_is_not_taken_for_ours(write: Callable[..., Path], gateway: str) -> None:
    """A gateway that happens to listen there does not colour our view."""
    mine = write("fleet_name: mine\nmodels:\n  - {name: a, provider: mock}\n", "mine.yaml")
    _, out, _ = await anyio.to_thread.run_sync(run, "fleet", mine, "--url", gateway)
    assert f"as configured; the gateway at {gateway} runs another fleet, 'demo'" in out.splitlines()[0]


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80")],
)
def test_a_gateway_on_every_address_is_asked_on_loopback(host: str, url: str) -> None:
    """An address to listen on is not always one to connect to."""
    assert gateway_url(FleetConfig(gateway=GatewayConfig(host=host, port=80))) == url


def test_health_of_a_sound_fleet(fleet: Path) -> None:
    """Every replica is up: exit status 0."""
    status, out, _ = run("health", fleet)
    assert status == 0
    assert out.splitlines()[-1] == "3 of 3 replicas up"


def test_a_replica_that_is_down_is_named(write: Callable[..., Path]) -> None:
    """Exit status 1 and the reason; models that are switched off are not asked."""
    path = write(
        "models:\n"
        "  - {name: up, provider: mock}\n"
        "  - {name: gone, provider: vllm, endpoint: 'http://127.0.0.1:9'}\n"
        "  - {name: off, provider: vllm, endpoint: 'http://127.0.0.1:9/off', enabled: false}\n"
    )
    status, out, _ = run("health", path)
    assert status == 1
    rows = {line.split()[0]: line.split()[3] for line in out.splitlines()[1:3]}
    assert rows == {"up": "up", "gone": "down"}
    assert out.splitlines()[-1] == "1 of 2 replicas up"
    status, out, _ = run("health", path, "--json")
    shown = json.loads(out)
    assert (status, shown["healthy"]) == (1, False)
    assert [(r["model"], r["healthy"], bool(r["error"])) for r in shown["replicas"]] == [
        ("up", True, False),
        ("gone", False, True),
    ]


@pytest.mark.parametrize(("provider", "status", "state"), [("vllm", 1, "down"), ("openai_compat", 0, "up")])
async def test_health_of_an_engine_that_serves_another_model(
    tmp_path: Path, provider: str, status: int, state: str
) -> None:
    """It is down if it would refuse the request; else it is up, and what it lists is told all the same."""
    async with site(1) as one:
        path = tmp_path / "fleet.yaml"
        path.write_text(f"models: [{{name: other, provider: {provider}, endpoint: '{one.engines[0].url}'}}]\n")
        found, out, _ = await anyio.to_thread.run_sync(run, "health", path)
    assert found == status
    assert state in out
    assert "the engine serves mock, not other" in out
