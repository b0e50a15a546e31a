"""OpenAI's request bodies in the words of Ollama's native API, which are those of its ``api/types.go``."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from kvfleet.adapters.ollama_bodies import chat_body, completion_body, embedding_body
from kvfleet.errors import BackendError, Fault
from tests.adapters.told import USER

PIXEL = base64.b64encode(b"not really a picture").decode()
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def theirs(body: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Ollama's chat body for an OpenAI one."""
    return chat_body({"model": "gpt", **body}, model="llama3", is_stream=False, defaults=defaults)


def test_a_chat_body_says_all_of_it_in_ollamas_words() -> None:
    """Sampling parameters go under options, the format and the effort get their own names, the rest goes along."""
    given = {
        "messages": [USER],
        "temperature": 0,
        "top_p": 0.5,
        "seed": 7,
        "stop": "END",
        "max_tokens": 5,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "top_k": 3,
        "num_ctx": 2048,
        "response_format": {"type": "json_object"},
        "reasoning_effort": "minimal",
        "logprobs": True,
        "top_logprobs": 2,
        "keep_alive": "10m",
        "something_new": {"a": 1},
    }
    assert theirs(given, truncate=False) == {
        "model": "llama3",
        "stream": False,
        "messages": [USER],
        "options": {
            "temperature": 0,
            "top_p": 0.5,
            "seed": 7,
            "stop": ["END"],
            "num_predict": 5,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "top_k": 3,
            "num_ctx": 2048,
        },
        "format": "json",
        "think": "low",
        "logprobs": True,
        "top_logprobs": 2,
        "keep_alive": "10m",
        "something_new": {"a": 1},
        "truncate": False,
    }


def test_what_the_request_says_in_ollamas_own_words_wins() -> None:
    """`options`, `format` and `think` of the request stand above what was translated, and above the defaults."""
    given = {
        "messages": [USER],
        "max_tokens": 5,
        "options": {"num_predict": 9, "mirostat": 2},
        "format": {"type": "object"},
        "response_format": {"type": "json_object"},
        "think": True,
        "reasoning_effort": "none",
        "keep_alive": -1,
    }
    found = theirs(given, keep_alive="5m")
    assert found["options"] == {"num_predict": 9, "mirostat": 2}
    assert (found["format"], found["think"], found["keep_alive"]) == ({"type": "object"}, True, -1)


def test_the_newer_name_of_the_token_limit_wins() -> None:
    """`max_completion_tokens` replaced `max_tokens`."""
    assert theirs({"messages": [USER], "max_tokens": 5, "max_completion_tokens": 6})["options"] == {"num_predict": 6}


def test_a_json_schema_becomes_the_format() -> None:
    """Ollama takes the schema itself."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    assert theirs({"messages": [USER], "response_format": wanted})["format"] == {"type": "object"}
    assert "format" not in theirs({"messages": [USER], "response_format": {"type": "text"}})


def test_pictures_and_texts_of_a_message_are_parted() -> None:
    """Ollama has the texts in one string and the pictures, as bare base64, beside it."""
    parts = [
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
        {"type": "text", "text": "this?"},
        {"type": "input_audio", "input_audio": {"data": PIXEL, "format": "wav"}},
    ]
    assert theirs({"messages": [{"role": "user", "content": parts}]})["messages"] == [
        {"role": "user", "content": "What is\nthis?", "images": [PIXEL, PIXEL]}
    ]


def test_a_round_of_tool_calls_survives() -> None:
    """Arguments become an object, a result names its tool, and ids, thoughts and unknown fields stay."""
    asked = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {**USER, "cached": True},
        {"role": "assistant", "content": None, "reasoning_content": "Paris, then.", "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    found = theirs({"messages": messages, "tools": [TOOL], "tool_choice": "auto"})
    assert found["tools"] == [TOOL]
    assert found["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi", "cached": True},
        {
            "role": "assistant",
            "content": "",
            "thinking": "Paris, then.",
            "tool_calls": [
                {"id": "call_1", "function": {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}}
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1", "tool_name": "get_weather"},
    ]


def test_tools_that_must_not_be_called_are_not_offered() -> None:
    """Ollama has no `tool_choice`; offering none is the same as forbidding all."""
    assert "tools" not in theirs({"messages": [USER], "tools": [TOOL], "tool_choice": "none"})


BAD_CALL = {"id": "c", "function": {"name": "f", "arguments": "[1]"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "several answers": ({"messages": [USER], "n": 2}, "n"),
    "a forced tool": ({"messages": [USER], "tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    "a linked picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
        "messages",
    ),
    "an unknown part": ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages"),
    "arguments that are no object": ({"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}, "messages"),
    "an unknown format": ({"messages": [USER], "response_format": {"type": "grammar"}}, "response_format"),
    "no messages": ({}, "messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_ollama_cannot_do_is_refused_as_the_callers_mistake(name: str) -> None:
    """Never left out in silence: a 400 in OpenAI's shape names the field."""
    body, param = REFUSED[name]
    with pytest.raises(BackendError) as caught:
        theirs(body)
    assert (caught.value.kind, caught.value.status) == (Fault.BAD_REQUEST, 400)
    assert caught.value.body is not None
    assert caught.value.body["param"] == param


def test_a_text_completion_goes_to_the_model_as_it_is() -> None:
    """No template is put around the prompt, as with other engines, unless the middle is to be filled in."""
    body = {"prompt": ["Once"], "max_tokens": 4}
    found = completion_body(body, model="llama3", is_stream=True, defaults={"truncate": False})
    assert found == {
        "model": "llama3",
        "stream": True,
        "prompt": "Once",
        "raw": True,
        "options": {"num_predict": 4},
        "truncate": False,
    }
    filled = completion_body({"prompt": "a", "suffix": "c"}, model="llama3", is_stream=False, defaults={})
    assert (filled["raw"], filled["suffix"]) == (False, "c")


@pytest.mark.parametrize("body", [{"prompt": ["a", "b"]}, {"prompt": [1, 2]}, {"prompt": "a", "echo": True}])
def test_completions_ollama_cannot_give_are_refused(body: dict[str, Any]) -> None:
    """Several prompts, token numbers, an echo."""
    with pytest.raises(BackendError) as caught:
        completion_body(body, model="llama3", is_stream=False, defaults={})
    assert caught.value.kind is Fault.BAD_REQUEST


def test_embeddings_take_texts_and_nothing_else() -> None:
    """A list of texts and the dimensions go along; token numbers are refused."""
    body = {"input": ["a", "b"], "dimensions": 2, "encoding_format": "base64"}
    assert embedding_body(body, model="e", defaults={}) == {"model": "e", "input": ["a", "b"], "dimensions": 2}
    with pytest.raises(BackendError):
        embedding_body({"input": [1, 2]}, model="e", defaults={})
