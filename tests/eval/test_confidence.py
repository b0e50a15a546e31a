"""How far an answer can be trusted, from itself alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.base import ChatResponse
from kvfleet.eval.confidence import (
    Signs,
    confidence_of,
    logprobs_of,
    percentile_probability,
    typical_probability,
)

LOGPROBS = st.lists(st.floats(min_value=-50, max_value=0), min_size=1, max_size=50)


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "I do not know the answer to that.",
        "I\u2019m not sure, but it may be Rome.",
        "I'm sorry, but I can't help with that.",
        "Unfortunately, I cannot answer this question.",
        "I don't have enough information to say.",
        "As an AI language model, I cannot browse the web.",
        "I am unable to determine the year.",
    ],
)
def test_an_answer_that_says_it_is_none(text: str) -> None:
    """In several ways, with either apostrophe."""
    assert Signs().grade(text, "stop") == (0.1, "it says that it has no answer")


@pytest.mark.parametrize(
    "text",
    [
        "Paris.",
        "The unknown soldier rests there.",
        "They do not know each other.",
        "You can help by donating.",
        f"{'It is a long story. ' * 30}At the end the hero says: I don't know.",
    ],
)
def test_an_answer_that_is_one(text: str) -> None:
    """Words alone do not make a refusal, and far into an answer they belong to it."""
    assert Signs().grade(text, "stop") == (1.0, "nothing speaks against it")


@pytest.mark.parametrize(
    ("text", "reason", "more", "expected"),
    [
        ("", "stop", {}, (0.0, "it is empty")),
        ("  \n", "stop", {}, (0.0, "it is empty")),
        ("", "tool_calls", {"calls_tool": True}, (1.0, "nothing speaks against it")),
        ("", None, {"is_whole": False}, (1.0, "nothing speaks against its beginning")),
        ("Once upon", "length", {}, (0.3, "it was cut off at its longest length")),
        ("I can", "content_filter", {}, (0.1, "it was refused for its content")),
    ],
)
def test_how_it_ended(text: str, reason: str | None, more: dict[str, bool], expected: tuple[float, str]) -> None:
    """Empty, cut off, refused; a call of a tool needs no words, and a beginning may have none yet."""
    assert Signs().grade(text, reason, **more) == expected


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({"logprobs": {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": 0}]}}, [-0.5, 0.0]),
        ({"logprobs": {"tokens": ["a", "b"], "token_logprobs": [None, -1.0]}}, [-1.0]),
        ({"logprobs": None}, []),
        ({}, []),
        ({"logprobs": {"content": [{"logprob": 0.5}, {"logprob": "x"}, 3, {"logprob": True}]}}, []),
    ],
)
def test_both_shapes_of_logprobs_are_read(choice: dict[str, object], found: list[float]) -> None:
    """Chats and completions; what is none is left out."""
    assert list(logprobs_of(choice)) == found


@given(LOGPROBS)
def test_the_mean_lies_between_the_least_and_the_most(values: list[float]) -> None:
    """And does not depend on how often the answer is repeated."""
    mean = typical_probability(values)
    assert math.exp(min(values)) - 1e-9 <= mean <= math.exp(max(values)) + 1e-9
    assert typical_probability(values * 3) == pytest.approx(mean, rel=1e-6, abs=1e-12)


@given(LOGPROBS, st.floats(min_value=0.1, max_value=99.9))
def test_a_percentile_is_one_of_the_tokens(values: list[float], percent: float) -> None:
    """No more than so many percent are below it."""
    value = percentile_probability(values, percent)
    assert any(value == math.exp(one) for one in values)
    below = sum(math.exp(one) < value for one in values)
    assert below <= len(values) * percent / 100


def test_the_default_scorer_takes_the_lesser() -> None:
    """Of its words and its tokens."""
    raw = {"choices": [{"logprobs": {"content": [{"logprob": math.log(0.5)}]}}]}
    assert confidence_of(ChatResponse("Paris.", finish_reason="stop", raw=raw)) == pytest.approx(0.5)
    assert confidence_of(ChatResponse("I don't know.", raw=raw)) == pytest.approx(0.1)
    assert confidence_of(ChatResponse("Paris.")) == 1.0
