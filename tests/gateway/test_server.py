"""Where the gateway listens, how it starts, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import attrs
import httpx
import pytest

from kvfleet.config.schema import FleetConfig, GatewayConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.errors import ConfigError, TraceError
from kvfleet.gateway.auth import Keys
from kvfleet.gateway.listening import bind, check_exposure, is_loopback, url_of
from kvfleet.gateway.logs import set_up_logging
from kvfleet.gateway.server import create_gateway_app, running, serve
from kvfleet.runtime import Router
from kvfleet.trace.store import TraceStore

QUIET = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
MOCK = ModelConfig(name="mock", provider="mock", options={"decode_ms_per_token": 20, "reply": "word " * 40})
FLEET = FleetConfig(models=(MOCK,), telemetry=QUIET)
ASK = {"messages": [{"role": "user", "content": "Hi"}]}


class TestExposure:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
    def test_loopback_needs_no_key(self, host: str) -> None:
        """What only this machine can reach may be open."""
        assert is_loopback(host)
        check_exposure(host, Keys(), allowed=False)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "nobody.invalid"])
    def test_beyond_loopback_an_open_gateway_is_refused(self, host: str) -> None:
        """Without a key, any other address is refused, with the three remedies."""
        with pytest.raises(ConfigError) as caught:
            check_exposure(host, Keys(), allowed=False)
        assert str(caught.value) == (
            f"gateway.host: {host or '*'} is not loopback and no key is set; set gateway.api_key (as env:NAME), "
            "or listen on 127.0.0.1, or say that you mean it with --allow-unauthenticated"
        )

    def test_a_key_or_a_word_allows_it(self) -> None:
        """With a key, or said explicitly, any address may be listened on."""
        check_exposure("0.0.0.0", Keys.of(GatewayConfig(api_key="k"), tenants=()), allowed=False)
        check_exposure("0.0.0.0", Keys(), allowed=True)

    def test_serving_refuses_before_anything_starts(self) -> None:
        """`serve` itself asks."""
        with pytest.raises(ConfigError, match="is not loopback"):
            serve(FLEET, host="0.0.0.0")


class TestListening:
    def test_a_taken_port_is_named(self) -> None:
        """The error says which address, and why."""
        with contextlib.closing(bind("127.0.0.1", 0)[0]) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use"):
                bind("127.0.0.1", port)

    def test_streams_leave_at_once(self) -> None:
        """Sockets are made so that asyncio switches Nagle's algorithm off: protocol TCP, not 0."""
        with contextlib.closing(bind("127.0.0.1", 0)[0]) as one:
            assert one.proto == socket.IPPROTO_TCP

    def test_the_url_of_an_ipv6_socket(self) -> None:
        """An IPv6 address stands in brackets."""
        with contextlib.closing(bind("::1", 0)[0]) as one:
            assert url_of(one) == f"http://[::1]:{one.getsockname()[1]}"


class TestLogs:
    @pytest.fixture(autouse=True)
    def _restore(self) -> Iterator[None]:
        """Leave logging as it was."""
        root, own = logging.getLogger(), logging.getLogger("kvfleet")
        before = list(root.handlers), root.level, own.level
        root.handlers = []
        yield
        root.handlers, root.level, own.level = before
        own.setLevel(before[2])
        root.setLevel(before[1])

    def test_json_lines(self) -> None:
        """One object a line: time, level, logger, event; kvfleet's own from INFO, others' warnings only."""
        out = io.StringIO()
        set_up_logging(as_json=True, stream=out)
        logging.getLogger("kvfleet.gateway").info("gateway listening url=%s", "http://x")
        logging.getLogger("other").info("noise")
        (line,) = out.getvalue().splitlines()
        found = json.loads(line)
        assert found.pop("time").endswith("Z")
        assert found == {"level": "info", "logger": "kvfleet.gateway", "event": "gateway listening url=http://x"}

    def test_plain_lines(self) -> None:
        """Time, level, logger and event in one line."""
        out = io.StringIO()
        set_up_logging(as_json=False, level="WARNING", stream=out)
        logging.getLogger("kvfleet.gateway").warning("trace store off")
        logging.getLogger("kvfleet.gateway").info("not shown")
        assert out.getvalue().endswith("WARNING kvfleet.gateway trace store off\n")


