"""Bodies parsed in steps are what they are at once."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.gateway.parsing import loaded
from kvfleet.turns import at_once


def outcome(work: Any) -> Any:
    """What comes of it: the value as text, so that order and types count, or the error."""
    try:
        return repr(work())
    except orjson.JSONDecodeError as error:
        return (str(error), error.pos)


def same(raw: bytes, size: int = 16) -> None:
    """Both ways give the same."""
    assert outcome(lambda: at_once(loaded(raw, size))) == outcome(lambda: orjson.loads(raw)), raw


def in_small_steps(raw: bytes) -> Any:
    """Parsed in steps of a few bytes."""
    return at_once(loaded(raw, 8))


def steps_of(raw: bytes, size: int) -> int:
    """In how many steps it is parsed."""
    return sum(1 for _ in loaded(raw, size))


TEXTS = st.text('ab"\\},{[]: é😀', max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "messages", "input", "a", "},{"]), inner, max_size=3)
    ),
    max_leaves=12,
)
KEYS = st.sampled_from(["model", "messages", "input", "prompt", "tools", "mess\\u0061ges", "a"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": TEXTS, "content": TEXTS | st.lists(VALUES, max_size=3)}) | VALUES, max_size=12
)
PAIRS = st.lists(st.tuples(KEYS, VALUES | MESSAGES), max_size=5)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n ", " :\t")])


def written(pairs: Any, separators: tuple[str, str], *, is_ascii: bool) -> bytes:
    """An object of pairs, whose keys may stand there more than once, or with escapes."""
    comma, colon = separators
    parts = [
        f'"{key}"{colon}' + json.dumps(value, separators=separators, ensure_ascii=is_ascii) for key, value in pairs
    ]
    return ("{" + comma.join(parts) + "}").encode()


@given(PAIRS, SEPARATORS, st.booleans(), st.integers(1, 64))
def test_every_body_is_what_it_is_at_once(pairs: Any, separators: tuple[str, str], is_ascii: bool, size: int) -> None:
    """However it is written, whatever stands in it twice, wherever a step ends."""
    same(written(pairs, separators, is_ascii=is_ascii), size)


@given(PAIRS, SEPARATORS, st.integers(1, 64), st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), max_size=3))
def test_every_spoilt_body_has_the_same_error(
    pairs: Any, separators: tuple[str, str], size: int, cuts: list[tuple[float, bytes]]
) -> None:
    """Where something was taken out, or put in, or is no JSON at all."""
    raw = written(pairs, separators, is_ascii=False)
    for place, other in cuts:
        at = int(place * len(raw))
        raw = raw[:at] + other + raw[at + len(other) % 2 :]
        same(raw, size)
        same(raw[:at], size)


@given(
    st.lists(
        st.sampled_from([b'"messages":[', *(b'{}[]",:1 \\'[i : i + 1] for i in range(10)), b'"a"', b"},{"]), max_size=30
    )
)
def test_every_text_is_what_it_is_at_once(parts: list[bytes]) -> None:
    """Also what nobody would send."""
    same(b"".join(parts), 4)
    same(b'{"messages":[' + b"".join(parts), 4)


def test_depth_and_odd_ends() -> None:
    """The deepest nesting there may be, and lists that end in odd places."""
    for depth in (1021, 1022, 1023, 1024):
        raw = b'{"messages":[{"a":1},' + b"[" * depth + b"]" * depth + b',{"a":2},{"a":3}]}'
        told = [outcome(lambda read=read, raw=raw: str(type(read(raw)))) for read in (orjson.loads, in_small_steps)]
        assert told[0] == told[1]
    same(b'{"messages":[1],[2]}', 1)
    same(b'{"messages":[1],[2],"a":[3]}', 9)
    for tail in (b"", b"]", b"]}", b'],"a":1}', b'],"]":[{"a":1},{"a":2}]}', b"]}}", b'],"messages":[1]}', b",]}"):
        same(b'{"messages":[{"a":1},{"a":2},{"a":3},{"a":4}' + tail, 8)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "messages": [{"role": "user", "content": "},{ " * 9, "n": i} for i in range(200)], "n": 1},
        {
            "messages": [{"role": "tool", "content": [{"type": "text", "text": "é"}] * 3} for _ in range(99)],
            "tools": [{}],
        },
        {"system": "x" * 99, "input": [{"type": "a", "output": "],["}, {"role": "b", "content": "c"}] * 200},
        {"model": "m", "input": ["a text, and", '"another"'] * 300},
        {"prompt": list(range(3000)), "n": 1},
        {"prompt": [[1, 2, 3]] * 900},
    ],
)
def test_large_bodies_are_parsed_in_steps(body: dict[str, Any], separators: tuple[str, str]) -> None:
    """Those that clients send, in steps of about the size that was asked for."""
    raw = json.dumps(body, separators=separators).encode()
    same(raw, 1000)
    assert len(raw) // 1000 - 1 <= steps_of(raw, 1000) <= len(raw) // 300


def test_what_is_no_list_is_parsed_at_once() -> None:
    """One long text, no object, a list that is not where it seems to be: a few steps lost at most."""
    for raw in (b'{"prompt":"%b"}' % (b"x" * 5000), b"[1]", b'"x"', b'{"a":{"messages":[%b{}]}}' % (b'{"a":1},' * 999)):
        same(raw, 100)
    nested = b'{"messages":[{"a":[' + b'{"a":1},' * 9999 + b'{"a":2}]}]}'
    same(nested, 1000)
    assert steps_of(nested, 1000) <= 9
