"""Exact knowledge of KV caches, through a running gateway in front of engines that publish their events."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

pytest.importorskip("zmq")
pytest.importorskip("msgspec")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from kvfleet.cache.tokens import LocalTokenizer
from kvfleet.cli.serve import checked_fleet
from kvfleet.config.caching import KVEventsConfig, PromptBlocksConfig
from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.reload import FleetFile
from kvfleet.gateway.server import running
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.spans import Span, Trace
from tests.cache.tokenizing import save
from tests.gateway.kv_engine import DraftingKVEngine, HybridKVEngine, KVEngine, RankedEngine
from tests.telemetry.zmq_engine import until

SYSTEM = "You answer in verse, and you never say more than you must. " * 4


@attrs.define
class Live:
    """A gateway over two engines, and what it recorded."""

    url: str
    router: Router
    engines: list[KVEngine]
    traces: list[Trace] = attrs.field(factory=list)

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    async def ask(self, question: str, *more: dict[str, str], **body: Any) -> httpx.Response:
        """A chat; its answer, once the observers have run."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}, *more]
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.post(
                f"{self.url}/v1/chat/completions", json={"model": "m", "messages": messages, **body}
            )
        assert answer.status_code == 200, answer.text
        await self.router.settled()
        return answer

    async def get(self, path: str) -> httpx.Response:
        """Something else of the gateway's."""
        async with httpx.AsyncClient(trust_env=False) as http:
            return await http.get(f"{self.url}{path}")

    def stage(self, name: str) -> Span:
        """A stage's span in the last trace."""
        return next(span for span in self.traces[-1].stages if span.name == f"kvfleet.{name}")

    def expected(self) -> dict[str, tuple[float, str]]:
        """By engine: what was expected there, and how that was known."""
        given = self.stage("affinity.prefix").attributes
        engines = {f"m@{engine.url}": engine.name for engine in self.engines}
        replicas, values, modes = given[names.SCORED], given[names.SCORE_VALUES], given[names.SCORE_MODES]
        return {engines[r]: (v, m) for r, v, m in zip(replicas, values, modes, strict=True)}  # type: ignore[arg-type]

    def modes(self) -> list[str]:
        """How the engines' caches are known now."""
        return [replica["cache_mode"] for replica in self.router.state()["replicas"]]

    async def exactly_known(self) -> None:
        """Wait until they are known exactly."""
        await until(lambda: self.modes() == ["exact", "exact"])


@contextlib.asynccontextmanager
async def live(
    folder: Path,
    *,
    mode: str = "tokenizer",
    deadline_ms: float = 5000,
    kind: type[KVEngine] = KVEngine,
    **events: Any,
) -> AsyncIterator[Live]:
    """Two engines, and a gateway in front of them."""
    tokenizer = LocalTokenizer.load(save(folder))
    async with kind(tokenizer, "one").running() as one, kind(tokenizer, "two").running() as two:
        told = KVEventsConfig(endpoint="tcp://{host}:{port+1}", replay="tcp://{host}:{port+2}", topic="kv", **events)
        blocks = PromptBlocksConfig(mode=mode, block_tokens=4, tokenizer=str(folder), deadline_ms=deadline_ms)
        replicas = {"endpoint": one.url, "replicas": (two.url,), "provider": "vllm"}
        model = ModelConfig(name="m", kv_events=told, prompt_blocks=blocks, **replicas)
        telemetry = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False), load_poll_interval_seconds=0.1)
        router = Router(FleetConfig(models=(model,), telemetry=telemetry))
        async with running(router.config, router=router) as served:
            scene = Live(served.url, router, [one, two])
            router.add_sink(scene)
            await scene.exactly_known()
            yield scene


async def test_what_engines_hold_is_known_exactly(tmp_path: Path) -> None:
    """Each answer had cached what was expected where it went, to the token, from the second turn on."""
    async with live(tmp_path) as scene:
        turns: list[dict[str, str]] = []
        for question in ("Who are you?", "And who am I?", "Is that all?"):
            await scene.ask("Hello.", *turns, {"role": "user", "content": question})
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": "one"}]
            expected = scene.expected()
            asked = {engine.name: engine.asked for engine in scene.engines}
            served = next(name for name, found in asked.items() if found)
            assert expected[served][0] in (asked[served][-1][1], 1.0)  # 1: the home of a prompt nobody holds
            await scene.exactly_known()
        assert {mode for _, mode in expected.values()} == {"exact"}
        assert expected[served][0] > 200
        assert [len(found) for found in asked.values()] in ([3, 0], [0, 3])
        fact = scene.stage("classify.tokens").attributes["kvfleet.fact.tokens"]
        assert fact == (f"m: {asked[served][-1][0]} tokens",)


