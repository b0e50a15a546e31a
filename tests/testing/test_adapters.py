"""What the conformance kit tries on an adapter."""

from __future__ import annotations

from typing import Any

import attrs
import orjson

from kvfleet.adapters.base import EndpointHealth, InferenceAdapter
from kvfleet.adapters.call import Call, Reply
from tests.testing.made import breaches


@attrs.define(kw_only=True)
class BadAdapter(InferenceAdapter):
    """Breaks what an adapter can break."""

    async def send(self, call: Call) -> Any:
        call.body["seen"] = True  # type: ignore[index]
        if call.stream:
            return Reply(events=_events())
        if call.operation == "chat":
            return Reply(body=b"hello")
        if call.operation == "completion":
            return Reply(body=orjson.dumps({"choices": []}))
        if call.operation == "embedding":
            return b"bytes"
        raise ValueError("no such thing")

    async def health_check(self) -> EndpointHealth:
        raise OSError("down")

    async def get_metrics(self) -> Any:
        return []

    async def list_models(self) -> Any:
        raise OSError("down")


async def _events() -> Any:
    yield b'data: {"choices":[]}\n\n'


class TestAdapters:
    def test_each_breach_is_named(self) -> None:
        """Bodies, streams, errors, health and control calls: all in one list."""
        assert breaches(BadAdapter) == (
            "send() for chat gives a body that is not JSON",
            "send() for chat changes the call's body",
            "send() for chat, streamed, ends without data: [DONE]",
            "send() for chat, streamed, changes the call's body",
            "send() for completion gives an answer without choices",
            "send() for completion changes the call's body",
            "send() for completion, streamed, ends without data: [DONE]",
            "send() for completion, streamed, changes the call's body",
            "send() for embedding must give a Reply, not bytes",
            "send() for embedding changes the call's body",
            "send() for rerank must end in an answer or a BackendError, not in ValueError: no such thing",
            "send() for rerank changes the call's body",
            "health_check() must never raise; it raises OSError: down",
            "list_models() may only raise BackendError, not OSError: down",
            "get_metrics() must give a Mapping, not list",
        )
