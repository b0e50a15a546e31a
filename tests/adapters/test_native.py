"""Answers in another API's words: what is learned of them, and that an end is an end however the network cuts them."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvfleet.adapters.call import Tally
from kvfleet.adapters.native import NativeRelay, portable
from kvfleet.adapters.native_wire import WIRES, response_usage
from kvfleet.adapters.splitters import MAX_EVENT_BYTES
from kvfleet.errors import BackendError, Fault

USAGE = {"input_tokens": 4, "cache_read_input_tokens": 16, "output_tokens": 1}
EVENTS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"type": "message_start", "message": {"id": "m", "model": "claude", "content": [], "usage": USAGE}},
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": 'a "type":"error" é'}},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 7}},
        {"type": "message_stop"},
    ],
    "responses": [
        {"type": "response.created", "response": {"id": "r", "model": "gpt"}},
        {"type": "response.output_text.delta", "delta": "a"},
        {
            "type": "response.incomplete",
            "response": {
                "id": "r",
                "model": "gpt",
                "output": [],
                "incomplete_details": {"reason": "max_output_tokens"},
                "usage": {"input_tokens": 20, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 16}},
            },
        },
    ],
}


def told(surface: str) -> bytes:
    """The whole stream of an API."""
    return b"".join(b"event: %b\ndata: %b\n\n" % (one["type"].encode(), orjson.dumps(one)) for one in EVENTS[surface])


@attrs.define
class Body:
    """An answer in pieces."""

    pieces: list[bytes]
    closed: int = 0
    finished: int = 0
    event_bytes: int = MAX_EVENT_BYTES

    async def piece(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def finish(self) -> None:
        self.finished += 1

    async def aclose(self) -> None:
        self.closed += 1


def relay(surface: str, *pieces: bytes) -> tuple[NativeRelay, Body]:
    """A relay of an answer that comes in these pieces."""
    body = Body(list(pieces))

    def error_of(data: Any) -> BackendError:
        return BackendError(Fault.OVERLOADED, str(data["error"].get("type") or data["error"].get("code")))

    return NativeRelay(body, Tally(), WIRES[surface], error_of), body  # type: ignore[arg-type]


async def read(one: NativeRelay) -> bytes:
    """All of it."""
    return b"".join([piece async for piece in one])


@pytest.mark.parametrize("surface", EVENTS)
@given(cuts=st.lists(st.integers(0, 900), max_size=8))
@settings(max_examples=40, deadline=None)
async def test_however_the_network_cuts_it(surface: str, cuts: list[int]) -> None:
    """Every byte goes on, in order, and the same is learned."""
    data = told(surface)
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    one, body = relay(surface, *[data[a:b] for a, b in itertools.pairwise(places)])
    assert await read(one) == data
    tally = one.tally
    assert tally.is_complete
    assert tally.finish_reason == "length"
    assert tally.usage is not None
    assert (tally.usage.prompt_tokens, tally.usage.cached_tokens, tally.usage.completion_tokens) == (20, 16, 7)
    assert tally.events == len(EVENTS[surface])
    assert body.finished == 1


@pytest.mark.parametrize("surface", EVENTS)
@given(share=st.floats(0, 0.999))
@settings(max_examples=60, deadline=None)
async def test_a_stream_cut_anywhere_is_no_end(surface: str, share: float) -> None:
    """Whatever is missing, the iteration raises; before anything was given the call may be made again."""
    data = told(surface)[:-1]
    one, body = relay(surface, data[: int(len(data) * share)])
    given_: list[bytes] = []
    with pytest.raises(BackendError) as caught:  # noqa: PT012 - how far it came
        async for piece in one:
            given_.append(piece)  # noqa: PERF401 - those before the error are wanted
    assert caught.value.kind is Fault.DISCONNECTED
    assert caught.value.received is bool(given_)
    assert not one.tally.is_complete
    assert body.closed == 1


async def test_an_error_after_the_opening_is_the_calls_own() -> None:
    """The opening waits for what follows it."""
    error = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n'
    opening = told("messages").partition(b"\n\n")[0] + b"\n\n"
    one, _ = relay("messages", opening, error)
    with pytest.raises(BackendError, match="overloaded_error") as caught:
        await read(one)
    assert not caught.value.received


async def test_what_stands_before_an_error_goes_out_before_it() -> None:
    """Both in one packet: first the text, then the error."""
    data = told("responses")
    first, second = data.split(b"\n\n")[:2]
    error = b'event: response.failed\ndata: {"response":{"error":{"code":"server_error","message":"x"}}}\n\n'
    one, _ = relay("responses", b"\n\n".join([first, second, b""]) + error)
    assert await anext(one) == b"\n\n".join([first, second, b""])
    with pytest.raises(BackendError) as caught:
        await anext(one)
    assert caught.value.received


@pytest.mark.parametrize("surface", EVENTS)
@given(noise=st.binary(max_size=200))
@example(noise=b"{}")
@settings(max_examples=100, deadline=None)
async def test_noise_is_a_backend_error(surface: str, noise: bytes) -> None:
    """Any bytes end in an error of the taxonomy, also behind a type that is looked into."""
    for prefix in (b"", b"event: message_delta\ndata: ", b"event: response.completed\ndata: ", b"data: "):
        one, _ = relay(surface, prefix + noise, b"\n\n")
        with pytest.raises(BackendError):
            await read(one)


@given(
    cached=st.integers(0, 1000),
    rest=st.integers(0, 1000),
    said=st.integers(0, 1000),
    thought=st.none() | st.integers(0, 9),
)
def test_parts_of_a_usage_sum_to_the_whole(cached: int, rest: int, said: int, thought: int | None) -> None:
    """Cached tokens are among those of the prompt."""
    usage = response_usage(
        {
            "input_tokens": cached + rest,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": said,
            "output_tokens_details": {"reasoning_tokens": thought},
        }
    )
    if usage is not None:
        assert usage.total_tokens == cached + rest + said
        assert usage.cached_tokens == cached


def test_a_portable_body_is_a_copy() -> None:
    """Marks go, everything else stays, and the original is not touched."""
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    body = {
        "thinking": {"type": "enabled"},
        "messages": [
            {"role": "user", "content": [part]},
            {"role": "assistant", "content": "", "reasoning_content": "hm"},
            {"role": "assistant", "content": "b", "thinking_blocks": [{}]},
        ],
        "tools": [{"type": "function", "function": {}, "cache_control": {}}],
        "odd": 1,
    }
    before = orjson.dumps(body)
    assert portable(body) == {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
        ],
        "tools": [{"type": "function", "function": {}}],
        "odd": 1,
    }
    assert orjson.dumps(body) == before
