"""What engines say they counted, in whichever words: a number of tokens, or as if they had said nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.anthropic_wire import usage_of
from kvfleet.adapters.call import MOST_TOKENS, Usage
from kvfleet.adapters.native_wire import response_usage

NUMBERS = st.none() | st.booleans() | st.integers() | st.integers(0, 1000) | st.floats() | st.text(max_size=3)
VALUES = NUMBERS | st.lists(NUMBERS, max_size=2) | st.dictionaries(st.just("a"), NUMBERS)
INWARD = ("cached_tokens", "cache_creation_tokens", "cache_write_tokens")
WORDS: dict[str, tuple[Callable[[Any], Usage | None], tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "chat": (
        Usage.from_openai,
        ("prompt_tokens", "completion_tokens", "total_tokens"),
        (("prompt_tokens_details", INWARD), ("completion_tokens_details", ("reasoning_tokens",))),
    ),
    "responses": (
        response_usage,
        ("input_tokens", "output_tokens"),
        (("input_tokens_details", INWARD), ("output_tokens_details", ("reasoning_tokens",))),
    ),
    "messages": (
        usage_of,
        ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
        (("output_tokens_details", ("thinking_tokens",)),),
    ),
}


@pytest.mark.parametrize("words", WORDS)
@given(data=st.data())
def test_counts_are_counts(words: str, data: st.DataObject) -> None:
    """Whatever stands there, nobody raises, and nothing negative, endless or textual is booked."""
    read, names, details = WORDS[words]
    made = st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(names, VALUES),
            **{name: VALUES | st.dictionaries(st.sampled_from(keys), VALUES) for name, keys in details},
        },
    )
    usage = read(data.draw(made | st.lists(NUMBERS) | NUMBERS))
    if usage is None:
        return
    assert 0 <= usage.prompt_tokens <= 3 * MOST_TOKENS
    assert 0 <= usage.completion_tokens <= MOST_TOKENS
    for part in (usage.cached_tokens, usage.cache_creation_tokens, usage.reasoning_tokens):
        assert part is None or (type(part) is int and 0 <= part <= MOST_TOKENS)
    assert (usage.cached_tokens or 0) <= usage.prompt_tokens


def test_what_cannot_be_is_not_believed() -> None:
    """A wrong count makes all of it unknown; a wrong detail only that detail."""
    assert Usage.from_openai({"prompt_tokens": -300, "completion_tokens": 2}) is None
    assert Usage.from_openai({"prompt_tokens": 3, "completion_tokens": 1e300}) is None
    told = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 900}}
    assert Usage.from_openai(told) == Usage(3, 2, 5)
    assert Usage.from_openai({**told, "prompt_tokens_details": 5, "total_tokens": "x"}) == Usage(3, 2, 5)
