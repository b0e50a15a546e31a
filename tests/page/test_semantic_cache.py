"""Semantic Dedup Cache."""

from __future__ import annotations

import textwrap

import attrs

from kvfleet.adapters.base import ChatMessage
from tests.page.fleets import QUICKSTART
from tests.page.living import live, question
from tests.page.printed import fleet, run

EXAMPLE = """
from kvfleet.cache.semantic_cache import SemanticCache
from kvfleet.cache.fingerprints import PromptFingerprinter

cache = SemanticCache(max_size=10000, ttl_seconds=3600)
fingerprinter = PromptFingerprinter()

# Check cache before routing
fp = fingerprinter.fingerprint(messages)
cached = cache.get(fp)
if cached:
    print(f"Cache hit! Saved a call to {cached.model}")
    return cached.content

# After getting response, cache it
cache.put(fp, response.content, selected_model)
"""

IMPORTS, _, BODY = EXAMPLE.partition("cache = SemanticCache(max_size=10000, ttl_seconds=3600)\n")


@attrs.frozen
class Response:
    """What the page calls `response`."""

    content: str = "Paris."


async def test_the_second_time_it_comes_from_the_cache() -> None:
    """The page's lines are the body of a function, as their `return` says; the cache outlives a call."""
    code = f"{IMPORTS}\ncache = SemanticCache(max_size=10000, ttl_seconds=3600)\ndef ask(messages):\n{textwrap.indent(BODY, '    ')}"
    ran = await run(code, response=Response(), selected_model="llama-3-8b")
    messages = [ChatMessage("user", "What is the capital of France?")]
    ask = ran["ask"]
    again = "print(ask(messages)); print(ask(messages)); print(ask(other))"
    printed = await run(again, ask=ask, messages=messages, other=[ChatMessage("user", "What is the capital of Peru?")])
    assert printed.lines == ["None", "Cache hit! Saved a call to llama-3-8b", "Paris.", "None"]


async def test_a_live_question_is_answered_once() -> None:
    """By its own engine the first time, and from memory afterwards, with the words of the trace."""
    cached = "semantic_cache: {enabled: true}\n"
    async with live(fleet(QUICKSTART, cached)) as gateway:
        body = question("What is the capital of France?", temperature=0)
        first, again, other = [
            await gateway.ask(asked)
            for asked in (body, question("what is the capital of France", temperature=0), question("What is the capital of Peru?", temperature=0))
        ]  # fmt: skip
        assert [answer.headers["x-kvfleet-cache"] for answer in (first, again, other)] == ["miss", "near", "miss"]
        assert again.json()["choices"] == first.json()["choices"]
        assert gateway.asked_of("llama-3-8b") == 2
        outcomes = [trace.route.attributes["kvfleet.outcome"] for trace in gateway.kept.traces]
        assert outcomes == ["answered", "cached", "answered"]
