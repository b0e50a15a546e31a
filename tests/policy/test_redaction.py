"""Personal data out of a request, and back into the answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.call import Reply
from kvfleet.policy.pii import PIIDetector
from kvfleet.policy.redaction import Redaction, RestoredEvents

DETECTOR = PIIDetector()
MAIL, SSN = "ada@example.com", "123-45-6789"


def redaction(*texts: str, **more: Any) -> Redaction:
    """Of a chat with some messages."""
    made = Redaction.of({"messages": [{"role": "user", "content": text} for text in texts], **more}, DETECTOR)
    assert made is not None
    return made


def contents(made: Redaction) -> list[str]:
    """The messages' texts."""
    return [message["content"] for message in made.body["messages"]]


def test_each_value_has_one_placeholder() -> None:
    """The same wherever it stands, in the order of the text."""
    made = redaction(f"Mail {MAIL} about {SSN}", f"Again {MAIL}, and bob@example.com")
    assert contents(made) == ["Mail [EMAIL_1] about [SSN_1]", "Again [EMAIL_1], and [EMAIL_2]"]
    assert (made.types, made.count) == (("email", "ssn"), 3)


def test_a_text_that_begins_as_a_file_does() -> None:
    """Only what is an embedded file is left alone; somebody may well write "data: ..."."""
    assert contents(redaction(f"data: mail {MAIL}", f"data:text/plain,{SSN}")) == [
        "data: mail [EMAIL_1]",
        "data:text/plain,[SSN_1]",
    ]


def test_every_text_of_a_body_is_looked_through() -> None:
    """Parts, tool calls, tools, names of users; not what only names things, nor embedded files."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB"}}
    call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": f'{{"to":"{MAIL}"}}'}}
    body = {
        "model": MAIL,
        "user": MAIL,
        "n": 1,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": MAIL}, picture]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
    }
    made = Redaction.of(body, DETECTOR)
    assert made is not None
    assert made.body["model"] == MAIL
    assert made.body["user"] == "[EMAIL_1]"
    assert made.body["messages"][0]["content"] == [{"type": "text", "text": "[EMAIL_1]"}, picture]
    assert made.body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"to":"[EMAIL_1]"}'
    assert body["user"] == MAIL


def test_where_there_is_nothing_there_is_no_redaction() -> None:
    """The request then goes out byte for byte as it came."""
    assert Redaction.of({"messages": [{"role": "user", "content": "Hello"}]}, DETECTOR) is None


def test_a_placeholder_the_request_already_holds_is_not_given_again() -> None:
    """It would come back as somebody's address."""
    made = redaction(f"What does [EMAIL_1] mean, and who is {MAIL}?")
    assert contents(made) == ["What does [EMAIL_1] mean, and who is [EMAIL_2]?"]
    assert made.restore_text("[EMAIL_1] is a placeholder for [EMAIL_2]") == f"[EMAIL_1] is a placeholder for {MAIL}"


def test_the_repr_shows_no_value() -> None:
    """A redaction in a log or traceback gives nothing away."""
    assert repr(redaction(f"{MAIL} {SSN}")) == "Redaction(types=('email', 'ssn'))"


def test_a_whole_answer_is_restored() -> None:
    """In texts as they are, in arguments as JSON writes them; what is no placeholder stays."""
    made = redaction("call (555)\n123-4567 or ada@example.com")
    function = {"name": "f", "arguments": '{"to":"[PHONE_US_1]"}'}
    message = {"content": "[PHONE_US_1] [EMAIL_1] [EMAIL_9] [x]", "tool_calls": [{"function": function}]}
    reply = made.restore(Reply(body=orjson.dumps({"choices": [{"message": message}]})))
    restored = orjson.loads(reply.body)["choices"][0]["message"]
    assert restored["content"] == f"(555)\n123-4567 {MAIL} [EMAIL_9] [x]"
    assert orjson.loads(restored["tool_calls"][0]["function"]["arguments"]) == {"to": "(555)\n123-4567"}


