"""The stages that compare meanings: vectors of prompts, domains by prototypes, routes by examples."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

from kvfleet.adapters.base import EndpointHealth
from kvfleet.adapters.call import Call, Operation, Reply
from kvfleet.builtin.classify import DomainClassifier
from kvfleet.builtin.embedding import EmbeddingClassifier
from kvfleet.builtin.facts import DOMAIN, EMBEDDING, ROUTE
from kvfleet.builtin.fleet_embedder import FleetEmbedder
from kvfleet.builtin.routes import RouteClassifier
from kvfleet.config.schema import ModelCapabilities, ModelConfig
from kvfleet.errors import BackendError, ComponentError, Fault
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Drop, Fact, RoutingContext
from kvfleet.router.embedding import PromptEmbedding, has_minilm
from kvfleet.router.prototypes import Prototypes
from kvfleet.router.routes import RouteExamples, RouteMatch
from kvfleet.router.semantic import PromptDomain
from kvfleet.router.vectors import Vector
from kvfleet.testing.fakes import FakeAdapter
from tests.builtin.making import context, model, user

ROUTES = {
    "billing": RouteExamples(examples=("refund my payment", "where is my invoice")),
    "careers": RouteExamples(examples=("are you hiring", "apply for a job")),
}
TOPICS = {"money": ("refund", "invoice", "bill"), "work": ("hiring", "job", "career")}


@attrs.define
class ByTopic:
    """Knows two topics, and a third direction for all else."""

    name: str = "by-topic"
    error: bool = False
    asked: list[str] = attrs.field(factory=list)

    def embed(self, texts: Sequence[str]) -> Sequence[Vector]:
        if self.error:
            raise RuntimeError("no")
        self.asked += texts
        found = [[float(any(word in text for word in words)) for words in TOPICS.values()] for text in texts]
        return [[*one, float(not any(one))] if sum(one) < 2 else [0.8, 0.6, 0.0] for one in found]


@pytest.fixture
def by_topic() -> Iterator[ByTopic]:
    """An embedder as a plugin brings it, under the place ``topics:it``."""
    module = types.ModuleType("topics")
    module.it = ByTopic()  # type: ignore[attr-defined]
    sys.modules["topics"] = module
    yield module.it  # type: ignore[attr-defined]
    del sys.modules["topics"]


def with_facts(ctx: RoutingContext, found: Mapping[Fact[Any], Any]) -> RoutingContext:
    """The context after a stage."""
    return attrs.evolve(ctx, facts={**ctx.facts, **found})


async def stages(services: Services, **options: Any) -> tuple[EmbeddingClassifier, RouteClassifier]:
    """Both stages, opened."""
    embedding, routes = EmbeddingClassifier(**options), RouteClassifier(routes=ROUTES)
    for stage in (embedding, routes):
        stage.provision(services)
    for stage in (embedding, routes):
        await stage.aopen()
    return embedding, routes


async def test_a_prompt_is_on_the_route_of_its_meaning(by_topic: ByTopic) -> None:
    """Compared are vectors: no word of the prompt is in an example of the route."""
    embedding, routes = await stages(Services(), embedder="topics:it")
    ctx = context(messages=[user("my bill is wrong")])
    found = await embedding.classify(ctx)
    assert found == {EMBEDDING: PromptEmbedding("by-topic", [1.0, 0.0, 0.0])}
    assert await routes.classify(with_facts(ctx, found)) == {ROUTE: RouteMatch("billing", 1.0, "billing", "embeddings")}
    assert EMBEDDING.describe(found[EMBEDDING]) == "by-topic"
    assert "bill" not in repr(found)
    await embedding.aclose()
    await embedding.aclose()


async def test_without_a_vector_words_are_compared_and_the_trace_says_why(by_topic: ByTopic) -> None:
    """An embedder that fails holds nobody up."""
    services = Services()
    embedding, routes = await stages(services, embedder="topics:it")
    by_topic.error = True
    ctx = context(messages=[user("please refund my payment")])
    found = await embedding.classify(ctx)
    assert found == {EMBEDDING: PromptEmbedding("by-topic", reason="failed")}
    match = (await routes.classify(with_facts(ctx, found)))[ROUTE]
    assert (match.name, match.method, match.degraded) == ("billing", "words", "failed")
    assert ROUTE.details(match) == {
        "similarity": match.similarity,
        "nearest": "billing",
        "method": "words",
        "degraded": "failed",
    }
    assert b'kvfleet_embeddings_total{result="failed"} 1.0' in services.metrics.render()
    await embedding.aclose()


async def test_routes_need_no_embedder() -> None:
    """Alone the stage compares words, and nothing is degraded by that."""
    routes = RouteClassifier(routes=ROUTES)
    routes.provision(Services())
    await routes.aopen()
    match = (await routes.classify(context(messages=[user("apply for a job")])))[ROUTE]
    assert (match.name, match.method, match.degraded) == ("careers", "words", "")


async def test_many_examples_are_compared_in_a_thread() -> None:
    """And with the same result."""
    many = {**ROUTES, "numbers": RouteExamples(examples=tuple(f"number {n}" for n in range(100)))}
    routes = RouteClassifier(routes=many)
    assert (await routes.classify(context(messages=[user("number 42")])))[ROUTE].name == "numbers"


async def test_examples_without_vectors_stop_the_start(by_topic: ByTopic) -> None:
    """Better than routes that never match."""
    embedding, routes = EmbeddingClassifier(embedder="topics:it"), RouteClassifier(routes=ROUTES)
    services = Services()
    embedding.provision(services)
    routes.provision(services)
    by_topic.error = True
    with pytest.raises(ComponentError, match="the examples got no vectors"):
        await routes.aopen()
    await embedding.aclose()


@pytest.mark.skipif(has_minilm(), reason="the extra is installed")
async def test_what_is_not_installed_is_said() -> None:
    """`auto` goes on without; `minilm` is a finding with the line that installs it."""
    embedding, routes = await stages(Services())
    ctx = context(messages=[user("refund my payment")])
    found = await embedding.classify(ctx)
    assert EMBEDDING.describe(found[EMBEDDING]) == "none: not installed"
    assert (await routes.classify(with_facts(ctx, found)))[ROUTE].degraded == "not installed"
    assert embedding.state() == {"embedder": "not installed"}
    with pytest.raises(ComponentError, match=r"kvfleet\[semantic\]"):
        EmbeddingClassifier(embedder="minilm").provision(Services())


def prototypes() -> Prototypes:
    """Of two domains: money is coding here, work is math; words may turn the tables."""
    eye = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    return Prototypes(
        embedder="by-topic",
        domains=("coding", "math"),
        weights=eye,
        biases=[0.0, 0.0],
        combined_weights=eye,
        combined_biases=[0.0, 0.0],
        keywords=[[0.0] * 8, [0.0, 50.0, *[0.0] * 6]],
    )


@pytest.fixture
def file_of_prototypes(tmp_path: Path) -> str:
    """What the training script writes."""
    path = tmp_path / "prototypes.json"
    path.write_bytes(prototypes().to_json())
    return str(path)


async def test_prototypes_tell_domains(by_topic: ByTopic, file_of_prototypes: str) -> None:
    """By the vector alone, or with what words say; without a vector words decide, and it is told."""
    services = Services()
    embedding = EmbeddingClassifier(embedder="topics:it")
    embedding.provision(services)
    ctx = context(messages=[user("refund this integral")])
    ctx = with_facts(ctx, await embedding.classify(ctx))
    alone = DomainClassifier(method="embeddings", prototypes=file_of_prototypes)
    both = DomainClassifier(method="combined", prototypes=file_of_prototypes)
    for stage in (alone, both):
        stage.provision(services)
        assert stage.required_facts() == (EMBEDDING,)
    (found,) = (await alone.classify(ctx)).values()
    assert (found.domain, found.method) == ("coding", "embeddings")
    assert DOMAIN.details(found) == {"method": "embeddings", "confidence": found.confidence}
    assert (await both.classify(ctx))[DOMAIN].domain == "math"
    without = with_facts(ctx, {EMBEDDING: PromptEmbedding("by-topic", reason="timeout")})
    assert (await alone.classify(without))[DOMAIN] == PromptDomain("math", 0.6, 0.1, "keywords", "timeout")
    await embedding.aclose()


def test_words_alone_need_no_vector() -> None:
    """And show in the trace what they always showed."""
    assert DomainClassifier().required_facts() == ()
    assert DOMAIN.details(PromptDomain("coding", 0.7)) == {}


async def test_prototypes_of_another_embedder_are_refused(by_topic: ByTopic) -> None:
    """Their directions would mean nothing."""
    services = Services()
    embedding = EmbeddingClassifier(embedder="topics:it")
    embedding.provision(services)
    with pytest.raises(
        ComponentError, match="the prototypes are those of all-MiniLM-L6-v2-int8, and vectors come from"
    ):
        DomainClassifier(method="embeddings").provision(services)
    await embedding.aclose()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 1, "domains": ["a"]}'])
def test_other_files_are_no_prototypes(tmp_path: Path, content: bytes) -> None:
    """The error names the file and what makes one."""
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ComponentError, match=r"p\.json holds no prototypes"):
        DomainClassifier(method="embeddings", prototypes=str(path)).provision(Services())
    with pytest.raises(ComponentError, match="cannot be read"):
        DomainClassifier(method="embeddings", prototypes=str(tmp_path / "q.json")).provision(Services())


# An embedding model of the fleet

BGE = model("bge", provider="vllm", capabilities=ModelCapabilities(model_type="embedding"), replicas=())


def fleet(
    *models: ModelConfig, adapters: Mapping[str, Any] | None = None, drops: Sequence[tuple[str, Drop]] = ()
) -> Services:
    """Services of a fleet whose filters drop as told."""
    return Services(models=models, adapters=adapters or {}, excluded=lambda ctx, asked: drops)


@attrs.define
class Broken(FakeAdapter):
    """Answers something else, or not at all."""

    body: bytes = b"{}"

    async def send(self, call: Call) -> Reply:
        if not self.body:
            raise BackendError(Fault.CONNECT, "nobody there")
        return Reply(body=self.body)


async def test_a_model_of_the_fleet_makes_vectors() -> None:
    """It is asked by the engine's name for it, and what comes back is brought to unit length."""
    services = fleet(BGE, adapters={BGE.id: FakeAdapter(endpoint=BGE.endpoint, model_id="bge")})
    embedding = EmbeddingClassifier(model="bge")
    embedding.provision(services)
    await embedding.aopen()
    found = (await embedding.classify(context(messages=[user("hello")])))[EMBEDDING]
    assert found.embedder == "bge"
    assert found.vector is not None
    assert sum(value * value for value in found.vector) == pytest.approx(1)
    (call,) = services.adapters[BGE.id].calls  # type: ignore[attr-defined]
    assert (call.operation, call.body["input"]) == (Operation.EMBEDDING, ["hello"])
    await embedding.aclose()