async def test_what_a_hybrid_model_holds_is_known_exactly(tmp_path: Path) -> None:
    """To the token, wherever in a prompt its layers have lost blocks."""
    async with live(tmp_path, kind=HybridKVEngine) as scene:
        rng, questions, told = random.Random(7), [f"{number} is my question. " * 12 for number in range(3)], []
        for number in range(18):
            before = {engine.name: len(engine.asked) for engine in scene.engines}
            await scene.ask(questions[number % 3])
            (served,) = [engine for engine in scene.engines if len(engine.asked) > before[engine.name]]
            told.append((*scene.expected()[served.name], served.asked[-1][1]))
            if number > 5:
                await served.evict(4, rng)
            await until(lambda: _told(scene) == [engine.publisher.seq for engine in scene.engines])
        known = [(expected, cached) for expected, mode, cached in told if mode == "exact"]
        assert all(expected == cached for expected, cached in known)
        assert len([cached for _, cached in known if cached]) >= 3  # at least those from before anything was lost
        assert scene.modes() == ["exact", "exact"]


def _told(scene: Live) -> list[int]:
    """By engine: the messages that the gateway has taken in."""
    return [source.states[0].counts.batches for source in scene.router.services.caches.sources]


async def test_what_an_engine_forgot_is_known(tmp_path: Path) -> None:
    """Though it was routed there, and would be expected by that."""
    async with live(tmp_path) as scene:
        await scene.ask("Hello.")
        served = next(engine for engine in scene.engines if engine.asked)
        blocks = len(served.publisher.cache)
        await until(lambda: scene.router.services.caches.state() == {"m": {"entries": blocks, "refused": 0}})
        await served.evict(blocks - 3, random.Random(1))
        await until(lambda: scene.router.services.caches.state() == {"m": {"entries": 3, "refused": 0}})
        await scene.ask("Hello.")
        assert scene.expected()[served.name] == (12.0, "exact")


async def test_an_engine_that_is_asked_for_tokens(tmp_path: Path) -> None:
    """Needs no tokenizer here."""
    async with live(tmp_path, mode="engine") as scene:
        await scene.ask("Hello.")
        await scene.ask("Hello.")
        served = next(engine for engine in scene.engines if engine.asked)
        assert scene.expected()[served.name] == (float(served.asked[-1][1]), "exact")
        assert len(served.asked) == 2


async def test_an_engine_that_restarts(tmp_path: Path) -> None:
    """Is known to hold nothing, and known exactly again, by itself."""
    async with live(tmp_path) as scene:
        await scene.ask("Hello.")
        served = next(engine for engine in scene.engines if engine.asked)
        await until(lambda: scene.router.services.caches.state()["m"] != {"entries": 0, "refused": 0})
        served.wire.restart()
        await until(lambda: scene.modes().count("exact") == 1)
        served.publisher.restart()
        served.wire.resume()
        await scene.exactly_known()
        assert scene.router.services.caches.state() == {"m": {"entries": 0, "refused": 0}}
        await scene.ask("Hello.")
        assert {mode for _, mode in scene.expected().values()} <= {"exact", "none"}
        assert max(tokens for tokens, _ in scene.expected().values()) <= 1


async def test_the_trace_says_why_a_cache_is_not_known_exactly(tmp_path: Path) -> None:
    """Of the engine whose events are lost, while it still answers; and nothing where there is nothing to say."""
    async with live(tmp_path) as scene:
        await scene.ask("Hello.")
        assert names.SCORE_REASONS not in scene.stage("affinity.prefix").attributes
        scene.engines[0].wire.restart()
        await until(lambda: scene.modes().count("exact") == 1)
        given = scene.stage("affinity.prefix").attributes
        while names.SCORE_REASONS not in given:  # what is known of engines is looked at every twentieth of a second
            await scene.ask("Hello.")
            given = scene.stage("affinity.prefix").attributes
        reasons = dict(zip(given[names.SCORED], given[names.SCORE_REASONS], strict=True))  # type: ignore[arg-type]
        lost = f"m@{scene.engines[0].url}"
        assert {one for one, why in reasons.items() if why} == {lost}
        assert reasons[lost].endswith(": the connection is lost")


