"""Anthropic's Python SDK."""

import anthropic
from expected import KEY, MESSAGES, PARAMETERS, TEXT, URL, done

client = anthropic.Anthropic(base_url=URL, api_key=KEY)
ask = {"model": "llama", "max_tokens": 100, "messages": MESSAGES}
tools = [{"name": "weather", "description": "The weather in a city.", "input_schema": PARAMETERS}]

message = client.messages.create(**ask, system="Be brief.")
assert (message.content[0].text, message.stop_reason) == (TEXT, "end_turn")
with client.messages.stream(**ask) as stream:
    assert "".join(stream.text_stream) == TEXT
    assert stream.get_final_message().usage.input_tokens > 0

with client.messages.stream(**ask, tools=tools) as stream:
    message = stream.get_final_message()
(call,) = message.content
assert (message.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Rome"})
turns = [
    *MESSAGES,
    {"role": "assistant", "content": message.content},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}]},
]
assert client.messages.create(**{**ask, "messages": turns}, tools=tools).content[0].text == TEXT

assert client.messages.count_tokens(model="llama", messages=MESSAGES).input_tokens > 0
assert "llama" in [model.id for model in client.models.list()]
try:
    client.messages.create(**{**ask, "model": "nobody"})
    raise AssertionError("nobody answered")
except anthropic.NotFoundError as error:
    assert error.body["error"]["type"] == "not_found_error"
    assert error.request_id
try:
    anthropic.Anthropic(base_url=URL, api_key="wrong").messages.create(**ask)
    raise AssertionError("a wrong key was taken")
except anthropic.AuthenticationError:
    pass
try:
    client.messages.create(**{**ask, "model": "busy"})
    raise AssertionError("who is busy answered")
except anthropic.RateLimitError as error:
    assert int(error.response.headers["retry-after"]) >= 1
try:
    with client.messages.stream(**{**ask, "model": "breaks"}) as stream:
        stream.get_final_message()
    raise AssertionError("a broken stream was called complete")
except anthropic.APIStatusError as error:
    assert error.body["error"]["type"] == "api_error"

done(f"anthropic {anthropic.__version__}")