@pytest.mark.parametrize(
    ("drops", "reason"),
    [
        ([("filter.policy", Drop(BGE, "not cleared"))], "not allowed"),
        ([("filter.health", Drop(BGE, "down"))], ""),
    ],
)
async def test_it_is_asked_only_for_what_the_filters_let_it_have(drops: Any, reason: str) -> None:
    """Health is no matter of permission."""
    services = fleet(BGE, adapters={BGE.id: FakeAdapter(endpoint=BGE.endpoint, model_id="bge")}, drops=drops)
    embedding = EmbeddingClassifier(model="bge")
    embedding.provision(services)
    found = (await embedding.classify(context(messages=[user("hello")])))[EMBEDDING]
    assert found.reason == reason


@pytest.mark.parametrize("body", [b"", b"{}", b'{"data": [{"embedding": "x"}]}', b'{"data": []}', b"not json"])
async def test_a_broken_model_holds_nobody_up(body: bytes) -> None:
    """The reason is told, and the route goes on."""
    services = fleet(BGE, adapters={BGE.id: Broken(endpoint=BGE.endpoint, model_id="bge", body=body)})
    embedding = EmbeddingClassifier(model="bge")
    embedding.provision(services)
    assert (await embedding.classify(context(messages=[user("hello")])))[EMBEDDING].reason == "failed"


