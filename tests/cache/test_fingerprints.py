"""Prompts recognised by their beginnings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.adapters.base import ChatMessage
from kvfleet.cache.fingerprints import PromptFingerprint, PromptFingerprinter, estimate_tokens

MAKE = PromptFingerprinter(prefix_tokens=16)
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def user(text: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": text}


def shared(one: PromptFingerprint, two: PromptFingerprint) -> int:
    """Tokens of the longest beginning that both have."""
    known = {value for value, _, _ in one.marks}
    return max((tokens for value, tokens, _ in two.marks if value in known), default=0)


def test_the_same_prompt_has_the_same_fingerprint() -> None:
    """Also across processes and between dicts and message objects."""
    messages = [SYSTEM, user("Write a binary search in Python")]
    objects = [ChatMessage(m["role"], m["content"]) for m in messages]
    found = MAKE.fingerprint(messages)
    assert MAKE.fingerprint(objects) == found
    assert found.full_hash == "05fe736218539d2d"
    assert found.similarity(MAKE.fingerprint(messages)) == 1.0


def test_the_next_turn_begins_with_the_whole_turn_before() -> None:
    """So the second turn of a conversation can be sent where the first one is."""
    first = MAKE.fingerprint([SYSTEM, user("Hello")])
    second = MAKE.fingerprint([SYSTEM, user("Hello"), answer("Hi."), user("And now?")])
    assert first.marks[-1] in second.marks
    assert second.session_key == first.session_key
    assert second.full_hash != first.full_hash


def test_two_questions_under_one_system_prompt_share_it_and_no_more() -> None:
    """The shared beginning ends where the system prompt does."""
    one, two = MAKE.fingerprint([SYSTEM, user("What is a cat?")]), MAKE.fingerprint([SYSTEM, user("What is a dog?")])
    assert shared(one, two) == one.system_tokens == 7
    assert one.system_hash == two.system_hash
    assert one.beginning == two.beginning
    assert one.session_key != two.session_key


def test_another_system_prompt_shares_nothing() -> None:
    """What comes after does not matter: a KV cache is a cache of beginnings."""
    one = MAKE.fingerprint([{"role": "system", "content": "You are A."}, user("The same question")])
    two = MAKE.fingerprint([{"role": "system", "content": "You are B."}, user("The same question")])
    assert shared(one, two) == 0
    assert one.conversation_hash == two.conversation_hash
    assert one.similarity(two) == pytest.approx(0.2)


def test_long_messages_share_their_beginning() -> None:
    """A long document with different questions after it shares marks at fixed distances."""
    document = "All work and no play makes Jack a dull boy. " * 100
    one, two = MAKE.fingerprint([user(document + "Who?")]), MAKE.fingerprint([user(document + "Why? Tell me.")])
    assert shared(one, two) == 1024
    assert one.prefix_key == two.prefix_key


def test_plain_prompts_share_their_beginning_too() -> None:
    """Text completion has no messages, and the same marks."""
    text = "def binary_search(items, wanted):\n" * 20
    one, two = MAKE.fingerprint_text(text + "a"), MAKE.fingerprint_text(text + "bcd")
    assert shared(one, two) == 64
    assert one.prefix_hash == two.prefix_hash


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([user("Hello")], [user("hello")]),
        ([user("a b")], [user("a  b")]),
        ([user("ab"), user("c")], [user("a"), user("bc")]),
        ([user("x")], [answer("x")]),
        ([user("x")], [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "file", "file": {}}]}]),
    ],
)
def test_what_a_kv_cache_tells_apart_is_told_apart(one: list[Any], two: list[Any]) -> None:
    """Case, spaces, message borders, roles and attachments all make another prompt."""
    assert MAKE.fingerprint(one).full_hash != MAKE.fingerprint(two).full_hash


def test_tools_come_before_everything() -> None:
    """Chat templates put tools at the start, so other tools share nothing."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert shared(MAKE.fingerprint([SYSTEM], tools=tools), MAKE.fingerprint([SYSTEM])) == 0
    assert MAKE.fingerprint([SYSTEM], tools=tools) == MAKE.fingerprint([SYSTEM], tools=list(tools))


def test_pictures_are_told_apart_and_count_no_text() -> None:
    """Two pictures make two prompts; their bytes are not tokens of text."""

    def picture(data: str) -> list[dict[str, Any]]:
        url = f"data:image/png;base64,{data}"
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]

    one, two = MAKE.fingerprint(picture("A" * 500_000)), MAKE.fingerprint(picture("A" * 499_999 + "B"))
    assert one.full_hash != two.full_hash
    assert one.token_estimate == 0


def test_tool_calls_belong_to_the_prompt() -> None:
    """An assistant's message without text still differs by its calls."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"arguments": "{}"}}]}
    other = {**call, "tool_calls": [{"id": "1", "function": {"arguments": '{"a":1}'}}]}
    assert MAKE.fingerprint([user("x"), call]).full_hash != MAKE.fingerprint([user("x"), other]).full_hash


def test_strange_texts_are_no_error() -> None:
    """A lone surrogate, as Python strings may hold, has a fingerprint like any text."""
    messages = [user("\ud800"), {"role": "user", "content": [{"type": "x", "x": "\ud800"}]}, {"role": "user"}]
    assert MAKE.fingerprint(messages).full_hash
    assert MAKE.fingerprint_text("\ud800").token_estimate == 1


def test_tokens_are_estimated_from_bytes() -> None:
    """Four bytes a token: English as usual, and scripts of three bytes a letter at three quarters of a token each."""
    assert estimate_tokens("") == 0
    assert estimate_tokens("abcd") == 1
    assert estimate_tokens("abcde") == 2
    assert estimate_tokens("日本語日") == 3
    assert MAKE.fingerprint([SYSTEM, user("Hello")]).token_estimate == 9


def test_no_text_can_be_read_from_a_fingerprint() -> None:
    """Its repr shows hashes and numbers."""
    found = repr(MAKE.fingerprint([SYSTEM, user("my secret")]))
    assert "secret" not in found
    assert "helpful" not in found


def test_marks_grow_and_tell_answers() -> None:
    """Marks go from short to long, end with the whole prompt, and those within an answer say so."""
    found = MAKE.fingerprint([SYSTEM, user("Hello"), answer("x" * 300), user("?")])
    sizes = [tokens for _, tokens, _ in found.marks]
    assert sizes == sorted(sizes)
    assert f"{found.marks[-1][0]:016x}" == found.full_hash
    assert [is_answer for _, _, is_answer in found.marks] == [False, False, True, True, True, False]


texts = st.text(max_size=200)
talks = st.lists(st.builds(lambda r, t: {"role": r, "content": t}, st.sampled_from(["user", "assistant"]), texts))


@settings(deadline=None)
@given(talks, talks)
def test_every_beginning_of_a_talk_is_a_mark_of_it(talk: list[Any], more: list[Any]) -> None:
    """Whatever is said later, the talk so far stays recognisable."""
    if talk:
        assert MAKE.fingerprint(talk).marks[-1][0] in {value for value, _, _ in MAKE.fingerprint([*talk, *more]).marks}
