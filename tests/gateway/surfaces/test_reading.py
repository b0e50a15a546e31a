"""Bodies of other APIs: what is looked at is what an engine reads."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.errors import BadRequestError
from kvfleet.gateway.surfaces.responses import Responses


def test_a_response_cannot_say_two_things() -> None:
    """A field of chat beside the input would be looked at, while an engine that speaks Responses reads the input."""
    body = {"model": "m", "input": "my secret", "messages": [{"role": "user", "content": "harmless"}]}
    with pytest.raises(BadRequestError, match="takes its conversation as input") as caught:
        Responses().read(body, ())
    assert caught.value.param == "messages"
    assert Responses().read({"model": "m", "input": "my secret"}, ()).chat["messages"][0]["content"] == "my secret"


@pytest.mark.parametrize("given", [None, []])
def test_a_response_needs_something_to_answer(given: Any) -> None:
    """An input without a message is the client's mistake."""
    with pytest.raises(BadRequestError) as caught:
        Responses().read({"model": "m", "input": given}, ())
    assert caught.value.status == 400
