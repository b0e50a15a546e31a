"""Recognising events that say nothing but a text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.plain import MOST_LESSONS, PlainEvents


def event(text: str, **fields: object) -> bytes:
    """One chat event."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return f"data: {json.dumps({'id': 'a', 'choices': [choice], **fields})}\n\n".encode()


FIELDS = st.dictionaries(st.sampled_from(["usage", "error", "x"]), st.text(max_size=3) | st.none(), max_size=2)


@given(st.text(max_size=12), st.text(max_size=12), FIELDS)
def test_what_fits_differs_in_its_text_alone(first: str, second: str, fields: dict[str, object]) -> None:
    """Whatever the texts: an event that fits is the same as the first one but for its text."""
    plain = PlainEvents()
    plain.learn(event(first))
    other = event(second, **fields)
    assert plain.fits(other) is (not fields and '"' not in second)


@pytest.mark.parametrize(
    "piece",
    [
        event("b") + event("c"),
        event("b")[:-1],
        event('say "x"'),
        b"",
        b"data: [DONE]\n\n",
        event("a").replace(b"null", b'"stop"'),
        b'data: {"id": "a", "choices": [{"index": 0, "delta": {"content": "}\n\n',
    ],
)
def test_everything_else_does_not_fit(piece: bytes) -> None:
    """Several events at a time, cut ones, and those with something else in them are looked at."""
    plain = PlainEvents()
    assert not plain.fits(event("a"))
    plain.learn(event("a"))
    assert plain.fits(event("a"))
    assert not plain.fits(piece)


def test_it_gives_up_where_frames_change() -> None:
    """A stream whose every event is different is not learned from for ever."""
    plain = PlainEvents()
    for index in range(MOST_LESSONS + 1):
        plain.learn(event("a", n=index))
    assert plain.fits(event("b", n=MOST_LESSONS - 1))
    assert not plain.fits(event("b", n=MOST_LESSONS))


def test_an_event_without_a_text_teaches_nothing() -> None:
    """The frame of the last one with a text stays."""
    plain = PlainEvents()
    plain.learn(event("a"))
    plain.learn(b'data: {"choices":[]}\n\n')
    assert plain.fits(event("b"))
