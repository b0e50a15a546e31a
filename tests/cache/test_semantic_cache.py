"""The semantic cache as a library."""

from __future__ import annotations

import threading
from typing import Any

import attrs
import pytest

from kvfleet.cache.fingerprints import PromptFingerprint, PromptFingerprinter
from kvfleet.cache.semantic_cache import CachedResponse, SemanticCache
from kvfleet.clock import FrozenClock

FINGERPRINTER = PromptFingerprinter()
QUESTION = "What is the capital of France?"
SYSTEM = {"role": "system", "content": "Be brief."}


def prompt(*texts: str, tools: Any = None) -> PromptFingerprint:
    """A conversation in which the user speaks first, and every other time."""
    roles = ("user", "assistant")
    return FINGERPRINTER.fingerprint(
        [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], tools=tools
    )


def test_the_page_s_example() -> None:
    """As it is printed."""

    @attrs.frozen
    class Response:
        content: str = "Paris."

    messages, response, selected_model = [{"role": "user", "content": QUESTION}], Response(), "small"
    cache = SemanticCache(max_size=10000, ttl_seconds=3600)
    fingerprinter = PromptFingerprinter()

    fp = fingerprinter.fingerprint(messages)
    assert not cache.get(fp)
    cache.put(fp, response.content, selected_model)

    cached = cache.get(fp)
    assert isinstance(cached, CachedResponse)
    assert (cached.model, cached.content, cached.fingerprint) == ("small", "Paris.", fp)


def test_an_answer_knows_its_story() -> None:
    """When it came, how often it was given, and what was kept with it."""
    clock = FrozenClock()
    cache = SemanticCache(clock=clock)
    cache.put(prompt(QUESTION), "Paris.", "small", metadata={"tokens": 3})
    clock.advance(5)
    cache.get(prompt(QUESTION))
    cached = cache.get(prompt(QUESTION))
    assert cached is not None
    assert (cached.usage_count, cached.metadata, cached.similarity) == (2, {"tokens": 3}, 1.0)
    assert cached.timestamp == clock.time_ns() / 1e9 - 5


def test_prompts_that_begin_alike_are_different_questions() -> None:
    """The same system message and the same first words are not enough."""
    cache = SemanticCache()
    long = "word " * 2000
    cache.put(FINGERPRINTER.fingerprint([SYSTEM, {"role": "user", "content": long + "one"}]), "1", "m")
    assert cache.get(FINGERPRINTER.fingerprint([SYSTEM, {"role": "user", "content": long + "two"}])) is None


def test_another_wording_finds_the_answer() -> None:
    """If the question's text is given on both sides."""
    cache = SemanticCache()
    cache.put(prompt(QUESTION), "Paris.", "small", text=QUESTION)
    other = "what's the capital of france"
    assert cache.get(prompt(other)) is None
    cached = cache.get(prompt(other), other)
    assert cached is not None
    assert (cached.content, cached.similarity) == ("Paris.", 1.0)
    assert cache.stats()["near_hits"] == 1


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (prompt("What is the capital of Spain?"), "What is the capital of Spain?"),
        (prompt("Hi", "Hello", "what's the capital of france"), "what's the capital of france"),
        (FINGERPRINTER.fingerprint([SYSTEM, {"role": "user", "content": "what's the capital of france"}]), QUESTION),
        (
            FINGERPRINTER.fingerprint([SYSTEM, {"role": "user", "content": "what's the capital of france"}]),
            "what's the capital of france",
        ),
        (prompt("what's the capital of france", tools=[{"type": "function"}]), "what's the capital of france"),
        (
            FINGERPRINTER.fingerprint(
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "what's the capital of france"},
                            {"type": "image_url", "image_url": {"url": "http://a/b.png"}},
                        ],
                    }
                ]
            ),
            "what's the capital of france",
        ),
    ],
)
def test_never_another_question_s_answer(asked: PromptFingerprint, text: str) -> None:
    """Other words, another conversation before it, other instructions or tools, a picture beside it."""
    cache = SemanticCache(similarity_threshold=0.0)
    cache.put(prompt(QUESTION), "Paris.", "small", text=QUESTION)
    assert cache.get(asked, text) is None


