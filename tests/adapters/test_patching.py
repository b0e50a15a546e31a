"""Patching a request's body by bytes."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.call import Call, Operation
from kvfleet.adapters.patching import body_for, body_in_turns, hides_usage

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(max_size=8)
    | st.sampled_from(["model", '"model":']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["model", "stream", 'x"model']), inner, max_size=3)
    ),
    max_leaves=8,
)
BODIES = st.dictionaries(st.text(max_size=6) | st.sampled_from(["messages", "metadata", "n"]), JSON, max_size=5)


def call(raw: bytes, **options: Any) -> Call:
    """A chat call with these bytes."""
    body = orjson.loads(raw)
    return Call(operation=Operation.CHAT, body=body, raw=raw, stream=bool(body.get("stream")), **options)


@given(
    fields=BODIES,
    name=st.text(max_size=8),
    stream=st.booleans(),
    ask=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    is_ascii=st.booleans(),
    place=st.integers(0, 5),
)
def test_only_the_model_changes(
    *, fields: dict[str, Any], name: str, stream: bool, ask: bool, indent: int | None, is_ascii: bool, place: int
) -> None:
    """Whatever else a body holds, and however it is written: the backend gets the same fields, and its own model's name."""
    fields = {key: value for key, value in fields.items() if key not in ("model", "stream", "stream_options")}
    items = [*fields.items()]
    items[place:place] = [("model", name), *([("stream", True)] if stream else [])]
    body = dict(items)
    raw = json.dumps(body, indent=indent, ensure_ascii=is_ascii).encode()
    asked = call(raw, ask_usage=ask)
    expected = {**body, "model": 'theirs"\\'}
    if stream and ask:
        expected["stream_options"] = {"include_usage": True}
    assert orjson.loads(body_for(asked, 'theirs"\\')) == expected
    assert asked.body == body


def test_every_other_byte_stays() -> None:
    """White space, number formats, escapes and key order go through as the client wrote them."""
    raw = b' { "temperature" : 1.0e0,\n "model"\t:\n"auto", "messages":[{"content":"\\u00e4 \\/"}], "big": 12345678901234567890123 } '
    assert body_for(call(raw), "m") == raw.replace(b'"auto"', b'"m"')


def test_usage_is_asked_for_by_splicing() -> None:
    """The option is put in front; nothing else moves."""
    raw = b'{"model":"auto","stream":true,"x":1.50}'
    got = body_for(call(raw, ask_usage=True), "m")
    assert got == b'{"stream_options":{"include_usage":true},"model":"m","stream":true,"x":1.50}'


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"model":"a","metadata":{"model":"b"}}', {"model": "m", "metadata": {"model": "b"}}),
        (b'{"metadata":{"model":"b"},"x":1}', {"metadata": {"model": "b"}, "x": 1, "model": "m"}),
        (b'{"role":"model"}', {"role": "model", "model": "m"}),
        (b'{"model":"a","model":"b"}', {"model": "m"}),
        (b'{"mod\\u0065l":"a","metadata":{"model":"a"}}', {"model": "m", "metadata": {"model": "a"}}),
        (b'{"model":null}', {"model": "m"}),
        (b'{"model":"a","messages":[1],"messages":[2]}', {"model": "m", "messages": [2]}),
        (b'{"model":"a","messages":[1],"me\\u0073sages":[2]}', {"model": "m", "messages": [2]}),
    ],
    ids=["nested too", "nested only", "value", "duplicate", "escaped key", "null", "two prompts", "escaped prompt"],
)
def test_unsafe_bodies_are_encoded_anew(raw: bytes, expected: dict[str, Any]) -> None:
    """Where the bytes are ambiguous the parsed body decides, as the gateway read it."""
    assert orjson.loads(body_for(call(raw), "m")) == expected


@pytest.mark.parametrize(
    ("options", "sent", "hidden"),
    [
        (None, {"include_usage": True}, True),
        ({"include_usage": True}, {"include_usage": True}, False),
        ({"include_usage": False, "x": 1}, {"include_usage": True, "x": 1}, True),
        ({}, {"include_usage": True}, True),
    ],
)
def test_stream_options_are_merged(options: Any, sent: dict[str, Any], hidden: bool) -> None:
    """What the client asked for stays; the usage is hidden from it exactly if it did not ask."""
    body = {"model": "a", "stream": True, "stream_options": options}
    asked = call(orjson.dumps(body), ask_usage=True)
    assert orjson.loads(body_for(asked, "m"))["stream_options"] == sent
    assert hides_usage(asked) is hidden


def test_usage_is_not_asked_for_without_need() -> None:
    """A whole answer tells its usage anyway."""
    asked = call(b'{"model":"a"}', ask_usage=True)
    assert (body_for(asked, "m"), hides_usage(asked)) == (b'{"model":"m"}', False)


def test_the_calls_own_wish_to_stream_wins() -> None:
    """A call may stream what the body did not say, and the other way round; options of a stream go with it."""
    body = {"model": "a", "stream": True, "stream_options": {"include_usage": True}}
    whole = Call(operation=Operation.CHAT, body=body, raw=orjson.dumps(body))
    assert orjson.loads(body_for(whole, "m")) == {"model": "m", "stream": False}
    streamed = Call(operation=Operation.CHAT, body={"model": "a"}, raw=b'{"model":"a"}', stream=True)
    assert orjson.loads(body_for(streamed, "m")) == {"model": "m", "stream": True}


def test_a_body_without_bytes() -> None:
    """A request that came from Python is encoded."""
    asked = Call(operation=Operation.CHAT, body={"messages": []})
    assert orjson.loads(body_for(asked, "m")) == {"messages": [], "model": "m"}


@pytest.mark.parametrize("off", range(-12, 3))
@pytest.mark.parametrize(
    ("key", "times"),
    [
        (b'"model":"auto",', 1),
        (b'"model":"auto",', 2),
        (b'"model":"auto","mod\\u0065l":"x",', 1),
        (b'"a\\u00e4":1,', 1),
    ],
)
async def test_a_large_body_is_sent_as_a_small_one_would_be(off: int, key: bytes, times: int) -> None:
    """Wherever its keys stand, also across the seams of the parts in which it is searched."""
    head = b'{"messages":[{"role":"user","content":"'
    padding = b"x" * (1024 * 1024 - len(head) - len(b'"}],') + off)
    raw = head + padding + b'"}],' + key * times + b'"seed":1}'
    one = call(raw)
    assert await body_in_turns(one, "served") == body_for(one, "served")


async def test_a_large_body_without_bytes() -> None:
    """It is encoded, as from another API."""
    body = {"model": "auto", "messages": [{"role": "user", "content": "x" * 300_000}]}
    one = Call(operation=Operation.CHAT, body=body)
    assert orjson.loads(await body_in_turns(one, "served")) == {**body, "model": "served"}
