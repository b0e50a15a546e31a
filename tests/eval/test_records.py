"""Recorded requests: what a line holds, with content and without, and how it is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.call import Operation
from kvfleet.cache.fingerprints import estimate_tokens
from kvfleet.errors import TraceError
from kvfleet.eval.records import RecordedRequest, older, read_records, without_content
from kvfleet.trace import names
from kvfleet.trace.spans import Span, Trace

CANARY = "sesame-4711"
BODY = {
    "model": "auto",
    "messages": [
        {"role": "system", "content": f"The word is {CANARY}"},
        {
            "role": "user",
            "content": [{"type": "text", "text": CANARY}, {"type": "image_url", "image_url": {"url": CANARY}}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"id": CANARY, "function": {"arguments": CANARY}}]},
    ],
    "tools": [{"type": "function", "function": {"name": CANARY, "parameters": {"properties": {CANARY: {}}}}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": CANARY}},
    "user": CANARY,
    "metadata": {"k": CANARY},
    "max_tokens": 5,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


def recorded(**changes: Any) -> RecordedRequest:
    """A record of everything."""
    attributes = {names.REQUEST_ID: "r-1", names.PROMPT: CANARY, names.ANSWER: CANARY, names.MODEL_SELECTED: "m"}
    trace = Trace("0" * 31 + "1", [Span("kvfleet.route", 1, 2, attributes)])
    known: dict[str, Any] = {
        "operation": Operation.CHAT, "body": BODY, "trace": trace, "allowlist": ("m",), "tenant": "t", "data_class": "public",
        "session": CANARY, "tags": {"k": "v"}, "seed": 7, "model": "m", "cost_usd": 0.5, "completion_tokens": 3,
    }  # fmt: skip
    return RecordedRequest(**{**known, **changes})


def test_a_record_with_content_comes_back_whole() -> None:
    """Every field, the trace included."""
    record = recorded(has_content=True, answer=CANARY)
    again = RecordedRequest.from_line(record.to_line())
    assert again == record


def test_a_record_without_content_says_nothing() -> None:
    """No text of the request, no session, no name of a tool, and nothing that the trace had captured."""
    line = recorded().to_line()
    again = RecordedRequest.from_line(line)
    assert CANARY.encode() not in line
    assert CANARY not in repr(again.trace.spans)
    assert CANARY not in repr(again.body)
    assert again.body["max_tokens"] == 5
    assert [message["role"] for message in again.body["messages"]] == ["system", "user", "assistant"]
    assert again.body["messages"][1]["content"][1]["type"] == "image_url"
    assert again.session
    assert recorded().to_line() == line


@given(st.text(max_size=50))
def test_filler_has_the_length_of_what_it_stands_for(text: str) -> None:
    """So a prompt's token estimate stays what it was."""
    (message,) = without_content({"messages": [{"role": "user", "content": text}]})["messages"]
    try:
        expected = estimate_tokens(text)
    except UnicodeEncodeError:
        return
    assert estimate_tokens(message["content"]) == expected


@given(st.dictionaries(st.sampled_from([*BODY, "prompt", "input", "other"]), JSON))
def test_any_body_can_be_stripped(body: dict[str, Any]) -> None:
    """Whatever a caller sends; the result is JSON, and stripping it again changes nothing."""
    stripped = without_content(body)
    assert orjson.loads(orjson.dumps(stripped)) == stripped
    assert without_content(stripped).keys() == stripped.keys()


def test_a_full_file_comes_before_its_successor(tmp_path: Path) -> None:
    """Records are read in the order in which they were written."""
    path = tmp_path / "r.jsonl"
    older(path).write_bytes(recorded(tenant="a").to_line() + recorded(tenant="b").to_line())
    path.write_bytes(recorded(tenant="c").to_line() + b"\n")
    assert [one.tenant for one in read_records(path)] == ["a", "b", "c"]
    assert [one.tenant for one in read_records(path, limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    "line", ["{}", "no json", "[]", '{"v": 1}', '{"v": 9}', '{"v": 1, "operation": "chat", "trace": "!"}']
)
def test_what_is_no_record_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    """The file and the line are named."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(recorded().to_line() + line.encode())
    with pytest.raises(TraceError, match=r"r\.jsonl:2: "):
        list(read_records(path))