async def test_an_engine_that_drops_its_last_block(tmp_path: Path) -> None:
    """As those do whose model drafts: after eight answers as much is expected as it has."""
    async with live(tmp_path, kind=DraftingKVEngine) as scene:
        for _ in range(200):  # a few more than that, because what was learned is looked at every twentieth of a second
            await scene.ask("Hello.")
            await until(lambda: _told(scene) == [engine.publisher.seq for engine in scene.engines])
            served = max(scene.engines, key=lambda engine: len(engine.asked))
            expected, cached = scene.expected()[served.name], served.asked[-1][1]
            if cached and expected == (float(cached), "exact"):
                break
        assert len(served.asked) > 8
        assert (cached > 0, expected) == (True, (float(cached), "exact"))


async def test_an_engine_that_falls_silent(tmp_path: Path) -> None:
    """Works, and tells nothing: it is asked, and what it did not tell is known."""
    async with live(tmp_path, silence_seconds=0.2) as scene:
        for engine in scene.engines:
            engine.is_silent = True
        before = [len(engine.wire.requests) for engine in scene.engines]
        for question in range(20):
            await scene.ask(f"{question} " * 40)
        await until(lambda: scene.router.services.caches.state()["m"]["entries"] > 100)
        assert sum(len(engine.publisher.cache) for engine in scene.engines) > 300
        assert [len(engine.wire.requests) for engine in scene.engines] != before
        await scene.exactly_known()


