"""OpenAI's chat bodies in Anthropic's words. The native shapes are those of the types of the `anthropic` package."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.anthropic_bodies import chat_body
from kvfleet.errors import BackendError, Fault
from tests.adapters.told import USER

MARK = {"type": "ephemeral"}
WEATHER = {"name": "weather", "description": "It says.", "parameters": {"type": "object", "properties": {"city": {}}}}
CALL = {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}


def made(is_stream: bool = False, max_tokens: int = 4096, **body: Any) -> dict[str, Any]:
    """The native body; a greeting if no messages are given."""
    return chat_body({"messages": [USER], **body}, model="claude", is_stream=is_stream, max_tokens=max_tokens)


def turns(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """The native messages."""
    found: list[dict[str, Any]] = made(messages=list(messages))["messages"]
    return found


def refused(**body: Any) -> BackendError:
    """The refusal of a body."""
    with pytest.raises(BackendError) as caught:
        made(**body)
    assert caught.value.kind is Fault.BAD_REQUEST
    assert caught.value.status == 400
    return caught.value


def test_the_least_body_has_the_limit_anthropic_needs() -> None:
    """The option's limit holds where the request has none; either of OpenAI's names sets it."""
    assert made() == {"model": "claude", "max_tokens": 4096, "messages": [USER]}
    assert made(max_tokens=9)["max_tokens"] == 9
    assert chat_body({"messages": [USER], "max_tokens": 5}, model="c", is_stream=False, max_tokens=9)["max_tokens"] == 5
    assert made(max_completion_tokens=6)["max_tokens"] == 6
    assert made(max_completion_tokens=0)["max_tokens"] == 0
    assert made(is_stream=True)["stream"] is True


def test_sampling_stops_and_the_user_go_over() -> None:
    """A single stop text becomes a list; `user` is Anthropic's `metadata.user_id`."""
    found = made(temperature=0.2, top_p=0.9, stop="END", user="u-1", service_tier="default", metadata={"team": "a"})
    rest = {key: value for key, value in found.items() if key not in ("model", "max_tokens", "messages")}
    assert rest == {
        "temperature": 0.2,
        "top_p": 0.9,
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u-1"},
        "service_tier": "standard_only",
    }
    assert made(stop=["a", "b"])["stop_sequences"] == ["a", "b"]
    assert made(user="u", metadata={"user_id": "native"})["metadata"] == {"user_id": "native"}


def test_anthropics_own_and_unknown_fields_are_forwarded() -> None:
    """Thinking, top_k, automatic caching, and whatever comes next; OpenAI's hints about storage stay behind."""
    own: dict[str, Any] = {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "top_k": 5,
        "cache_control": MARK,
        "new_thing": [1],
    }
    found = made(**own, store=True, prompt_cache_key="k", stream_options={"include_usage": True})
    assert {key: found[key] for key in own} == own
    assert not found.keys() & {"store", "prompt_cache_key", "stream_options"}


def test_the_system_prompt_leaves_the_messages() -> None:
    """One plain text stays a text; several, or one that is marked for the cache, become blocks in their order."""
    system = {"role": "system", "content": "Be kind."}
    assert made(messages=[system, USER])["system"] == "Be kind."
    marked = {"role": "developer", "content": [{"type": "text", "text": "Long.", "cache_control": MARK}]}
    found = made(messages=[system, marked, USER, {"role": "system", "content": "Be brief."}])
    assert found["messages"] == [USER]
    assert found["system"] == [
        {"type": "text", "text": "Be kind."},
        {"type": "text", "text": "Long.", "cache_control": MARK},
        {"type": "text", "text": "Be brief."},
    ]


def test_parts_become_blocks() -> None:
    """Text, images inline and by URL, documents, native blocks; marks for the cache stay where they were."""
    parts = [
        {"type": "text", "text": "Look", "cache_control": MARK},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}, "cache_control": MARK},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,BBBB", "filename": "a.pdf"}},
        {"type": "search_result", "source": "s", "title": "t", "content": []},
        {"type": "text", "text": ""},
    ]
    assert turns({"role": "user", "content": parts})[0]["content"] == [
        {"type": "text", "text": "Look", "cache_control": MARK},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
        {
            "type": "image",
            "source": {"type": "url", "url": "https://example.com/a.jpg"},
            "cache_control": MARK,
        },
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"},
            "title": "a.pdf",
        },
        {"type": "search_result", "source": "s", "title": "t", "content": []},
    ]


