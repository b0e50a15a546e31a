"""The `id` of answers: the request's, in whole answers and in every event, and nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.schema import FleetConfig, GatewayConfig, ModelConfig
from kvfleet.gateway.answer_id import AnswerId
from tests.page.living import live, question

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**50), 2**50) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.just("id"), inner, max_size=3),
    max_leaves=12,
)
ANSWERS = st.builds(
    lambda before, own, after: {**before, **own, **after, "choices": before.get("choices", [])},
    st.dictionaries(st.text(max_size=8), JSON, max_size=3),
    st.just({}) | st.builds(lambda name: {"id": name}, JSON),
    st.dictionaries(st.text(max_size=8), JSON, max_size=3),
)
LATE = {"object": "chat.completion.chunk", "choices": [], "id": "chatcmpl-1"}
"""As llama.cpp writes it, whose keys are sorted."""
CHUNK = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "choices": [{"delta": {"content": 'He said "id":"chatcmpl-1"'}}],
}


def event(data: Any, separators: tuple[str, str] = (",", ":")) -> bytes:
    """One event, as an engine writes it."""
    return b"data: " + json.dumps(data, separators=separators).encode() + b"\n\n"


def read(piece: bytes) -> list[Any]:
    """The data of events."""
    return [json.loads(one.removeprefix(b"data: ")) for one in piece.split(b"\n\n") if one.startswith(b"data: {")]


@given(ANSWERS, st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")]), st.booleans())
def test_only_the_id_changes(answer: dict[str, Any], separators: tuple[str, str], is_known: bool) -> None:
    """Whatever an answer holds, and however it is written: the same but for the `id` at its top."""
    body = json.dumps(answer, separators=separators).encode()
    known = str(answer.get("id") or "") if is_known else ""
    assert json.loads(AnswerId("mine").in_answer(body, known)) == {**answer, "id": "mine"}


@given(st.lists(ANSWERS, min_size=1, max_size=5), st.booleans())
def test_only_the_ids_of_events_change(answers: list[dict[str, Any]], is_one_piece: bool) -> None:
    """Also where they come several at a time, and where an engine has another `id` for each."""
    events = [*map(event, answers), b": a comment\n\n", b"data: [DONE]\n\n"]
    given_id = AnswerId("mine")
    said = given_id.in_events(b"".join(events)) if is_one_piece else b"".join(map(given_id.in_events, events))
    assert read(said) == [{**answer, "id": "mine"} for answer in answers]
    assert said.endswith(b": a comment\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_every_other_byte_stays(separators: tuple[str, str]) -> None:
    """White space, key order, and a text that speaks of the very same thing."""
    written = event(CHUNK, separators)
    wanted = written.replace(b'"id":%bchatcmpl-1"' % (b' "' if separators[1] == ": " else b'"'), b'"id":"mine"', 1)
    given_id = AnswerId("mine")
    assert [given_id.in_events(written) for _ in range(3)] == [wanted] * 3
    assert given_id.in_events(written * 4) == wanted * 4


def test_the_id_may_stand_anywhere() -> None:
    """Also where it does not come first."""
    given_id = AnswerId("mine")
    assert [read(given_id.in_events(event(LATE))) for _ in range(3)] == [[{**LATE, "id": "mine"}]] * 3


def test_other_line_ends_are_kept() -> None:
    """An engine that ends lines with CRLF."""
    written = event(CHUNK).replace(b"\n", b"\r\n")
    assert AnswerId("mine").in_events(written * 2) == written.replace(b'"id":"chatcmpl-1"', b'"id":"mine"', 1) * 2


def test_what_has_no_id_and_no_choices_is_left() -> None:
    """A list of vectors, and what is no JSON."""
    for body in (b'{"object":"list","data":[]}', b"<html>", b'["choices"]', b'{"choices":'):
        assert AnswerId("mine").in_answer(body) == body


@pytest.mark.parametrize("whose", ["request", "backend"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_running_gateway(whose: str, stream: bool) -> None:
    """By default the answer has the request's; it keeps its backend's if the file says so, and the trace tells that one."""
    model = ModelConfig(name="m", endpoint="http://m", provider="vllm")
    config = FleetConfig(models=(model,), gateway=GatewayConfig(response_id=whose))
    async with live(config) as gateway:
        answer = await gateway.ask(question(stream=stream), X_Request_ID="my-trace-001")
        answers = read(answer.content) if stream else [answer.json()]
        assert {one["id"] for one in answers} == {"my-trace-001" if whose == "request" else "fake-1"}
        assert gateway.last.attempts[0].response_id == "fake-1"
