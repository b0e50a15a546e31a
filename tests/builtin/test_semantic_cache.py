"""The semantic cache as a stage, and through a running gateway."""

from __future__ import annotations

import asyncio
import json
import sys
from types import ModuleType
from typing import Any

import httpx
import pytest

from kvfleet.adapters.call import Operation, Usage
from kvfleet.builtin.semantic_cache import SemanticAnswers
from kvfleet.config.schema import FleetConfig, ModelConfig, SemanticCacheConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.errors import ComponentError
from kvfleet.gateway.server import running
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Answer, RoutingContext
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.render import render
from kvfleet.trace.spans import Trace
from tests.builtin.making import context, model, outcome, user

A, B = model("a"), model("b")
QUESTION, ALIKE, OTHER = (
    "What is the capital of France?",
    "what's the capital of france",
    "What is the capital of Spain?",
)


def whole(*, end: str = "stop", **message: Any) -> bytes:
    """An answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "Paris.", **message}, "finish_reason": end}
    return json.dumps({"choices": [choice]}).encode()


def streamed(*deltas: dict[str, Any], end: str | None = "stop", done: bool = True) -> bytes:
    """A streamed answer."""
    last = {"index": 0, "delta": {}, "finish_reason": end}
    choices = [*[{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas], last]
    events = [json.dumps({"choices": [choice]}) for choice in choices] + ["[DONE]"] * done
    return "".join(f"data: {event}\n\n" for event in events).encode()


def ask(text: str = QUESTION, **change: Any) -> RoutingContext:
    """A question, or one that differs a little."""
    body = {"temperature": 0, **change.pop("body", {})}
    before = change.pop("before", [])
    return context(change.pop("candidates", (A, B)), [*before, user(text)], body=body, **change)


async def filled(ctx: RoutingContext, content: bytes = b"", **options: Any) -> SemanticAnswers:
    """A stage that has seen one answer."""
    stage = SemanticAnswers(**options)
    await stage.observe(outcome(ctx, A, content=content or whole(), usage=Usage(10, 2)))
    return stage


async def test_the_same_request_and_another_form_are_answered() -> None:
    """The one exactly, the other nearly."""
    stage = await filled(ask())
    exact, near = await stage.answer(ask()), await stage.answer(ask(ALIKE))
    assert isinstance(exact, Answer)
    assert isinstance(near, Answer)
    assert exact.reply.body == near.reply.body == whole()
    assert [answer.details[names.ANSWER_MATCH] for answer in (exact, near)] == ["exact", "near"]
    assert stage.state() == {"answers": 1, "bytes": len(whole()), "hits": 2, "misses": 0, "near_hits": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"before": [{"role": "system", "content": "Lie."}]},
        {"body": {"max_tokens": 5}},
        {"body": {"top_p": 0.5}},
        {"body": {"response_format": {"type": "json_object"}}},
        {"body": {"some_new_parameter": True}},
        {"tenant": "other"},
        {"data_class": "public"},
        {"model": "a"},
        {"models": frozenset({"b"})},
        {"strategy": "cost_first"},
        {"tags": {"domain": "coding"}},
        {"stream": True},
        {"candidates": (B,)},
        {"body": {"tools": [{"type": "function"}]}},
        {"body": {"temperature": 0.5}},
        {"condition_headers": {"cache-control": "no-cache"}},
    ],
)
@pytest.mark.parametrize("text", [QUESTION, ALIKE])
async def test_everything_but_the_question_must_be_the_same(change: dict[str, Any], text: str) -> None:
    """However alike the questions are: tenant, data class, model, parameters, what stands before; and policy holds."""
    assert await (await filled(ask())).answer(ask(text, **change)) is None


async def test_another_question_is_not_answered() -> None:
    """Even at a threshold of 0."""
    assert await (await filled(ask(), similarity_threshold=0.0)).answer(ask(OTHER)) is None


async def test_only_the_last_question_may_differ() -> None:
    """An earlier turn in another form is another conversation."""
    turns = [user("Hello there"), {"role": "assistant", "content": "Hi."}]
    stage = await filled(ask(before=turns))
    assert await stage.answer(ask(ALIKE, before=turns)) is not None
    assert await stage.answer(ask(ALIKE, before=[user("hello there"), turns[1]])) is None


@pytest.mark.parametrize(
    "content",
    [
        whole(end="length"),
        whole(end="content_filter"),
        whole(end="tool_calls", content=None, tool_calls=[{"id": "1"}]),
        whole(function_call={"name": "f"}),
        b'{"error": {"message": "no"}, "choices": []}',
        b'{"choices": []}',
        b"not JSON",
        b"[]",
    ],
)
async def test_only_whole_answers_in_words_are_kept(content: bytes) -> None:
    """No tool calls, nothing cut off or filtered, no errors, nothing else."""
    assert (await filled(ask(), content)).state()["answers"] == 0


@pytest.mark.parametrize(
    ("content", "is_kept"),
    [
        (streamed({"content": "Par"}, {"content": "is."}), True),
        (streamed({"content": "Par"}, end="length"), False),
        (streamed({"content": "Par"}, end=None), False),
        (streamed({"content": "Par"}, done=False), False),
        (streamed({"tool_calls": [{"index": 0}]}), False),
        (b"data: {oops\n\ndata: [DONE]\n\n", False),
    ],
)
async def test_the_same_holds_for_streams(content: bytes, is_kept: bool) -> None:
    """A kept stream is given event by event."""
    stage = await filled(ask(stream=True), content)
    answer = await stage.answer(ask(ALIKE, stream=True))
    assert (answer is not None) == is_kept
    if answer is not None:
        assert answer.reply.events is not None
        assert b"".join([event async for event in answer.reply.events]) == content


async def test_a_completion_is_found_by_its_very_prompt_alone() -> None:
    """Its form is what goes on."""
    ask_for = {"operation": Operation.COMPLETION}
    kept = context((A,), body={"prompt": "Once upon a time", "temperature": 0}, **ask_for)
    stage = await filled(kept, json.dumps({"choices": [{"text": " x", "finish_reason": "stop"}]}).encode())
    assert await stage.answer(kept) is not None
    assert await stage.answer(context((A,), body={"prompt": "once upon a time", "temperature": 0}, **ask_for)) is None


async def test_a_single_text_part_is_a_question_too_and_a_picture_is_not() -> None:
    """Pictures make their request findable by itself alone."""
    stage = await filled(ask())
    part = {"type": "text", "text": ALIKE}
    image = {"type": "image_url", "image_url": {"url": "http://a/b.png"}}
    for parts, is_found in (([part], True), ([part, image], False), ([image], False)):
        ctx = context((A,), [{"role": "user", "content": parts}], body={"temperature": 0})
        assert (await stage.answer(ctx) is not None) == is_found


@pytest.mark.parametrize("messages", [None, [], ["x"], [{"role": "user"}], [{"role": "user", "content": [7]}]])
async def test_malformed_bodies_are_the_engine_s_to_refuse(messages: Any) -> None:
    """The stage finds nothing, and does not stumble."""
    stage = await filled(ask())
    assert await stage.answer(context((A,), body={"messages": messages, "temperature": 0})) is None


async def test_it_is_bounded_by_count() -> None:
    """The least recently used goes."""
    stage = SemanticAnswers(max_size=2)
    for i in range(3):
        await stage.observe(outcome(ask(f"what is {i}"), A, content=whole()))
    assert stage.state()["answers"] == 2
    assert await stage.answer(ask("what is 0")) is None


async def test_a_dry_run_counts_nothing() -> None:
    """It shows what would be found."""
    stage = await filled(ask())
    assert await stage.answer(ask(ALIKE, dry_run=True)) is not None
    assert await stage.answer(ask(OTHER, dry_run=True)) is None
    assert (stage.state()["hits"], stage.state()["misses"], stage.state()["near_hits"]) == (0, 0, 0)


@pytest.fixture
def embedders() -> Any:
    """A module with an embedder, as an operator would bring one."""
    module = ModuleType("tests_embedders")
    module.embed = lambda text: [1.0, float("capital" in text.lower())]  # type: ignore[attr-defined]
    module.nothing = 7  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


async def test_an_embedder_finds_other_words(embedders: ModuleType) -> None:
    """And names still must be the same."""
    stage = SemanticAnswers(embedder=f"{embedders.__name__}:embed", similarity_threshold=0.95)
    stage.provision(Services())
    await stage.observe(outcome(ask("What is the capital of France?"), A, content=whole()))
    near = await stage.answer(ask("Which city is the capital of France?"))
    assert near is not None
    assert near.details[names.ANSWER_MATCH] == "near"
    assert await stage.answer(ask("Which city is the capital of Spain?")) is None
    assert await stage.answer(ask("Which city is largest in France?")) is None


@pytest.mark.parametrize("place", ["no_such_module_here:embed", "json:no_such", "json", "tests_embedders:nothing"])
def test_an_embedder_that_is_not_there_is_named(place: str, embedders: ModuleType) -> None:
    """Before the first request."""
    with pytest.raises(ComponentError, match=place):
        SemanticAnswers(embedder=place).provision(Services())


class Sink:
    """Keeps finished traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


