"""Routes of one's own and the threshold of quality, seen by a client of the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.loader import load_config
from kvfleet.config.schema import FleetConfig
from kvfleet.errors import Fault
from kvfleet.gateway.app import Gateway
from kvfleet.gateway.auth import Keys
from kvfleet.plugin.manager import discover
from kvfleet.router.embedding import has_minilm
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.records import StageRecord
from kvfleet.trace.spans import Trace
from tests.gateway.asgi import Answer, call

TABLE = discover()
PIPELINE = Path(__file__).parents[2] / "pipelines" / "semantic-routes.yaml"
EASY = "What is the capital of France?"
REFUND = "I would like a refund for my last payment"


@attrs.define
class Live:
    """A gateway over fake engines, and what it recorded."""

    app: Gateway
    adapters: dict[str, FakeAdapter]
    traces: list[Trace]

    async def ask(self, prompt: str) -> Answer:
        body = {"model": "auto", "messages": [{"role": "user", "content": prompt}]}
        answer = await call(self.app, "POST", "/v1/chat/completions", body)
        await self.app.router.settled()
        return answer

    @property
    def last(self) -> Explanation:
        return Explanation(self.traces[-1])

    def stage(self, key: str) -> StageRecord:
        return next(stage for stage in self.last.stages if stage.key == key)


@attrs.define
class Sink:
    traces: list[Trace] = attrs.field(factory=list)

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


@asynccontextmanager
async def live(config: FleetConfig) -> AsyncIterator[Live]:
    """A gateway that serves."""
    clock, sink = FrozenClock(), Sink()
    adapters = {
        f"{m.name}@{m.endpoint}": FakeAdapter(
            endpoint=m.endpoint, model_id=m.name, time=clock, script=FakeReply(text=m.name)
        )
        for m in config.models
    }
    router = Router(config, table=TABLE, clock=clock, adapters=adapters, sinks=[sink], polls=False, seed=1)
    gateway = Gateway(router, keys=Keys.of(config.gateway, "", tenants=config.tenants))
    await gateway.start()
    try:
        yield Live(gateway, adapters, sink.traces)
    finally:
        await gateway.stop()


def said(answer: Answer) -> str:
    """The text of an answer."""
    assert answer.status == 200, answer.body
    text: str = answer.json["choices"][0]["message"]["content"]
    return text


async def test_a_request_goes_where_its_route_s_rule_says() -> None:
    """The trace has the route, its similarity and how it was compared; no word of the prompt."""
    async with live(load_config(PIPELINE)) as gateway:
        assert said(await gateway.ask(REFUND)) == "billing-bot"
        facts = gateway.stage("classify.routes").facts
        assert facts["route"] == facts["route.nearest"] == "billing"
        assert facts["route.similarity"] >= 0.25
        assert facts["route.method"] == ("embeddings" if has_minilm() else "words")
        assert "refund" not in repr([span.attributes for span in gateway.traces[-1].spans])


async def test_a_request_on_no_route_goes_to_the_model_that_suffices() -> None:
    """The trace has the chance and the threshold, and what they came to."""
    async with live(load_config(PIPELINE)) as gateway:
        assert said(await gateway.ask(EASY)) == "small"
        stage = gateway.stage("select.quality_threshold")
        assert stage.mode == "the weaker model suffices"
        chance, threshold = (stage.terms[name][0] for name in ("chance", "threshold"))
        assert 1 > chance >= threshold > 0


async def test_a_failed_small_model_hands_over_to_the_large_one() -> None:
    """The rest of the ranking is the fallback."""
    async with live(load_config(PIPELINE)) as gateway:
        gateway.adapters["small@http://gpu-1.internal:8000"].script = FakeReply(fail=Fault.SERVER_ERROR)
        assert said(await gateway.ask(EASY)) == "large"


@attrs.define
class Dumb:
    """Says the same of every text, after a first call that works; then it hangs or breaks."""

    name: str = "dumb"
    calls: int = 0

    def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("gone")
        return [[1.0, 0.0] for _ in texts]


async def test_an_embedder_that_breaks_breaks_no_request(tmp_path: Path) -> None:
    """Words are compared instead, the trace and a metric say so, and the answer comes."""
    text = PIPELINE.read_text().replace(
        "  - classify.embedding\n",
        "  - {use: classify.embedding, with: {embedder: 'tests.gateway.test_semantic_routes:Dumb'}}\n",
    )
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    async with live(load_config(path)) as gateway:
        assert said(await gateway.ask(REFUND)) == "billing-bot"
        facts = gateway.stage("classify.routes").facts
        assert (facts["route.method"], facts["route.degraded"]) == ("words", "failed")
        assert gateway.stage("classify.embedding").facts == {"embedding": "none: failed"}
        scraped = await call(gateway.app, "GET", "/metrics")
        assert b'kvfleet_embeddings_total{result="failed"} 1.0' in scraped.body


@pytest.mark.skipif(not has_minilm(), reason="needs kvfleet[semantic]")
async def test_routes_are_found_by_meaning() -> None:
    """No word of these is in an example of their route."""
    async with live(load_config(PIPELINE)) as gateway:
        assert said(await gateway.ask("My debit looks wrong, I paid double")) == "billing-bot"
        facts = gateway.stage("classify.routes").facts
        assert (facts["route"], facts["route.method"]) == ("billing", "embeddings")
        embedding = gateway.stage("classify.embedding").facts["embedding"]
        assert embedding == "all-MiniLM-L6-v2-int8"