class TestRunning:
    async def test_an_own_key_guards_an_app(self) -> None:
        """`create_gateway_app` takes a key and origins beside the configured ones."""
        app = create_gateway_app(Router(FLEET, polls=False), api_key="k", cors_origins=["https://app.example"])
        assert app.keys.caller(b"Bearer k").name == "command line"
        assert app.cors.headers_for(b"https://app.example")

    async def test_readiness_is_known_from_the_first_moment(self) -> None:
        """Once the block is entered, the gateway answers; afterwards nobody does."""
        async with running(FLEET, api_key="k") as serving, httpx.AsyncClient(base_url=serving.url) as client:
            ready = await client.get("/readyz")
            health = await client.get("/health", headers={"authorization": "Bearer k"})
        assert (ready.status_code, health.json()["status"]) == (200, "ok")
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(f"{serving.url}/livez")


PROGRAM = """
import sys
from kvfleet.config.loader import load_config
from kvfleet.gateway.server import serve
serve(load_config(sys.argv[1]), port=0, on_ready=lambda s: print(s.url, flush=True),
      unready_s=float(sys.argv[2]), drain_s=float(sys.argv[3]))
"""
YAML = """
models:
  - {{name: mock, provider: mock, options: {{decode_ms_per_token: 20, reply: "{reply}"}}}}
telemetry:
  prometheus_port: 0
  structured_logs: true
  trace_store: {{path: "{store}"}}
"""


@attrs.frozen
class Program:
    """A gateway in a process of its own."""

    process: asyncio.subprocess.Process
    url: str


@contextlib.asynccontextmanager
async def program(
    folder: Path, *, unready_s: float = 0.0, drain_s: float = 30.0, words: int = 40
) -> AsyncIterator[Program]:
    """Run `serve` as a user does."""
    path = folder / "fleet.yaml"
    path.write_text(YAML.format(store=folder / "traces.db", reply="word " * words))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, str(path), str(unready_s), str(drain_s)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 20)
        yield Program(process, line.decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


class TestEnd:
    async def test_a_signal_ends_it_without_dropping_anything(self, tmp_path: Path) -> None:
        """After SIGTERM it is not ready, takes requests for a moment, finishes its streams, and ends with 0."""
        async with program(tmp_path, unready_s=0.3) as one, httpx.AsyncClient(base_url=one.url, timeout=10) as client:
            async with client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as stream:
                lines = stream.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                one.process.send_signal(signal.SIGTERM)
                statuses = set()
                with contextlib.suppress(httpx.ConnectError):
                    while (ready := await client.get("/readyz")).status_code == 200:
                        pass
                    statuses.add(ready.json()["status"])
                rest = [line async for line in lines]
            _, errors = await asyncio.wait_for(one.process.communicate(), 10)
        assert statuses == {"stopping"}
        assert "data: [DONE]" in rest
        assert one.process.returncode == 0
        events = [json.loads(line)["event"] for line in errors.decode().splitlines()]
        assert [event.split()[:2] for event in events] == [
            ["gateway", "listening"],
            ["gateway", "stopping"],
            ["gateway", "stopped"],
        ]
        store = TraceStore(tmp_path / "traces.db")
        assert store.path.exists()

    async def test_a_stream_beyond_the_drain_limit_ends_honestly(self, tmp_path: Path) -> None:
        """What does not end in time is told so; it is not just cut off."""
        async with (
            program(tmp_path, drain_s=1, words=5000) as one,
            httpx.AsyncClient(base_url=one.url, timeout=10) as client,
            client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as stream,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            one.process.send_signal(signal.SIGTERM)
            rest = [line async for line in lines if line]
            await asyncio.wait_for(one.process.wait(), 10)
        assert "shutting_down" in rest[-1]
        assert one.process.returncode == 0

    async def test_a_second_signal_ends_it_at_once(self, tmp_path: Path) -> None:
        """Whoever does not want to wait says it twice."""
        async with (
            program(tmp_path, words=5000) as one,
            httpx.AsyncClient(base_url=one.url, timeout=10) as client,
            client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as stream,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            one.process.send_signal(signal.SIGINT)
            assert one.process.stderr is not None
            while b"gateway stopping" not in await asyncio.wait_for(one.process.stderr.readline(), 5):
                pass
            one.process.send_signal(signal.SIGINT)
            rest = [line async for line in lines if line]
            await asyncio.wait_for(one.process.wait(), 5)
        assert one.process.returncode == 0
        assert "shutting_down" in rest[-1]


def test_a_configured_store_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    """Where traces were asked for, a gateway without them does not start."""
    path = tmp_path / "traces.db"
    path.mkdir()
    config = attrs.evolve(FLEET, telemetry=TelemetryConfig(trace_store=TraceStoreConfig(path=str(path))))
    with pytest.raises(TraceError):
        serve(config, port=0)
