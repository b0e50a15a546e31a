"""Relaying an OpenAI event stream."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters import faults
from kvfleet.adapters.call import Tally, Usage
from kvfleet.adapters.incoming import ForeignAnswer, Incoming
from kvfleet.adapters.sse import DONE, EventRelay
from kvfleet.errors import BackendError, Fault

SAMPLES = Path(__file__).with_name("samples")
STREAMS = {name: (SAMPLES / f"{name}_stream.sse").read_bytes() for name in ("vllm", "sglang", "llamacpp")}
FIRST = b'data: {"id":"a","model":"m","choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]}\n\n'
TEXT = b'data: {"id":"a","model":"m","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
STOP = b'data: {"id":"a","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"id":"a","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}\n\n'


class Pieces(httpx.AsyncByteStream):
    """A body of given pieces, that may end in an error."""

    is_complete = True

    def __init__(self, pieces: Sequence[bytes], error: Exception | None = None) -> None:
        self.pieces = pieces
        self.error = error
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
        if self.error is not None:
            raise self.error

    async def aclose(self) -> None:
        self.is_closed = True


def relay(*pieces: bytes, error: Exception | None = None, **options: object) -> tuple[EventRelay, Tally, Pieces]:
    """A relay over given pieces."""
    body = Pieces(pieces, error)
    tally = Tally()
    made = EventRelay(
        Incoming(ForeignAnswer(httpx.Response(200, stream=body))),
        tally,
        error_of=lambda data: faults.from_answer(200, {}, data),
        **options,  # type: ignore[arg-type]
    )
    return made, tally, body


def run(*pieces: bytes, error: Exception | None = None, **options: object) -> tuple[bytes, Tally, BackendError | None]:
    """What comes out, what was learned, and how it ended."""

    async def main() -> tuple[bytes, Tally, BackendError | None]:
        made, tally, _ = relay(*pieces, error=error, **options)
        out = b""
        try:
            async for piece in made:
                out += piece
        except BackendError as failed:
            return out, tally, failed
        return out, tally, None

    return asyncio.run(main())


TALLIES = {
    "vllm": Tally(Usage(12, 3, 15, 0), "length", "tiny-qwen2", "chatcmpl-a8319fc3ca7a51ae", 6, is_complete=True),
    "sglang": Tally(Usage(12, 3, 15, 0), "length", "tiny-sgl", "5cf3f302c1b9456982971c3eb65f77c9", 6, is_complete=True),
    "llamacpp": Tally(
        Usage(12, 3, 15, 11),
        "length",
        "models/tiny-qwen2.gguf",
        "chatcmpl-7zPfO5VXkYtXf025NapUrMfIoBUAFxgz",
        7,
        is_complete=True,
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_recorded_streams_pass_untouched(name: str) -> None:
    """What engines really sent goes through byte by byte, and everything is learned from it."""
    assert run(STREAMS[name]) == (STREAMS[name], TALLIES[name], None)


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_gives_the_same_relay(name: str) -> None:
    """An event split at any byte comes out whole, and the same is learned."""
    data = STREAMS[name]
    for at in range(1, len(data), 7):
        assert run(data[:at], data[at:]) == (data, TALLIES[name], None)


@given(st.lists(st.integers(0, 2000), max_size=12), st.booleans())
def test_any_cuts_and_line_ends(at: list[int], is_crlf: bool) -> None:
    """Any number of cuts, with LF and with CRLF, gives the same bytes, and the end that everybody looks for."""
    data = b": hello\n\n" + FIRST + TEXT + b": ping\n\n" + TEXT + STOP + USAGE + DONE
    if is_crlf:
        data = data.replace(b"\n", b"\r\n")
    edges = sorted({0, len(data), *(index % (len(data) + 1) for index in at)})
    pieces = [data[begin:end] for begin, end in itertools.pairwise(edges)]
    out, tally, error = run(*pieces)
    assert (out, error) == (data.removesuffix(DONE.replace(b"\n", b"\r\n")) + DONE if is_crlf else data, None)
    assert tally == Tally(Usage(3, 1, 4), "stop", "m", "a", 6, is_complete=True)


@pytest.mark.parametrize("pieces", [(FIRST + b"data: " + b"x" * 100,), (FIRST[:5], FIRST[5:] + b"data: " + b"x" * 100)])
def test_an_event_too_long_is_refused_at_once(pieces: tuple[bytes, ...]) -> None:
    """Also if whole ones came with its beginning, and nothing comes after it: nobody waits for more of it."""

    async def main() -> tuple[bytes, BackendError]:
        made, _, _ = relay(*pieces, error=httpx.ReadError("nothing more"))
        made._splitter.max_bytes = 50
        out = await anext(made)
        with pytest.raises(BackendError) as caught:
            await anext(made)
        return out, caught.value

    out, error = asyncio.run(main())
    assert (out, error.kind) == (FIRST, Fault.PROTOCOL)
    assert "more than 50 bytes" in str(error)


def test_done_alone_is_no_end() -> None:
    """Without a finish reason nobody knows that an answer is whole, whatever the engine says last."""
    out, tally, failed = run(FIRST + TEXT + DONE)
    assert failed is not None
    assert (out, failed.kind, tally.is_complete) == (FIRST + TEXT, Fault.DISCONNECTED, False)


@pytest.mark.parametrize("name", STREAMS)
def test_a_truncated_stream_never_completes(name: str) -> None:
    """Cut anywhere, a stream completes only if everything had been said and the cut is between two events."""
    data = STREAMS[name]
    done = data.index(DONE)
    finish = data.index(b"\n\n", data.index(b'"finish_reason":"length"')) + 2
    for at in range(len(data)):
        out, tally, error = run(data[:at])
        is_whole = at >= finish and data[:at].endswith(b"\n\n")
        assert tally.is_complete is is_whole
        if is_whole:
            assert (out, error) == (data[:at] if at > done else data[:at] + DONE, None)
        else:
            assert error is not None
            assert (error.kind, error.received) == (Fault.DISCONNECTED, bool(out))
            assert DONE not in out
            assert data.startswith(out)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ReadError("gone"), Fault.DISCONNECTED),
        (httpx.ReadTimeout("silent"), Fault.IDLE_TIMEOUT),
        (httpx.RemoteProtocolError("bad chunk"), Fault.PROTOCOL),
        (httpx.RemoteProtocolError("peer closed connection without sending complete message body"), Fault.DISCONNECTED),
    ],
)
def test_a_broken_connection_is_never_a_clean_end(error: Exception, kind: Fault) -> None:
    """A connection that breaks after the finish reason still breaks the stream, unless [DONE] was there."""
    out, tally, failed = run(FIRST + TEXT + STOP, error=error)
    assert failed is not None
    assert (out, failed.kind, failed.received, tally.is_complete) == (FIRST + TEXT + STOP, kind, True, False)
    assert run(FIRST + STOP + DONE, error=error)[2] is None


def test_silence_before_the_first_event_is_no_answer() -> None:
    """Nothing received means that another replica may be asked."""
    _, _, failed = run(error=httpx.ReadTimeout("silent"))
    assert failed is not None
    assert (failed.kind, failed.received) == (Fault.TIMEOUT, False)


ERROR = b'data: {"error":{"message":"boom at http://10.0.0.1:8000/x","type":"server_error","code":503}}\n\n'


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (ERROR, Fault.OVERLOADED),
        (b'data: {"error":"out of memory"}\n\n', Fault.SERVER_ERROR),
        (b'event: error\ndata: {"message":"too long for max_model_len","code":400}\n\n', Fault.CONTEXT_LENGTH),
        (b'data: {"object":"error","message":"bad","code":400}\n\n', Fault.BAD_REQUEST),
        (b'error: {"code":500,"message":"x","type":"server_error"}\n\n', Fault.SERVER_ERROR),
    ],
)
@pytest.mark.parametrize("before", [b"", FIRST + TEXT])
@pytest.mark.parametrize("is_split", [False, True])
def test_an_error_amid_the_stream_ends_it(event: bytes, kind: Fault, before: bytes, is_split: bool) -> None:
    """What stood before an error event is passed on, then the error is raised; a [DONE] behind it does not help."""
    pieces = [before, event + DONE] if is_split else [before + event + DONE]
    out, tally, failed = run(*pieces)
    assert failed is not None
    assert (out, failed.kind, failed.received, tally.is_complete) == (before, kind, bool(before), False)


@pytest.mark.parametrize(
    "garbage",
    [
        b"<html><body>502 Bad Gateway</body></html>",
        b"<html>\n\n<body>\n\n",
        b"data: <html>\n\n",
        b'data: {"choices":[\n\n',
        b"data: [1, 2]\n\n",
        b'{"id":"a","choices":[]}\n\n',
    ],
)
def test_garbage_is_a_protocol_error(garbage: bytes) -> None:
    """What is no event stream is not relayed."""
    out, _, failed = run(garbage)
    assert failed is not None
    assert (out, failed.kind, failed.received) == (b"", Fault.PROTOCOL, False)


def test_an_empty_body_is_a_disconnect() -> None:
    """A stream that says nothing at all did not finish."""
    _, _, failed = run()
    assert failed is not None
    assert failed.kind is Fault.DISCONNECTED


def test_a_missing_done_is_added() -> None:
    """An engine that ends after the finish reason without [DONE] gets one."""
    assert run(FIRST + STOP)[0] == FIRST + STOP + DONE


def test_every_choice_must_finish() -> None:
    """With n=2 a stream without [DONE] is complete only when both choices have their finish reason."""
    other = STOP.replace(b'"index":0', b'"index":1')
    assert run(FIRST + STOP, choices=2)[2] is not None
    out, tally, error = run(FIRST + other + STOP, choices=2)
    assert (out, tally.finish_reason, error) == (FIRST + other + STOP + DONE, "stop", None)


def test_usage_asked_for_on_our_account_is_hidden() -> None:
    """The usage-only event is taken out, and counted all the same; a usage beside a choice stays."""
    out, tally, _ = run(FIRST + STOP, USAGE + DONE, hide_usage=True)
    assert (out, tally.usage) == (FIRST + STOP + DONE, Usage(3, 1, 4))
    beside = STOP.replace(b'"id":"a"', b'"id":"a","usage":{"prompt_tokens":3}')
    out, tally, _ = run(FIRST + beside + DONE, hide_usage=True)
    assert (out, tally.usage) == (FIRST + beside + DONE, Usage(3, 0, 3))


def test_null_usage_costs_no_look() -> None:
    """OpenAI's `"usage": null` in every chunk, and spaces after colons, change nothing."""
    null = TEXT.replace(b'"id":"a"', b'"id":"a","usage":null')
    spaced = STOP.replace(b":", b": ").replace(b"data:  ", b"data: ")
    out, tally, error = run(FIRST, null + null, null, spaced, DONE)
    assert (out, error) == (FIRST + null * 3 + spaced + DONE, None)
    assert tally == Tally(None, "stop", "m", "a", 6, is_complete=True)


