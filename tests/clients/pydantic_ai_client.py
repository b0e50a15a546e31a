"""pydantic-ai, over chat, responses and messages."""

import asyncio
from importlib.metadata import version

from expected import KEY, TEXT, URL, done
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


def models(name):
    """A model over each of the three APIs."""
    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)
    yield OpenAIChatModel(name, provider=provider)
    yield OpenAIResponsesModel(name, provider=provider)
    yield AnthropicModel(name, provider=AnthropicProvider(base_url=URL, api_key=KEY))


async def talk(model):
    """A plain call, a stream, and a call of a tool with its result."""
    assert (await Agent(model).run("Hi")).output == TEXT
    async with Agent(model).run_stream("Hi") as streamed:
        assert [text async for text in streamed.stream_text()][-1] == TEXT
    cities = []
    agent = Agent(model)

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        cities.append(city)
        return "Sunny."

    assert (await agent.run("Hi")).output == TEXT
    assert cities == ["Rome"]


async def fail(model, status):
    """An error is the library's own, also amid a stream."""
    try:
        async with Agent(model).run_stream("Hi") as streamed:
            raise AssertionError([text async for text in streamed.stream_text()])
    except ModelHTTPError as error:
        assert error.status_code == status


async def main():
    """All three, in one event loop: their clients share connections."""
    for model in models("llama"):
        await talk(model)
    for name, status in (("nobody", 404), ("busy", 429), ("breaks", 500)):
        for model in models(name):
            await fail(model, status)


asyncio.run(main())
done(f"pydantic-ai {version('pydantic-ai-slim')}")