async def test_through_a_running_gateway() -> None:
    """Header, trace, metrics and savings of a miss, a hit, a near hit, a stream, and a client that passes it by."""
    priced = ModelConfig(name="m", endpoint="http://m", cost_per_1k_input_tokens=1.0, cost_per_1k_output_tokens=2.0)
    config = FleetConfig(
        models=(priced,),
        semantic_cache=SemanticCacheConfig(enabled=True),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    adapter, sink = FakeAdapter(model_id="m", script=FakeReply(text="Paris.")), Sink()
    router = Router(config, adapters={priced.id: adapter}, sinks=(sink,), polls=False)
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:

        async def post(text: str, *, stream: bool = False, **headers: str) -> httpx.Response:
            body = {"messages": [user(text)], "temperature": 0, "stream": stream}
            answer = await client.post("/v1/chat/completions", json=body, headers=headers)
            async with asyncio.timeout(5):
                await serving.router.settled()
            return answer

        first, same, alike, other = [await post(text) for text in (QUESTION, QUESTION, ALIKE, OTHER)]
        assert [a.headers["x-kvfleet-cache"] for a in (first, same, alike, other)] == ["miss", "hit", "near", "miss"]
        assert _but_for_id(first) == _but_for_id(same) == _but_for_id(alike)
        streams = [await post(QUESTION, stream=True) for _ in range(2)]
        assert _but_for_id(streams[0]) == _but_for_id(streams[1])
        assert streams[1].headers["content-type"].startswith("text/event-stream")
        assert streams[1].headers["x-kvfleet-cache"] == "hit"
        fresh = await post(QUESTION, **{"Cache-Control": "no-cache"})
        assert fresh.headers["x-kvfleet-cache"] == "miss"
        metrics = (await client.get("/metrics")).text
    explanation = Explanation(sink.traces[2])
    stage = next(stage for stage in explanation.stages if stage.key == "answer.semantic_cache")
    assert (explanation.outcome, stage.match, stage.similarity) == ("cached", "near", 1.0)
    assert stage.to_dict()["match"] == "near"
    assert "near, similarity 1.00" in render(explanation)
    usage = first.json()["usage"]
    key = 'stage="answer.semantic_cache"'
    assert f'kvfleet_answer_hits_total{{match="exact",{key}}} 2.0' in metrics
    assert f'kvfleet_answer_hits_total{{match="near",{key}}} 1.0' in metrics
    saved = (usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1000
    line = next(line for line in metrics.splitlines() if line.startswith("kvfleet_answer_saved_usd_total{"))
    assert float(line.split()[-1]) == pytest.approx(3 * saved)
    assert len(adapter.calls) == 4


def _but_for_id(answer: httpx.Response) -> bytes:
    """An answer's bytes, with nothing in the place of the request's identifier, which differs each time."""
    name = answer.headers["x-request-id"].encode()
    assert name in answer.content
    return answer.content.replace(name, b"")