def test_nothing_is_passed_on_after_done() -> None:
    """Bytes behind [DONE] are not part of the answer."""
    assert run(FIRST + STOP + DONE + TEXT, b"garbage")[0] == FIRST + STOP + DONE


def test_texts_that_look_like_fields() -> None:
    """An answer may speak of errors, usage and finish reasons; as text they mean nothing."""
    talk = b'data: {"choices":[{"index":0,"delta":{"content":"\\"error\\": {} \\"usage\\":{ \\"finish_reason\\":\\"stop\\""}}]}\n\n'
    out, tally, error = run(FIRST, talk, STOP, DONE)
    assert (out, tally.finish_reason, tally.usage, error) == (FIRST + talk + STOP + DONE, "stop", None, None)


def test_unknown_events_pass() -> None:
    """Events and fields that nobody here knows go through."""
    odd = b'event: note\nid: 7\ndata: {"whatever":{"error":null},"choices":"none"}\n\n'
    assert run(FIRST + odd, STOP + DONE)[0] == FIRST + odd + STOP + DONE


async def test_closing_ends_a_waiting_relay() -> None:
    """`aclose` closes the answer's body; an iteration that had ended stays ended."""
    made, _, body = relay(FIRST, STOP)
    assert await anext(made) == FIRST
    await made.aclose()
    await made.aclose()
    assert body.is_closed


async def test_no_more_is_held_of_an_event_than_it_may_be() -> None:
    """Of an event that never ends so many bytes are taken from the engine, and one piece; then it is left."""
    taken = 0

    class Endless(Pieces):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            nonlocal taken
            yield TEXT
            while True:
                taken += 1000
                yield b"x" * 1000

    body = Endless(())
    incoming = Incoming(ForeignAnswer(httpx.Response(200, stream=body)), event_bytes=50_000)
    made = EventRelay(incoming, Tally(), error_of=lambda data: faults.from_answer(200, {}, data))
    assert await anext(made) == TEXT
    with pytest.raises(BackendError, match="more than 50000 bytes") as raised:
        await anext(made)
    assert (raised.value.kind, raised.value.received, taken, body.is_closed) == (Fault.PROTOCOL, True, 51_000, True)