def test_a_question_is_found_within_its_conversation() -> None:
    """What stands before it must be the same."""
    cache = SemanticCache()
    cache.put(prompt("Hi", "Hello", QUESTION), "Paris.", "m", text=QUESTION)
    other = "What is the capital of France"
    assert cache.get(prompt("Hi", "Hello", other), other)
    assert not cache.get(prompt("Hi", "Hello!", other), other)


def test_scopes_do_not_see_each_other() -> None:
    """Exactly or nearly."""
    cache = SemanticCache()
    cache.put(prompt(QUESTION), "Paris.", "small", text=QUESTION, scope="tenant-a")
    assert cache.get(prompt(QUESTION), QUESTION, scope="tenant-b") is None
    assert cache.get(prompt(QUESTION), QUESTION, scope="tenant-a")


def test_answers_age_and_are_forgotten() -> None:
    """By time, by name, and all of them."""
    clock = FrozenClock()
    cache = SemanticCache(ttl_seconds=10, clock=clock)
    cache.put(prompt(QUESTION), "Paris.", "m", text=QUESTION)
    clock.advance(10.5)
    assert cache.get(prompt(QUESTION), QUESTION) is None
    cache.put(prompt(QUESTION), "Paris.", "m")
    assert (cache.invalidate(prompt(QUESTION)), cache.invalidate(prompt(QUESTION)), cache.size) == (True, False, 0)
    cache.put(prompt(QUESTION), "Paris.", "m")
    cache.clear()
    assert cache.get(prompt(QUESTION)) is None


def test_it_is_bounded() -> None:
    """By count and by bytes; the least recently used go first."""
    cache = SemanticCache(max_size=3, max_bytes=100)
    for i in range(5):
        cache.put(prompt(f"question {i}"), "x" * 40, "m")
        cache.get(prompt("question 0"))
    assert cache.get(prompt("question 0"))
    assert (cache.size, cache.stats()["bytes"]) == (2, 80)
    for i in range(5):
        cache.put(prompt(f"question {i}"), "x", "m")
    assert cache.size == 3


def test_its_numbers_add_up() -> None:
    """Hits, misses, and their share."""
    cache = SemanticCache()
    cache.get(prompt(QUESTION))
    cache.put(prompt(QUESTION), "Paris.", "m")
    cache.get(prompt(QUESTION))
    told = {"hits": 1, "near_hits": 0, "misses": 1, "hit_rate": 0.5, "size": 1, "max_size": 10_000, "bytes": 6}
    assert cache.stats() == told


@pytest.mark.parametrize("wrong", [{"max_size": 0}, {"ttl_seconds": 0}, {"similarity_threshold": 1.1}])
def test_bounds_that_keep_nothing_are_refused(wrong: dict[str, float]) -> None:
    """At once, not by a cache that is always empty."""
    with pytest.raises(ValueError, match="above 0"):
        SemanticCache(**wrong)  # type: ignore[arg-type]


def test_threads_may_share_it() -> None:
    """The books stay right."""
    cache = SemanticCache(max_size=50)

    def work(name: str) -> None:
        for i in range(200):
            cache.put(prompt(f"{name} {i % 70}"), "x", "m", text=f"{name} {i % 70}")
            cache.get(prompt(f"{name} {i % 60}"), f"{name} {i % 60}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    assert (stats["hits"] + stats["misses"], cache.size, stats["bytes"]) == (800, 50, 50)


def test_nothing_is_shown_of_an_answer() -> None:
    """Neither by the cache nor by what it gives."""
    cache = SemanticCache()
    cache.put(prompt(QUESTION), "Paris.", "m", text=QUESTION)
    assert "Paris" not in repr(cache) + repr(cache.get(prompt(QUESTION)))
