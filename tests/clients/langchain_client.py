"""LangChain, over chat, responses and messages."""

from importlib.metadata import version

import anthropic
import openai
from expected import KEY, TEXT, URL, done
from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"Sunny in {city}."


def models(name):
    """A model over each of the three APIs."""
    yield ChatOpenAI(model=name, base_url=f"{URL}/v1", api_key=KEY)
    yield ChatOpenAI(model=name, base_url=f"{URL}/v1", api_key=KEY, use_responses_api=True)
    yield ChatAnthropic(model=name, base_url=URL, api_key=KEY, max_tokens=100)


for model in models("llama"):
    assert model.invoke("Hi").text == TEXT
    assert model.invoke("Hi").usage_metadata["input_tokens"] > 0
    assert "".join(chunk.text for chunk in model.stream("Hi")) == TEXT
    asked = model.bind_tools([weather]).invoke("Hi")
    (call,) = asked.tool_calls
    assert call["args"] == {"city": "Rome"}
    result = weather.invoke(call)
    assert model.bind_tools([weather]).invoke([("user", "Hi"), asked, result]).text == TEXT

for model in models("nobody"):
    try:
        model.invoke("Hi")
        raise AssertionError("nobody answered")
    except (openai.NotFoundError, anthropic.NotFoundError):
        pass
for model in models("busy"):
    try:
        model.invoke("Hi")
        raise AssertionError("who is busy answered")
    except (openai.RateLimitError, anthropic.RateLimitError):
        pass

for model in models("breaks"):
    try:
        list(model.stream("Hi"))
        raise AssertionError("a broken stream was called complete")
    except (openai.APIError, anthropic.APIError, ValueError) as error:  # a ValueError where a response failed
        assert "broke off" in str(error)

done(", ".join(f"{name} {version(name)}" for name in ("langchain-core", "langchain-openai", "langchain-anthropic")))
