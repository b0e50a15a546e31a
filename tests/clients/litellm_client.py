"""LiteLLM as a client, over chat, messages and responses."""

import json
import os
from importlib.metadata import version

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network as it is imported
import litellm
from expected import KEY, MESSAGES, PARAMETERS, TEXT, URL, done

litellm.telemetry = False
OPENAI = {"api_base": f"{URL}/v1", "api_key": KEY, "num_retries": 0}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": PARAMETERS}}]

for name, access in (("openai/llama", OPENAI), ("anthropic/llama", {**OPENAI, "api_base": URL, "max_tokens": 100})):
    ask = {"model": name, "messages": MESSAGES, **access}
    answer = litellm.completion(**ask)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage.prompt_tokens > 0
    assert "".join(c.choices[0].delta.content or "" for c in litellm.completion(**ask, stream=True)) == TEXT
    call = litellm.completion(**ask, tools=TOOLS).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    try:
        litellm.completion(**{**ask, "model": name.replace("llama", "nobody")})
        raise AssertionError("nobody answered")
    except litellm.NotFoundError:
        pass
    try:
        litellm.completion(**{**ask, "model": name.replace("llama", "busy")})
        raise AssertionError("who is busy answered")
    except litellm.RateLimitError:
        pass
    try:
        list(litellm.completion(**{**ask, "model": name.replace("llama", "breaks")}, stream=True))
        raise AssertionError("a broken stream was called complete")
    except litellm.ServiceUnavailableError as error:
        assert "broke off" in str(error)

answer = litellm.responses(model="openai/llama", input="Hi", **OPENAI)
assert answer.output[0].content[0].text == TEXT
kinds = [event.type for event in litellm.responses(model="openai/llama", input="Hi", stream=True, **OPENAI)]
assert kinds[-1] == "response.completed"

done(f"litellm {version('litellm')}")