async def test_a_reload_misses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Engines that are the same stay exactly known: their messages go on to whoever serves next, and nobody reconnects."""
    caplog.set_level(logging.INFO, "kvfleet.telemetry.kv_stream")
    async with KVEngine(LocalTokenizer.load(save(tmp_path)), "one").running() as engine:
        path = tmp_path / "fleet.yaml"
        blocks = {"mode": "tokenizer", "tokenizer": str(tmp_path), "block_tokens": 4, "deadline_ms": 5000}
        told = {"endpoint": "tcp://{host}:{port+1}", "replay": "tcp://{host}:{port+2}"}
        model = {"name": "m", "provider": "vllm", "endpoint": engine.url, "kv_events": told, "prompt_blocks": blocks}
        path.write_text(json.dumps({"models": [model]}))
        file = FleetFile(path, lambda: checked_fleet(path, discover()))
        async with running(file.read(), file=file) as served, httpx.AsyncClient(base_url=served.url) as http:

            def cache_mode() -> Any:
                return served.gateway.router.state()["replicas"][0]["cache_mode"]

            await until(lambda: cache_mode() == "exact")
            for latency_ms in (7, 8, 9):
                path.write_text(json.dumps({"models": [{**model, "latency_p50_ms": latency_ms}]}))
                assert (await http.post("/-/reload")).status_code == 200
                assert cache_mode() == "exact"
                body = {"model": "m", "messages": [{"role": "user", "content": f"{latency_ms} " * 40}]}
                assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
            blocks_there = len(engine.publisher.cache)
            caches = served.gateway.router.services.caches
            await until(lambda: caches.state() == {"m": {"entries": blocks_there, "refused": 0}})
            assert caches.sources[0].states[0].counts.gaps == 0
    assert caplog.text.count("kv events connected") == 1


async def test_ranks_of_one_engine_are_known_each(tmp_path: Path) -> None:
    """A request goes to the rank that holds its beginning, and that rank computes it; both are known exactly."""
    tokenizer = LocalTokenizer.load(save(tmp_path))
    async with RankedEngine([KVEngine(tokenizer, "zero"), KVEngine(tokenizer, "one")]).running() as engine:
        told = KVEventsConfig(endpoint="tcp://{host}:{port+1}", replay="tcp://{host}:{port+11}")
        blocks = PromptBlocksConfig(mode="tokenizer", block_tokens=4, tokenizer=str(tmp_path), deadline_ms=5000)
        model = ModelConfig(
            name="m", endpoint=engine.url, provider="vllm", data_parallel_ranks=2, kv_events=told, prompt_blocks=blocks
        )
        telemetry = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False), load_poll_interval_seconds=0.1)
        router = Router(FleetConfig(models=(model,), telemetry=telemetry))
        async with running(router.config, router=router) as served:
            scene = Live(served.url, router, engine.ranks)
            router.add_sink(scene)
            questions = [f"{rank} is my question. " * 20 for rank in range(2)]
            for one, question in zip(engine.ranks, questions, strict=True):
                messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
                await one.answer("/v1/chat/completions", json.dumps({"model": "m", "messages": messages}).encode())
            blocks_there = sum(len(one.publisher.cache) for one in engine.ranks)
            await until(lambda: router.services.caches.state() == {"m": {"entries": blocks_there, "refused": 0}})
            for rank in (0, 1, 1, 0):
                await scene.exactly_known()
                await scene.ask(questions[rank], {"role": "user", "content": "Well?"})
                value, mode = max(_expected(scene))
                assert (mode, value) == ("exact", engine.ranks[rank].asked[-1][1])
                assert value > 100
            assert [len(one.asked) for one in engine.ranks] == [3, 3]
            assert engine.unsaid == 0
            for rank, one in enumerate(engine.ranks):
                tokens, at = sum(found for found, _ in one.asked), f"{engine.url}#{rank}"
                await until(lambda at=at, tokens=tokens: _queried(router, at) == tokens)


def _expected(scene: Live) -> list[tuple[float, str]]:
    """What was expected of each replica, and how that was known, in the last trace."""
    given = scene.stage("affinity.prefix").attributes
    return list(zip(given[names.SCORE_VALUES], given[names.SCORE_MODES], strict=True))  # type: ignore[arg-type]


def _queried(router: Router, endpoint: str) -> float | None:
    """Prompt tokens that an engine, or a rank of one, says it looked for in its cache."""
    said = router.services.load.engine(endpoint)
    return None if said is None else said.prefix_queries_tokens


async def test_it_is_seen(tmp_path: Path) -> None:
    """In the metrics, in what the gateway says of its health, and on the dashboard."""
    async with live(tmp_path) as scene:
        await scene.ask("Hello.")
        await scene.exactly_known()
        served = next(engine for engine in scene.engines if engine.asked)
        labels = f'endpoint="{served.url}",model="m"'
        await until(lambda: scene.router.services.caches.state()["m"] != {"entries": 0, "refused": 0})
        metrics = (await scene.get("/metrics")).text
        blocks = len(served.publisher.cache)
        for line in (
            f'kvfleet_kv_mode{{endpoint="{served.url}",mode="exact",model="m"}} 1.0',
            f'kvfleet_kv_mode{{endpoint="{served.url}",mode="degraded",model="m"}} 0.0',
            f"kvfleet_kv_events_total{{{labels}}} {float(blocks)}",
            f"kvfleet_kv_blocks{{{labels}}} {float(blocks)}",
            f"kvfleet_kv_gaps_total{{{labels}}} 0.0",
        ):
            assert line in metrics
        assert f"kvfleet_kv_lag_seconds{{{labels}}}" in metrics
        endpoints = (await scene.get("/health")).json()["endpoints"]
        assert {one["cache_mode"] for one in endpoints.values()} == {"exact"}
        board = (await scene.get("/dashboard/api/state")).json()["replicas"]
        assert [one["cache_mode"] for one in board] == ["exact", "exact"]


async def test_a_prompt_whose_tokens_are_not_there_in_time(tmp_path: Path) -> None:
    """Is compared by its bytes, and the trace says why."""
    async with live(tmp_path, deadline_ms=0.001) as scene:
        await scene.ask("Hello.")
        await scene.ask("Hello.")
        assert scene.stage("classify.tokens").attributes["kvfleet.fact.tokens"] == (
            "m: by bytes, not made within 0.001 ms",
        )
        assert {mode for _, mode in scene.expected().values()} & {"approximate", "observed"}
