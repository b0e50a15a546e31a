"""Data-parallel ranks of a mock engine, routed to one by one through a running gateway."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import attrs
import httpx
import pytest

pytest.importorskip("zmq")
pytest.importorskip("msgspec")

from kvfleet.adapters.mock import MockAdapter
from kvfleet.config.caching import KVEventsConfig, PromptBlocksConfig
from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.mock.engine import MockEngine
from kvfleet.mock.kv_publisher import KVPublisher, zmq_context
from kvfleet.mock.server import serving
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.spans import Trace
from tests.gateway.kv_engine import free_ports
from tests.telemetry.zmq_engine import until

RANKS = 2


@attrs.define
class Scene:
    """A gateway before one engine of two ranks, and what it recorded."""

    url: str
    router: Router
    engine: MockEngine
    endpoint: str
    traces: list[Trace] = attrs.field(factory=list)

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    async def known(self) -> None:
        """Wait until every rank's cache is known exactly, and all that it stored."""
        await until(lambda: [one["cache_mode"] for one in self.router.state()["replicas"]] == ["exact"] * RANKS)
        states = [source.states[0] for source in self.router.services.caches.sources]
        sent = [rank.publisher.sent for rank in self.engine.ranks if rank.publisher is not None]
        await until(lambda: [state.counts.batches for state in states] == sent)

    async def ask(self, text: str) -> tuple[int, int, float, str]:
        """Ask: which rank computed it, what it had cached, and what was expected of it, and how."""
        before = self.queried()
        async with httpx.AsyncClient(trust_env=False) as http:
            body = {"model": "m", "messages": [{"role": "user", "content": text}]}
            answer = await http.post(f"{self.url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        await self.router.settled()
        (rank,) = [place for place, (now, then) in enumerate(zip(self.queried(), before, strict=True)) if now > then]
        stage = next(span for span in self.traces[-1].stages if span.name == "kvfleet.affinity.prefix")
        given = stage.attributes
        at = list(given[names.SCORED]).index(f"m@{self.endpoint}#{rank}")  # type: ignore[arg-type]
        cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return rank, cached, given[names.SCORE_VALUES][at], given[names.SCORE_MODES][at]  # type: ignore[index, return-value]

    def told(self) -> list[float | None]:
        """By rank: the same, as its lines of the metrics page say."""
        known = [self.router.services.load.engine(f"{self.endpoint}#{rank}") for rank in range(RANKS)]
        return [None if one is None else one.prefix_queries_tokens for one in known]

    def queried(self) -> list[float]:
        """By rank: the prompt tokens it was asked to compute."""
        return [rank.adapter.live.load().prefix_queries_tokens or 0.0 for rank in self.engine.ranks]


@contextlib.asynccontextmanager
async def live() -> AsyncIterator[Scene]:
    """The engine and the gateway."""
    context, port = zmq_context(), free_ports(2 * RANKS)
    here = "tcp://127.0.0.1"
    ranks = []
    for rank in range(RANKS):
        publisher = KVPublisher(
            context=context,
            endpoint=f"{here}:{port + rank}",
            replay=f"{here}:{port + RANKS + rank}",
            time_s=lambda: 1e9,
        )
        adapter = MockAdapter(endpoint=f"mock://{rank}", model_id="m", speed=1e6, answer_tokens=4, block_tokens=16)
        ranks.append((adapter, publisher))
    first, *others = ranks
    engine = MockEngine(*first, others=[MockEngine(*one) for one in others])
    try:
        async with serving([engine]) as (server,):
            model = ModelConfig(
                name="m",
                endpoint=server.url,
                provider="vllm",
                data_parallel_ranks=RANKS,
                kv_events=KVEventsConfig(endpoint=f"tcp://{{host}}:{port}", replay=f"tcp://{{host}}:{port + RANKS}"),
                prompt_blocks=PromptBlocksConfig(mode="engine", block_tokens=16, deadline_ms=5000),
            )
            telemetry = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False), load_poll_interval_seconds=0.1)
            router = Router(FleetConfig(models=(model,), telemetry=telemetry))
            async with running(router.config, router=router) as served:
                scene = Scene(served.url, router, engine, server.url)
                router.add_sink(scene)
                yield scene
    finally:
        context.destroy(linger=0)


async def test_each_rank_is_known_exactly() -> None:
    """What is said again goes to the rank that has it, which finds just what was expected; each has its own metrics."""
    async with live() as scene:
        await scene.known()
        homes: dict[str, int] = {}
        while len(set(homes.values())) < RANKS:  # who gets what nobody holds is a matter of hashes
            assert len(homes) < 64
            text = f"{len(homes)} is what I ask, and I would like to know how that came about. " * 8
            homes[text], cached, _, mode = await scene.ask(text)
            assert (cached, mode) == (0, "exact")
            await scene.known()
        for text, home in homes.items():
            rank, cached, expected, mode = await scene.ask(f"{text} Say more.")
            assert (rank, cached, mode) == (home, expected, "exact")
            assert cached > 64
            await scene.known()
        await until(lambda: scene.told() == scene.queried())


async def test_a_rank_that_is_not_there_is_refused() -> None:
    """With the words of vLLM; a word that is no number is as good as none."""
    async with live() as scene, httpx.AsyncClient(base_url=scene.endpoint, trust_env=False) as http:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        for word, status in (("0", 200), ("1", 200), ("2", 400), ("-1", 400), ("first", 200)):
            answer = await http.post("/v1/chat/completions", json=body, headers={"X-Data-Parallel-Rank": word})
            assert answer.status_code == status
        for _ in range(4):  # nobody named: in turns
            await http.post("/v1/chat/completions", json=body)
        page = (await http.get("/metrics")).text
    counted = [line for line in page.splitlines() if line.startswith("vllm:request_success_total")]
    ended = [sum(float(line.split()[-1]) for line in counted if f'engine="{rank}"' in line) for rank in range(RANKS)]
    assert sum(ended) == 7
    assert min(ended) >= 3
    assert page.count("# TYPE vllm:num_requests_running gauge") == 1
