"""What is known of a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.call import Operation
from kvfleet.builtin.facts import MODALITY, PII, PROMPT, PromptFacts, estimate_prompt, prompt_of, prompt_texts
from kvfleet.cache.fingerprints import PromptFingerprinter
from kvfleet.plugin.contract import RouteRequest
from kvfleet.policy.pii import PIIDetectionResult
from kvfleet.router.multimodal import ModalityDetection
from tests.builtin.making import context, user

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {}}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"q": "cat"}'}}]},
    {"role": "tool", "content": "A cat.", "tool_call_id": "1"},
]


ASK = [{"role": "user", "content": "Who are you, and since when?"}]


def test_every_text_of_a_chat_is_read() -> None:
    """System, parts, tool calls' arguments and tool results: personal data may be in any of them."""
    found = list(prompt_texts(Operation.CHAT, {"messages": TALK}))
    assert found == ["Be brief.", "What is it?", '{"q": "cat"}', "A cat."]


@pytest.mark.parametrize(
    ("operation", "body", "texts"),
    [
        (Operation.COMPLETION, {"prompt": "Once", "suffix": "end"}, ["Once", "end"]),
        (Operation.COMPLETION, {"prompt": ["a", "b"]}, ["a", "b"]),
        (Operation.COMPLETION, {"prompt": [1, 2, 3]}, []),
        (Operation.EMBEDDING, {"input": ["a", "b"]}, ["a", "b"]),
        (Operation.RERANK, {"query": "q", "documents": ["a", {"text": "b"}]}, ["q", "a", "b"]),
        (Operation.CHAT, {"messages": ["not a message", None, {"content": 5}]}, []),
        (Operation.CHAT, {}, []),
    ],
)
def test_every_operation_has_its_texts(operation: Operation, body: dict[str, Any], texts: list[str]) -> None:
    """Wherever the operation keeps them; strange shapes have none."""
    assert list(prompt_texts(operation, body)) == texts


@pytest.mark.parametrize(
    ("operation", "body", "tokens"),
    [
        (Operation.CHAT, {"messages": [user("x" * 400), user("y" * 40)]}, 110),
        (Operation.CHAT, {"messages": TALK}, 3 + 3 + 3 + 2),
        (Operation.CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": TALK[2]["tool_calls"]}]}, 3),
        (Operation.CHAT, {}, 0),
        (Operation.COMPLETION, {"prompt": [11, 12, 13]}, 3),
        (Operation.COMPLETION, {"prompt": [[11, 12], [13]]}, 3),
        (Operation.COMPLETION, {"prompt": ["abcd", "efgh"]}, 2),
        (Operation.EMBEDDING, {"input": [1, 2, 3, 4]}, 4),
        (Operation.RERANK, {"query": "abcd", "documents": ["efgh"]}, 2),
    ],
)
def test_tokens_are_estimated_and_given_ones_counted(operation: Operation, body: dict[str, Any], tokens: int) -> None:
    """A quarter of the bytes of every text; token ids as they are."""
    assert estimate_prompt(operation, body) == tokens


def test_tools_are_a_part_of_the_prompt() -> None:
    """As long as in the blocks that are looked for in caches: an agent's tools are often longer than its messages."""
    tool = {"type": "function", "function": {"name": "look", "description": "It looks. " * 400, "parameters": {}}}
    alone, body = {"messages": ASK}, {"messages": ASK, "tools": [tool, tool]}
    facts = PromptFacts(estimate_prompt(Operation.CHAT, body), body=body)
    assert facts.token_estimate == pytest.approx(facts.blocks(0, 64).tokens, rel=0.01)
    assert facts.token_estimate > 100 * estimate_prompt(Operation.CHAT, alone)
    assert estimate_prompt(Operation.CHAT, {"messages": ASK, "functions": [tool["function"]]}) > 1000


def test_a_conversation_names_itself() -> None:
    """By a header, or by OpenAI's own parameter; the header wins."""
    body = {"messages": [], "prompt_cache_key": "key"}
    assert PromptFacts.of(RouteRequest(body=body)).session == "key"
    assert PromptFacts.of(RouteRequest(body=body, session="header")).session == "header"
    assert PromptFacts.of(RouteRequest(body={"messages": []})).session == ""


def test_text_and_fingerprint_are_made_once() -> None:
    """And only when somebody asks."""
    facts = PromptFacts.of(RouteRequest(body={"messages": TALK}))
    assert facts.text == 'Be brief.\nWhat is it?\n{"q": "cat"}\nA cat.'
    assert facts.text is facts.text
    assert facts.fingerprint is facts.fingerprint
    assert list(facts.texts()) == facts.text.split("\n")


@pytest.mark.parametrize("looks_first", [False, True])
def test_a_prompt_that_is_counted(*, looks_first: bool) -> None:
    """Has the same blocks, each its share of the tokens, whether they were looked at before or not."""
    request = RouteRequest(body={"messages": [{"role": "system", "content": "You are terse. " * 20}, *ASK]})
    plain, counted = PromptFacts.of(request), PromptFacts.of(request)
    if looks_first:
        counted.blocks(0, 64)
    counted.counted(2 * plain.blocks(0, 64).tokens)
    one, other = plain.blocks(0, 64), counted.blocks(0, 64)
    assert (other.hashes, other.ends) == (one.hashes, one.ends)
    assert (other.tokens, other.block_tokens) == (2 * one.tokens, 2 * one.block_tokens)
    assert list(other.marks) == [(mark, 2 * tokens) for mark, tokens in one.marks]
    assert counted.token_estimate == other.tokens


def test_a_stage_can_use_a_fingerprinter_of_its_own() -> None:
    """Another distance gives other marks, and the last one made is kept."""
    facts = PromptFacts.of(RouteRequest(body={"messages": [user("x" * 4000)]}))
    short = PromptFingerprinter(prefix_tokens=8)
    assert len(facts.fingerprint_by(short).marks) > len(facts.fingerprint.marks)
    assert facts.fingerprint_by(short) is facts.fingerprint_by(short)


def test_plain_prompts_have_fingerprints_too() -> None:
    """Text completion is recognised by its beginning."""
    facts = PromptFacts.of(RouteRequest(operation=Operation.COMPLETION, body={"prompt": "Once upon a time"}))
    assert facts.fingerprint == PromptFingerprinter().fingerprint_text("Once upon a time")


def test_no_text_is_shown() -> None:
    """Neither a repr nor what the trace shows of a fact holds any of the prompt."""
    facts = PromptFacts.of(RouteRequest(body={"messages": [user("my secret")]}, session="private"))
    assert repr(facts) == "PromptFacts(token_estimate=3)"
    assert PROMPT.describe(facts) == "about 3 tokens"
    assert MODALITY.describe(ModalityDetection(has_images=True)) == "vision"
    assert PII.describe(PIIDetectionResult(["email", "ssn"])) == ("email", "ssn")


def test_the_classifiers_fact_is_used_if_there_is_one() -> None:
    """Otherwise the facts are made on the spot."""
    ctx = context(messages=[user("abcd")])
    assert prompt_of(ctx) is ctx.fact(PROMPT)
    assert prompt_of(context(messages=[user("abcd")], facts=False)).token_estimate == 1
