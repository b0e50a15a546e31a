"""A gateway in front of `kvfleet mock-engine`, a process of its own: it knows to the token what each engine holds."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("zmq")
pytest.importorskip("msgspec")

from kvfleet.cache.kv_sequence import EventStream
from kvfleet.config.caching import KVEventsConfig, PromptBlocksConfig
from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.spans import Trace
from tests.gateway.kv_engine import free_ports
from tests.telemetry.zmq_engine import until

BLOCK = 16
ENGINES = 2


class Scene:
    """A gateway over two engines of small caches, and what it recorded."""

    def __init__(self, url: str, router: Router) -> None:
        self.url = url
        self.router = router
        self.traces: list[Trace] = []
        router.add_sink(self)

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    async def ask(self, http: httpx.AsyncClient, messages: list[Any]) -> tuple[int, float, str]:
        """A chat: the tokens its engine had cached, those that were expected there, and how that was known."""
        body = {"model": "m", "messages": messages, "max_tokens": 4}
        answer = await http.post(f"{self.url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        await self.router.settled()
        trace = self.traces[-1]
        given = next(span for span in trace.stages if span.name == "kvfleet.affinity.prefix").attributes
        replicas, values, modes = given[names.SCORED], given[names.SCORE_VALUES], given[names.SCORE_MODES]
        at = replicas.index(trace.route.attributes[names.REPLICA_SERVED])  # type: ignore[union-attr, arg-type]
        cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached, values[at], modes[at]  # type: ignore[index, return-value]

    async def known(self, http: httpx.AsyncClient) -> None:
        """Wait until everything is known exactly, and all that the engines have said has arrived."""
        await until(lambda: {one["cache_mode"] for one in self.router.state()["replicas"]} == {"exact"}, 30)
        for source in self.router.services.caches.sources:
            stream = source.states[0]
            assert isinstance(stream, EventStream)
            told = -1
            while (said := await batches(http, source.endpoint)) != told:  # the last of an answer may come after it
                told = said
                await until(lambda stream=stream, told=told: (stream._last, stream.is_whole) == (told - 1, True), 30)  # type: ignore[misc]


async def batches(http: httpx.AsyncClient, endpoint: str) -> int:
    """How many messages an engine has published."""
    return int((await http.get(f"{endpoint}/mock")).json()["kv_batches"])


@contextlib.asynccontextmanager
async def engines(port: int, **more: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """Two engines as a process; `more` are further options."""
    options = {
        "--engines": ENGINES,
        "--port": port,
        "--model": "m",
        "--block-tokens": BLOCK,
        "--cache-tokens": 60 * BLOCK,
        "--speed": 20,
        "--kv-events-port": port + ENGINES,
        "--kv-replay-port": port + 2 * ENGINES,
        **{f"--{name.replace('_', '-')}": value for name, value in more.items()},
    }
    words = [str(word) for pair in options.items() for word in pair]
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("kvfleet"), "mock-engine", *words, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        for _ in range(ENGINES):
            assert b"http://" in await asyncio.wait_for(process.stdout.readline(), 60)
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()


@contextlib.asynccontextmanager
async def gateway(port: int) -> AsyncIterator[Scene]:
    """A gateway in front of them."""
    told = KVEventsConfig(
        endpoint=f"tcp://{{host}}:{{port+{ENGINES}}}", replay=f"tcp://{{host}}:{{port+{2 * ENGINES}}}"
    )
    blocks = PromptBlocksConfig(mode="engine", block_tokens=BLOCK, deadline_ms=5000)
    first, *more = (f"http://127.0.0.1:{port + at}" for at in range(ENGINES))
    model = ModelConfig(
        name="m", endpoint=first, replicas=tuple(more), provider="vllm", kv_events=told, prompt_blocks=blocks
    )
    telemetry = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False), health_check_interval_seconds=0.5)
    router = Router(FleetConfig(models=(model,), telemetry=telemetry))
    async with running(router.config, router=router) as served:
        yield Scene(served.url, router)


def said(rng: random.Random, words: int) -> str:
    """So many words."""
    return " ".join(rng.choices(("bee", "hive", "comb", "swarm", "queen", "honey", "drone", "smoke"), k=words))


async def test_every_answer_had_cached_what_was_expected() -> None:
    """Conversations that grow, in caches that are too small for all of them; and again after the engines were killed."""
    rng, port = random.Random(1), free_ports(3 * ENGINES)
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=30))
        async with engines(port):
            scene = await stack.enter_async_context(gateway(port))
            wrong, hits = await converse(scene, http, rng)
            assert wrong == []
            assert hits > 15
        await until(lambda: "exact" not in {one["cache_mode"] for one in scene.router.state()["replicas"]}, 30)
        await until(lambda: not any(one["healthy"] for one in scene.router.state()["replicas"]), 60)
        async with engines(port):
            await until(lambda: all(one["healthy"] for one in scene.router.state()["replicas"]), 60)
            wrong, hits = await converse(scene, http, rng)
            assert wrong == []
            assert hits > 15
        counts = [source.states[0].counts for source in scene.router.services.caches.sources]
        assert [(one.restarts, one.gaps, one.losses) for one in counts] == [(1, 0, 0)] * ENGINES


async def test_engines_with_sliding_windows_had_cached_what_was_expected() -> None:
    """A hybrid model's: to the token what both of its groups of layers have, which is less than one of them has."""
    rng, port = random.Random(2), free_ports(3 * ENGINES)
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=30))
        await stack.enter_async_context(engines(port, window_tokens=2 * BLOCK + 1, window_cache_tokens=12 * BLOCK))
        scene = await stack.enter_async_context(gateway(port))
        wrong, hits = await converse(scene, http, rng)
        assert wrong == []
        assert 5 < hits < 35
        blocks = [one for source in scene.router.services.caches.sources for one in source.blocks()]
        assert [(one.is_hybrid, one.flaw) for one in blocks] == [(True, "")] * ENGINES


async def converse(scene: Scene, http: httpx.AsyncClient, rng: random.Random) -> tuple[list[Any], int]:
    """Forty turns of six conversations: where an expectation was wrong, and how often something was cached."""
    talks = [[{"role": "user", "content": said(rng, rng.randrange(5, 200))}] for _ in range(6)]
    wrong, hits = [], 0
    for turn in range(40):
        await scene.known(http)
        talk = rng.choice(talks)
        cached, expected, mode = await scene.ask(http, talk)
        hits += cached > 0
        if abs(cached - expected) > 1 or mode not in ("exact", "none"):  # 1 is what the home of an unknown prompt gets
            wrong.append((turn, cached, expected, mode))
        talk += [{"role": "assistant", "content": said(rng, 3)}, {"role": "user", "content": said(rng, 20)}]
    return wrong, hits