@pytest.mark.parametrize("body", [b"", b"no json [", b'{"data":[{"embedding":[0.5,1.5]}]}'])
def test_what_holds_no_placeholder_is_left(body: bytes) -> None:
    """An answer of another shape passes."""
    restored = redaction(MAIL).restore(Reply(body=body)).body
    assert restored == body


def test_the_original_comes_back_from_its_own_redaction() -> None:
    """What an engine that only repeats would answer."""
    text = f"{MAIL}, {SSN}; bob@example.com {MAIL} 10.0.0.1"
    made = redaction(text)
    assert made.restore_text(contents(made)[0]) == text


def event(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> bytes:
    """One chunk of a stream."""
    return (
        b"data: "
        + orjson.dumps({"id": "x", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]})
        + b"\n\n"
    )


async def _each(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def restored(made: Redaction, *pieces: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that passed through."""

    async def run() -> bytes:
        return b"".join([piece async for piece in RestoredEvents(_each(pieces), made)])

    out = asyncio.run(run())
    assert out.endswith(b"data: [DONE]\n\n")
    lines = out.removesuffix(b"data: [DONE]\n\n").split(b"\n\n")
    return [orjson.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]


def said(chunks: list[dict[str, Any]], index: int = 0, key: str = "content") -> str:
    """The text of one choice."""
    return "".join(
        choice["delta"].get(key) or "" for chunk in chunks for choice in chunk["choices"] if choice["index"] == index
    )


DONE = b"data: [DONE]\n\n"


@given(st.lists(st.integers(0, 60), max_size=8), st.booleans(), st.booleans())
def test_a_stream_is_restored_wherever_it_is_cut(cuts: list[int], finishes: bool, is_joined: bool) -> None:
    """Letter by letter or in one piece, with a finish reason or without, an event a piece or all in one."""
    made = redaction(f"{MAIL} {SSN}")
    text = "To [EMAIL_1][SSN_1] and [EMAIL_7] or [EMA [x] [[EMAIL_1] end ["
    places = [0, *sorted(cuts), len(text)]
    events = [event({"content": text[a:b]}) for a, b in itertools.pairwise(places)]
    events += [event({}, "stop")] if finishes else []
    pieces = [b"".join([*events, DONE])] if is_joined else [*events, DONE]
    assert said(restored(made, *pieces)) == f"To {MAIL}{SSN} and [EMAIL_7] or [EMA [x] [{MAIL} end ["


def test_choices_do_not_mix() -> None:
    """Each choice holds back its own."""
    made = redaction(f"{MAIL} {SSN}")
    chunks = restored(
        made,
        event({"content": "[EMA"}),
        event({"content": "[SS"}, index=1),
        event({"content": "IL_1]"}),
        event({"content": "N_1]"}, index=1),
        event({}, "stop"),
        event({}, "stop", index=1),
        DONE,
    )
    assert (said(chunks), said(chunks, 1)) == (MAIL, SSN)


def test_arguments_of_tool_calls_are_restored() -> None:
    """Cut anywhere; what is still held back when the choice finishes comes with its last chunk."""
    made = redaction(MAIL)

    def call(arguments: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]}

    chunks = restored(
        made, event(call('{"to":"[EMA')), event(call('IL_1]","list":[')), event({}, "tool_calls"), event({}), DONE
    )
    calls = [one for chunk in chunks for one in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(one["function"]["arguments"] for one in calls) == f'{{"to":"{MAIL}","list":['


def test_text_completions_are_restored() -> None:
    """They stream `text`, not `delta`."""
    made = redaction(MAIL)

    def piece(text: str, finish: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "finish_reason": finish}
        return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"

    chunks = restored(made, piece("[EMAIL"), piece("_1] ["), piece("", "stop"), b": a comment\n\n", DONE)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == f"{MAIL} ["
