"""Answers from memory."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.call import Operation, Usage
from kvfleet.builtin.answers import ExactCache
from kvfleet.errors import RouteError
from kvfleet.plugin.contract import Answer, RoutingContext
from kvfleet.trace import names
from tests.builtin.making import context, model, outcome, user

A, B = model("a"), model("b")
BODY = b'{"choices":[{"message":{"content":"Four."}}]}'
STREAM = (
    b'data: {"choices":[{"delta":{"content":"Fo"}}]}\n\ndata: {"choices":[{"delta":{"content":"ur."}}]}\n\n'
    b"data: [DONE]\n\n"
)
QUESTION = [user("What is two and two?")]


def ask(**change: Any) -> RoutingContext:
    """The question, or one that differs a little."""
    body = {"temperature": 0, **change.pop("body", {})}
    messages = change.pop("messages", QUESTION)
    return context(change.pop("candidates", (A, B)), messages, body=body, **change)


async def told(cache: ExactCache, ctx: RoutingContext) -> bytes | None:
    """What the cache answers, whole or streamed; None for nothing."""
    answer = await cache.answer(ctx)
    if answer is None:
        return None
    assert answer.served_by is None
    if answer.reply.events is None:
        return answer.reply.body
    return b"".join([event async for event in answer.reply.events])


async def filled(ctx: RoutingContext, content: bytes = BODY, **options: Any) -> ExactCache:
    """A cache that has seen one answer."""
    cache = ExactCache(**options)
    await cache.observe(outcome(ctx, A, content=content, usage=Usage(10, 2)))
    return cache


async def test_the_same_request_gets_the_same_answer() -> None:
    """Byte for byte, with its usage."""
    cache = await filled(ask())
    assert await told(cache, ask()) == BODY
    answer = await cache.answer(ask())
    assert isinstance(answer, Answer)
    assert answer.reply.tally.usage == Usage(10, 2)
    assert cache.state() == {"answers": 1, "bytes": len(BODY), "hits": 2, "misses": 0}


async def test_a_stream_is_given_as_a_stream() -> None:
    """Event by event, and to its end."""
    cache = await filled(ask(stream=True), STREAM)
    answer = await cache.answer(ask(stream=True))
    assert answer is not None
    assert answer.reply.events is not None
    events = [event async for event in answer.reply.events]
    assert b"".join(events) == STREAM
    assert (len(events), answer.reply.tally.is_complete) == (3, True)
    assert await told(cache, ask()) is None


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [user("What is two and three?")]},
        {"messages": [user("what is two and two?")]},
        {"messages": [{"role": "system", "content": "Lie."}, *QUESTION]},
        {"body": {"max_tokens": 5}},
        {"body": {"top_p": 0.5}},
        {"body": {"seed": 1}},
        {"body": {"stop": ["."]}},
        {"body": {"tools": [{}]}},
        {"body": {"response_format": {"type": "json_object"}}},
        {"body": {"some_new_parameter": True}},
        {"tenant": "other"},
        {"data_class": "public"},
        {"model": "a"},
        {"models": frozenset({"b"})},
        {"strategy": "cost_first"},
        {"stream": True},
        {"operation": Operation.COMPLETION},
    ],
)
async def test_whatever_changes_an_answer_makes_another_question(change: dict[str, Any]) -> None:
    """Every parameter, known or not; tenant, data class, model. Nobody reads another tenant's answers."""
    cache = await filled(ask())
    assert await told(cache, ask(**change)) is None


@pytest.mark.parametrize("field", ["user", "metadata", "prompt_cache_key"])
async def test_what_changes_no_answer_makes_no_difference(field: str) -> None:
    """Who books the request does not matter to the answer."""
    cache = await filled(ask(body={field: "x"}))
    assert await told(cache, ask()) == BODY


async def test_what_is_left_to_chance_is_not_kept() -> None:
    """Only temperature 0, unless the operator wants otherwise."""
    for temperature in ({"temperature": 0.7}, {"temperature": None}):
        assert await told(await filled(ask(body=temperature)), ask(body=temperature)) is None
        cache = await filled(ask(body=temperature), any_temperature=True)
        assert await told(cache, ask(body=temperature)) == BODY


