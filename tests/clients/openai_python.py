"""OpenAI's Python SDK: chat and responses."""

import json

import openai
from expected import KEY, MESSAGES, PARAMETERS, TEXT, URL, done

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
function = {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS}

# chat: whole, streamed, a tool, an error
chat = client.chat.completions
assert chat.create(model="llama", messages=MESSAGES).choices[0].message.content == TEXT
stream = chat.create(model="llama", messages=MESSAGES, stream=True, stream_options={"include_usage": True})
chunks = list(stream)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
assert chunks[-1].usage.prompt_tokens > 0
tools = [{"type": "function", "function": function}]
call = chat.create(model="llama", messages=MESSAGES, tools=tools).choices[0].message.tool_calls[0]
assert json.loads(call.function.arguments) == {"city": "Rome"}
results = [
    *MESSAGES,
    {"role": "assistant", "tool_calls": [call.model_dump()]},
    {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
]
assert chat.create(model="llama", messages=results, tools=tools).choices[0].message.content == TEXT
try:
    chat.create(model="nobody", messages=MESSAGES)
    raise AssertionError("nobody answered")
except openai.NotFoundError as error:
    assert error.code == "model_not_found"

try:
    chat.create(model="busy", messages=MESSAGES)
    raise AssertionError("who is busy answered")
except openai.RateLimitError as error:
    assert int(error.response.headers["retry-after"]) >= 1
said = []
try:
    said.extend(chat.create(model="breaks", messages=MESSAGES, stream=True))
    raise AssertionError("a broken stream was called complete")
except openai.APIError as error:
    assert error.code == "stream_interrupted"
    assert said

# responses: the same
answer = client.responses.create(model="llama", input="Hi")
assert (answer.output_text, answer.status) == (TEXT, "completed")
events = list(client.responses.create(model="llama", input="Hi", stream=True))
assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == TEXT
assert events[-1].type == "response.completed"
tools = [{"type": "function", "strict": False, **function}]
with client.responses.stream(model="llama", input="Hi", tools=tools) as stream:
    called = stream.get_final_response().output[0]
assert (called.type, json.loads(called.arguments)) == ("function_call", {"city": "Rome"})
try:
    client.responses.create(model="llama", input="Hi", previous_response_id="resp_1")
    raise AssertionError("a memory nobody has")
except openai.BadRequestError as error:
    assert error.param == "previous_response_id"
try:
    client.responses.create(model="busy", input="Hi")
    raise AssertionError("who is busy answered")
except openai.RateLimitError:
    pass
try:
    with client.responses.stream(model="breaks", input="Hi") as stream:
        stream.get_final_response()
    raise AssertionError("a broken stream was called complete")
except openai.APIError as error:
    assert error.code == "stream_interrupted"

done(f"openai {openai.__version__}")
