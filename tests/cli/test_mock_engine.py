"""`kvfleet mock-engine`: engines in a process of their own, and a gateway in front of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from tests.cli.running import run

HELLO = {"model": "demo", "messages": [{"role": "user", "content": "x" * 640}]}


@contextmanager
def engines(*args: str) -> Iterator[tuple[list[str], subprocess.Popen[str]]]:
    """Mock engines: where they listen, and their process."""
    process = subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", "from kvfleet.cli.main import main; main()", "mock-engine", "--port", "0", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        urls = []
        for line in process.stdout:
            if "Ctrl-C" in line:
                break
            urls.append(line.split()[-1])
        assert urls, process.communicate()[1]
        yield urls, process
    finally:
        process.kill()
        process.communicate()


def test_engines_serve_and_stop() -> None:
    """Each on a port of its own, with the pace and the faults of the command line; SIGTERM ends them well."""
    with engines("-n", "2", "-m", "demo", "--speed", "1000", "--answer-tokens", "3", "--fault", "429,every=2") as (
        urls,
        process,
    ):
        assert len(set(urls)) == 2
        with httpx.Client(trust_env=False, timeout=10) as client:
            asked = [f"{url}/v1/chat/completions" for url in urls for _ in range(2)]
            assert [client.post(url, json=HELLO).status_code for url in asked] == [200, 429, 200, 429]
            assert client.get(f"{urls[0]}/mock").json()["spec"]["speed"] == 1000.0
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")


def test_an_engine_has_ranks() -> None:
    """Behind one port, with metrics for each, and the one that is named computes."""
    with engines("-m", "demo", "--speed", "1000", "--data-parallel-size", "3") as (urls, _):
        assert len(urls) == 1
        with httpx.Client(base_url=urls[0], trust_env=False, timeout=10) as client:
            assert client.post("/v1/chat/completions", json=HELLO, headers={"X-Data-Parallel-Rank": "2"}).is_success
            page = client.get("/metrics").text
    lines = [line for line in page.splitlines() if line.startswith("vllm:prompt_tokens_total")]
    assert [line.split()[-1] != "0.0" for line in lines] == [False, False, True]
    assert all(f'engine="{rank}"' in line for rank, line in enumerate(lines))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--fault", "boo"], "'boo' is not allowed here"),
        (["--host", "0.0.0.0"], "is not loopback"),
        (["--kv-replay-port", "5"], "needs --kv-events-port"),
        (["--speed", "0"], "0 is not in the range x>0"),
    ],
)
def test_what_cannot_be_is_said(args: list[str], said: str) -> None:
    """A wrong option ends it before anything listens."""
    status, _, err = run("mock-engine", *args)
    assert status != 0
    assert said in " ".join(err.split())


async def test_a_gateway_routes_to_them_as_to_vllm() -> None:
    """The vllm provider answers, knows the cached tokens, and goes elsewhere when one fails."""
    with engines("-n", "2", "-m", "demo", "--speed", "1000", "--answer-tokens", "3") as (urls, _):
        model = ModelConfig(name="demo", provider="vllm", endpoint=urls[0], replicas=(urls[1],))
        quiet = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
        async with (
            running(FleetConfig(models=(model,), telemetry=quiet)) as serving,
            httpx.AsyncClient(trust_env=False, timeout=10) as client,
        ):
            asked = f"{serving.url}/v1/chat/completions"
            first = await client.post(asked, json=HELLO)
            assert first.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
            again = await client.post(asked, json=HELLO)
            assert again.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 160}
            states = [(await client.get(f"{url}/mock")).json() for url in urls]
            served = next(url for url, state in zip(urls, states, strict=True) if state["load"]["prefix_hits_tokens"])
            await client.post(f"{served}/mock/faults", json={"kind": "reset"})
            statuses = [(await client.post(asked, json=HELLO)).status_code for _ in range(4)]
            assert statuses == [200] * 4
            state = (await client.get(f"{served}/mock")).json()
            assert state["faults"][0]["done"] >= 1  # the gateway tried, and went on to the other
