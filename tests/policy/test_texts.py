"""Every text of a body, and nothing that is none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.policy.texts import strings_of, texts_beside

FILE = "data:audio/wav;base64," + "UklGRiQAAABXQVZF" * 1000
BODY: dict[str, Any] = {
    "model": "a-model",
    "messages": [
        {"role": "user", "content": "a question", "name": "a name"},
        {"role": "user", "content": [{"type": "text", "text": "a part"}, {"type": "image_url", "image_url": FILE}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": FILE[22:], "format": "wav"}}]},
    ],
    "tools": [{"type": "function", "function": {"name": "look", "description": "a tool"}}],
    "metadata": {"ada@example.com": "a tag"},
    "logit_bias": {"50256": -100},
    "stop": ["stop it"],
    "input": [1, 2, 3],
    "n": 1,
}


def test_what_is_a_text() -> None:
    """Contents, names, tools, tags, keys that hold something; no roles and types, no files, no numbers."""
    assert list(strings_of({name: item for name, item in BODY.items() if name != "model"})) == [
        *("a question", "a name", "a part", "look", "a tool"),
        *("ada@example.com", "a tag", "50256", "stop it"),
    ]


def test_known_texts_are_left_out() -> None:
    """What is looked at anyway is not looked at twice; what is left is one text."""
    known = [BODY["messages"][0]["content"], BODY["messages"][1]["content"][0]["text"]]
    assert texts_beside(known, BODY, {"input": "other words"}).split("\n\x1e\n") == [
        *("a name", "look", "a tool", "ada@example.com", "a tag", "50256", "stop it", "other words"),
    ]
    assert texts_beside([], {"n": 1}) == ""


@given(
    st.recursive(
        st.just("a text"),
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.text(), inner, min_size=1, max_size=3)
        ),
        max_leaves=20,
    ).filter(lambda value: not isinstance(value, str))
)
def test_no_place_hides_a_text(value: Any) -> None:
    """However deep, and under whatever name that is not one of those that only name things."""
    places = str(value).count("a text")
    names = ("model", "role", "type", "object", "format", "encoding_format")
    if not any(repr(name) in str(value) for name in names):
        assert list(strings_of({"body": value})).count("a text") == places


@pytest.mark.parametrize("key", ["role", "type", "object", "format", "encoding_format"])
def test_only_a_name_is_left_out(key: str) -> None:
    """What stands where a name should is a text, if it is none; a bank account's number looks like one but is longer."""
    body = {"a": [{key: "assistant"}, {key: "ada@example.com"}, {key: "NO9386011117947"}, {"model": "123-45-6789"}]}
    assert list(strings_of(body)) == ["ada@example.com", "NO9386011117947", "123-45-6789"]


def test_files_in_known_texts_are_read() -> None:
    """The text is looked at anyway, and what can be read in it here."""
    text = "see data:text/plain;base64,SSBhbSBBZGE= and go on"
    assert texts_beside([text], {"messages": [{"role": "user", "content": text}]}) == "I am Ada"
