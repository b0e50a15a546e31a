"""Cutting streams into whole events and lines."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.splitters import EventSplitter, LineSplitter, data_of, split_events
from kvfleet.errors import BackendError, Fault

EVENTS = st.lists(
    st.sampled_from(
        [
            b'data: {"a":"b"}\n\n',
            b"data: [DONE]\n\n",
            b": ping\n\n",
            b"event: x\r\ndata: y\r\n\r\n",
            b"id: 1\ndata: a\ndata: b\r\n\n",
            b"\n\n",
            b"data: \xc3\xa4\n\r\n",
        ]
    ),
    max_size=6,
)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """The same bytes in pieces."""
    edges = sorted({0, len(data), *(index % (len(data) + 1) for index in at)})
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


@given(
    EVENTS, st.binary(max_size=5).filter(lambda rest: b"\n" not in rest), st.lists(st.integers(0, 10_000), max_size=8)
)
def test_any_cut_gives_the_same_events(events: list[bytes], rest: bytes, at: list[int]) -> None:
    """However the network cuts the bytes: what comes out are the whole events, and what is left over is held back."""
    splitter = EventSplitter()
    whole = b"".join(events)
    pieces = [splitter.feed(piece) for piece in cut(whole + rest, at)]
    assert b"".join(pieces) + splitter.rest == whole + rest
    assert all(piece.endswith((b"\n\n", b"\n\r\n")) for piece in pieces if piece)
    assert b"\n\n" not in splitter.rest


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"").rstrip(b"\r")), max_size=6), st.data())
def test_any_cut_gives_the_same_lines(lines: list[bytes], data: st.DataObject) -> None:
    """Lines come out without their ends; empty ones are left out; the last one waits for its end."""
    ends = data.draw(st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=len(lines), max_size=len(lines)))
    text = b"".join(line + end for line, end in zip(lines, ends, strict=True)) + b"rest"
    splitter = LineSplitter()
    at = data.draw(st.lists(st.integers(0, 10_000), max_size=8))
    got = [line for piece in cut(text, at) for line in splitter.feed(piece)]
    assert got == [line for line in lines if line]
    assert splitter.rest == b"rest"


@pytest.mark.parametrize("splitter", [EventSplitter(max_bytes=10), LineSplitter(max_bytes=10)])
def test_an_endless_event_is_refused(splitter: EventSplitter | LineSplitter) -> None:
    """What does not end within the limit is a protocol error, not memory."""
    splitter.feed(b"x" * 10)
    with pytest.raises(BackendError) as raised:
        splitter.feed(b"x")
    assert raised.value.kind is Fault.PROTOCOL


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: a\n\n", b"a"),
        (b"data:a\r\n\r\n", b"a"),
        (b"event: x\ndata: a\nid: 1\ndata:  b\n\n", b"a\n b"),
        (b": comment\n\n", b""),
        (b"\n", b""),
    ],
)
def test_data_of(event: bytes, data: bytes) -> None:
    """The data lines of an event, joined by line feeds, one leading space of each taken off."""
    assert data_of(event) == data


@given(st.lists(st.sampled_from([b"\n", b"\r\n", b"data: a", b"\n\n", b"\r\n\r\n", b"\r", b": c"]), max_size=12))
def test_single_events_are_the_whole(parts: list[bytes]) -> None:
    """Together they are the piece, and each but the last ends as an event does."""
    piece = b"".join(parts)
    events = split_events(piece)
    assert b"".join(events) == piece
    assert all(event.endswith((b"\n\n", b"\n\r\n")) for event in events[:-1])
    assert all(len(re.findall(rb"\n\r?\n", event[:-1])) == 0 for event in events)