def test_a_mark_on_a_message_stands_on_its_last_block() -> None:
    """Where Anthropic reads it."""
    found = turns({"role": "user", "content": "Hi", "cache_control": MARK})
    assert found == [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": MARK}]}]


def test_tools_called_before_and_their_results() -> None:
    """Thoughts first, as they were signed; arguments as an object; the results of one turn's calls in one turn."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "sig"}
    second = {**CALL, "id": "toolu_2", "function": {"name": "weather", "arguments": ""}}
    answer = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, second]}
    found = turns(
        USER,
        {**answer, "reasoning_content": "Hm.", "thinking_blocks": [{"index": 0, **thought}]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Sunny"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": [{"type": "text", "text": "No"}], "is_error": True},
        {"role": "user", "content": "Thanks"},
    )
    assert found[1]["content"] == [
        thought,
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
        {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
    ]
    assert found[2] == {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny"},
            {
                "type": "tool_result",
                "tool_use_id": "toolu_2",
                "content": [{"type": "text", "text": "No"}],
                "is_error": True,
            },
        ],
    }
    assert found[3] == {"role": "user", "content": "Thanks"}


def test_tools_offered() -> None:
    """A function's schema is its input schema; strictness and cache marks stay; Anthropic's own tools are untouched."""
    own = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    function = {"type": "function", "function": {**WEATHER, "strict": True}, "cache_control": MARK}
    found = made(tools=[function, {"type": "function", "function": {"name": "now"}}, own])
    assert found["tools"] == [
        {
            "cache_control": MARK,
            "name": "weather",
            "description": "It says.",
            "strict": True,
            "input_schema": WEATHER["parameters"],
        },
        {"name": "now", "input_schema": {"type": "object", "properties": {}}},
        own,
    ]
    assert "tool_choice" not in found


@pytest.mark.parametrize(
    ("choice", "native"),
    [
        ("auto", {"type": "auto"}),
        ("required", {"type": "any"}),
        ("none", {"type": "none"}),
        ({"type": "function", "function": {"name": "weather"}}, {"type": "tool", "name": "weather"}),
        ({"type": "any"}, {"type": "any"}),
    ],
)
def test_the_choice_of_tools(choice: Any, native: dict[str, str]) -> None:
    """OpenAI's words in Anthropic's; one call at a time is part of the choice there, and of none where none is made."""
    tools = [{"type": "function", "function": WEATHER}]
    assert made(tools=tools, tool_choice=choice)["tool_choice"] == native
    one = made(tools=tools, tool_choice=choice, parallel_tool_calls=False)["tool_choice"]
    assert one == (native if choice == "none" else {**native, "disable_parallel_tool_use": True})
    assert "tool_choice" not in made(tool_choice=choice)


def test_one_call_at_a_time_without_a_choice() -> None:
    """The choice is then the model's, as it is by default."""
    found = made(tools=[{"type": "function", "function": WEATHER}], parallel_tool_calls=False)
    assert found["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}


def test_json_by_a_schema_is_anthropics_own() -> None:
    """It goes to `output_config`, beside what the client put there, with the effort."""
    schema = {"type": "object", "properties": {}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    found = made(response_format=wanted, reasoning_effort="minimal")
    assert found["output_config"] == {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    assert made(output_config={"effort": "max"}, reasoning_effort="low")["output_config"] == {"effort": "max"}
    assert made(reasoning_effort="none")["thinking"] == {"type": "disabled"}


def test_json_mode_is_refused_or_becomes_an_instruction() -> None:
    """Never lost in silence: the refusal names both remedies."""
    wanted = {"type": "json_object"}
    assert "json_object: instruct" in refused(response_format=wanted).message
    body = {"messages": [{"role": "system", "content": "Be kind."}, USER], "response_format": wanted}
    found = chat_body(body, model="c", is_stream=False, max_tokens=1, may_instruct=True)
    assert found["system"][0]["text"] == "Be kind."
    assert "JSON object" in found["system"][1]["text"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n", 2),
        ("seed", 0),
        ("logprobs", True),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"1": 2}),
        ("functions", [WEATHER]),
        ("modalities", ["text", "audio"]),
        ("service_tier", "flex"),
        ("response_format", {"type": "grammar"}),
        ("tools", [{"type": "custom", "custom": {"name": "x"}}]),
        ("messages", "Hi"),
        ("messages", [{"role": "critic", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/x"}}]}]),
        ("messages", [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "x", "arguments": "["}}]}]),
    ],
)
def test_what_anthropic_lacks_is_refused(key: str, value: Any) -> None:
    """The error names the field."""
    error = refused(**{key: value})
    assert error.body is not None
    assert error.body["param"] == key


def test_fields_may_be_ignored_by_option_and_values_that_change_nothing_always() -> None:
    """An operator decides it once for all clients."""
    body = {"messages": [USER], "seed": 7, "logit_bias": {"1": 2}}
    found = chat_body(body, model="c", is_stream=False, max_tokens=1, ignored=("seed", "logit_bias"))
    assert found == {"model": "c", "max_tokens": 1, "messages": [USER]}
    assert made(frequency_penalty=0, logprobs=False, n=1, logit_bias={}) == made()