async def test_embeddings_leave_nothing_to_chance() -> None:
    """They have no temperature."""
    ctx = context((A,), operation=Operation.EMBEDDING, body={"input": "x"})
    assert await told(await filled(ctx), ctx) == BODY


async def test_a_kept_answer_obeys_the_filters() -> None:
    """If its model is no candidate any more, say by policy, it is not given."""
    cache = await filled(ask())
    assert await told(cache, ask(candidates=(B,))) is None
    assert await told(cache, ask(candidates=(A,))) == BODY


async def test_answers_age() -> None:
    """After its time an answer is not given."""
    cache = await filled(ask(now_s=1000.0), ttl_s=60)
    assert await told(cache, ask(now_s=1060.0)) == BODY
    assert await told(cache, ask(now_s=1060.1)) is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, {"error": RouteError("broke off")}),
        ({}, {"served_by": None}),
        ({}, {"content": b""}),
        ({}, {"content": b"x" * 2000}),
        ({"stream": True}, {"content": STREAM.removesuffix(b"data: [DONE]\n\n")}),
    ],
)
async def test_only_whole_answers_of_backends_are_kept(change: dict[str, Any], what: dict[str, Any]) -> None:
    """Not errors, not other short-circuit answers, not what was too large, not a stream without its end."""
    cache = ExactCache(max_answer_bytes=1000)
    what = {"served_by": A, "content": BODY, **what}
    await cache.observe(outcome(ask(**change), what.pop("served_by"), **what))
    assert cache.state()["answers"] == 0


async def test_memory_is_bounded_and_the_least_used_goes_first() -> None:
    """By bytes, not by count."""
    cache = ExactCache(max_megabytes=0.001)
    for i in range(3):
        await cache.observe(outcome(ask(body={"seed": i}), A, content=b"x" * 400))
        assert await told(cache, ask(body={"seed": 0}))
    assert await told(cache, ask(body={"seed": 1})) is None
    assert await told(cache, ask(body={"seed": 2}))
    assert cache.state()["bytes"] == 800


async def test_an_answer_given_again_is_kept_once() -> None:
    """The new one replaces the old, in the books too."""
    cache = await filled(ask())
    await cache.observe(outcome(ask(), A, content=BODY + b" "))
    assert cache.state()["bytes"] == len(BODY) + 1
    assert await told(cache, ask()) == BODY + b" "


async def test_a_dry_run_looks_and_counts_nothing() -> None:
    """It shows whether there is an answer."""
    cache = await filled(ask())
    assert await told(cache, ask(dry_run=True)) == BODY
    assert (cache.state()["hits"], cache.state()["misses"]) == (0, 0)


async def test_no_content_is_shown() -> None:
    """Neither in its state nor in its repr."""
    cache = await filled(ask())
    assert "Four" not in repr(cache)
    assert "Four" not in repr(cache.state())


async def test_the_trace_learns_where_an_answer_came_from() -> None:
    """How it was found, how old it is, and what it saved."""
    cache = ExactCache()
    kept = outcome(ask(now_s=1000.0), A, content=BODY, usage=Usage(10, 2), cost_usd=0.25)
    await cache.observe(kept)
    answer = await cache.answer(ask(now_s=1005.0))
    assert answer is not None
    assert answer.details == {
        names.ANSWER_MATCH: "exact",
        names.ANSWER_SIMILARITY: 1.0,
        names.ANSWER_AGE_S: 5.0,
        names.ANSWER_MODEL: "a",
        names.ANSWER_SAVED_PROMPT: 10,
        names.ANSWER_SAVED_COMPLETION: 2,
        names.ANSWER_SAVED_USD: 0.25,
    }


@pytest.mark.parametrize(("said", "keeps", "looks"), [("no-store", False, False), ("No-Cache, max-age=0", True, False)])
async def test_a_client_may_pass_the_memory_by(said: str, keeps: bool, looks: bool) -> None:
    """`Cache-Control` counts: no-cache asks anew and keeps the answer, no-store leaves nothing behind."""
    header = {"condition_headers": {"cache-control": said}}
    assert (await told(await filled(ask(**header)), ask()) is not None) == keeps
    assert (await told(await filled(ask()), ask(**header)) is not None) == looks


async def test_other_tags_make_another_question() -> None:
    """What `auto` means may hang on them."""
    assert await told(await filled(ask()), ask(tags={"domain": "coding"})) is None