async def test_a_healthy_replica_is_asked_first() -> None:
    """One that is down only if there is no other."""
    other = model("bge", "http://other", provider="vllm", capabilities=BGE.capabilities)
    adapters = {one.id: FakeAdapter(endpoint=one.endpoint, model_id="bge") for one in (BGE, other)}
    services = fleet(BGE, other, adapters=adapters)
    services.health.update_health(EndpointHealth(endpoint=BGE.endpoint, healthy=False))
    await FleetEmbedder.of("bge", services).make(["hello"])
    assert [len(adapters[one.id].calls) for one in (BGE, other)] == [0, 1]


@pytest.mark.parametrize(
    ("models", "what"),
    [
        ((model("bge", provider="vllm"),), "makes no embeddings"),
        ((attrs.evolve(BGE, provider="openai_compat", endpoint="https://api.example.com"),), "not private"),
        ((), "makes no embeddings"),
    ],
)
def test_a_model_that_must_not_be_asked_is_refused(models: tuple[ModelConfig, ...], what: str) -> None:
    """One of a third party would see every prompt; a chat model makes no vectors."""
    with pytest.raises(ValueError, match=what):
        EmbeddingClassifier(model="bge").provision(fleet(*models))


def test_one_embedder_is_enough() -> None:
    """Two would contradict each other."""
    with pytest.raises(ValueError, match="exclude each other"):
        EmbeddingClassifier(model="bge", embedder="minilm")
