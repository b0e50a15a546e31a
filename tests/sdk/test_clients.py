"""The fleet inside a Python program, with and without an event loop."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.errors import ConfigError, ModelNotFoundError
from kvfleet.runtime import Router
from kvfleet.sdk.async_client import AsyncFleetClient
from kvfleet.sdk.sync_client import SyncFleetClient
from kvfleet.testing.fakes import FakeAdapter, FakeReply

MODEL = ModelConfig(name="llama", endpoint="http://gpu-1:8000", provider="vllm")
FLEET = FleetConfig(models=(MODEL,))
YAML = "models: [{name: toy, provider: mock, options: {speed: 1000, reply: Hello there}}]\n"


def fake(**reply: object) -> dict[str, FakeAdapter]:
    """What answers for the fleet."""
    return {MODEL.id: FakeAdapter(endpoint=MODEL.endpoint, model_id="llama", script=FakeReply(**reply))}  # type: ignore[arg-type]


class TestAsync:
    async def test_from_a_file(self, tmp_path: Path) -> None:
        """A fleet file, a question, an answer."""
        path = tmp_path / "fleet.yaml"
        path.write_text(YAML)
        async with AsyncFleetClient.from_yaml(path) as client:
            assert (await client.chat("Hi")).content == "Hello there"

    async def test_a_prompt_or_messages(self) -> None:
        """A prompt is one user message; options reach the engine."""
        adapters = fake(text="Yes.")
        async with AsyncFleetClient.from_config(FLEET, adapters=adapters, polls=False) as client:
            response = await client.chat("Hi", temperature=0.5)
            await client.chat(messages=[{"role": "user", "content": "Ho"}])
        assert (response.content, response.endpoint) == ("Yes.", MODEL.endpoint)
        bodies = [call.body for call in adapters[MODEL.id].calls]
        assert bodies[0]["messages"] == [{"role": "user", "content": "Hi"}]
        assert bodies[0]["temperature"] == 0.5
        assert bodies[1]["messages"] == [{"role": "user", "content": "Ho"}]

    async def test_the_explanation_comes_along(self) -> None:
        """Why it went there, and that a simulation says the same and asks nobody."""
        adapters = fake()
        async with AsyncFleetClient.from_config(FLEET, adapters=adapters, polls=False) as client:
            simulated = await client.simulate("Hi")
            assert adapters[MODEL.id].calls == []
            _, explanation = await client.chat_with_explanation("Hi")
        assert simulated.selected_model == explanation.selected_model == "llama"
        assert explanation.served_by == "llama"

    async def test_a_stream(self) -> None:
        """Chunks as they come, and the explanation after the last."""
        async with (
            AsyncFleetClient.from_config(FLEET, adapters=fake(text="one two three"), polls=False) as client,
            client.stream("Hi") as chunks,
        ):
            said = "".join([chunk.content async for chunk in chunks])
            assert said == "one two three"
            assert chunks.explanation.served_by == "llama"

    async def test_leaving_a_stream_stops_the_engine(self) -> None:
        """The block's end is the stream's."""
        adapters = fake(text="word " * 1000)
        async with AsyncFleetClient.from_config(FLEET, adapters=adapters, polls=False) as client:
            async with client.stream("Hi") as chunks:
                async for _ in chunks:
                    break
            assert adapters[MODEL.id].cancelled == 1

    async def test_health_and_close(self) -> None:
        """Health asks every endpoint; closing twice is harmless."""
        adapters = fake()
        client = AsyncFleetClient.from_config(FLEET, adapters=adapters, polls=False)
        assert (await client.health())[MODEL.endpoint].healthy
        await client.close()
        await client.close()
        assert adapters[MODEL.id].closed >= 1

    async def test_a_router_of_ones_own(self) -> None:
        """The client is a face: the router behind it is the one it was given."""
        router = Router(FLEET, adapters=fake(), polls=False)
        async with AsyncFleetClient(router) as client:
            assert client.router is router

    async def test_errors_are_the_routers(self) -> None:
        """An unknown model raises what the router raises."""
        async with AsyncFleetClient.from_config(FLEET, adapters=fake(), polls=False) as client:
            with pytest.raises(ModelNotFoundError):
                await client.chat("Hi", model="nobody")


class TestSync:
    def test_a_whole_conversation(self, tmp_path: Path) -> None:
        """From a file, without any event loop of one's own."""
        path = tmp_path / "fleet.yaml"
        path.write_text(YAML)
        with SyncFleetClient.from_yaml(path) as client:
            response, explanation = client.chat_with_explanation("Hi")
            assert client.chat(messages=[{"role": "user", "content": "Hi"}]).content == response.content
            assert client.simulate("Hi").selected_model == explanation.selected_model == "toy"
            assert all(health.healthy for health in client.health().values())
        assert response.content == "Hello there"

    def test_a_stream(self) -> None:
        """An ordinary for loop over chunks, and the explanation after the last."""
        with (
            SyncFleetClient.from_config(FLEET, adapters=fake(text="one two three"), polls=False) as client,
            client.stream("Hi") as chunks,
        ):
            assert "".join(chunk.content for chunk in chunks) == "one two three"
            assert chunks.explanation.served_by == "llama"

    def test_leaving_a_stream_stops_the_engine(self) -> None:
        """The block's end is the stream's, also after half of it."""
        adapters = fake(text="word " * 1000)
        with SyncFleetClient.from_config(FLEET, adapters=adapters, polls=False) as client:
            with client.stream("Hi") as chunks:
                next(iter(chunks))
            assert adapters[MODEL.id].cancelled == 1

    async def test_inside_a_running_event_loop(self) -> None:
        """A notebook's own loop is no hindrance: the client has a thread of its own."""
        with SyncFleetClient.from_config(FLEET, adapters=fake(text="Yes."), polls=False) as client:
            assert client.chat("Hi").content == "Yes."

    def test_clients_and_threads_do_not_disturb_each_other(self) -> None:
        """Two clients in two loops, each called from several threads."""
        said: list[str] = []
        with (
            SyncFleetClient.from_config(FLEET, adapters=fake(text="a"), polls=False) as one,
            SyncFleetClient.from_config(FLEET, adapters=fake(text="b"), polls=False) as two,
        ):
            threads = [
                threading.Thread(target=lambda client=client: said.append(client.chat("Hi").content))
                for client in (one, two) * 5
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sorted(said) == ["a"] * 5 + ["b"] * 5

    def test_closing_ends_the_thread(self) -> None:
        """After `close`, which may be called twice, no thread is left."""
        before = threading.active_count()
        client = SyncFleetClient.from_config(FLEET, adapters=fake(), polls=False)
        assert threading.active_count() == before + 1
        client.close()
        client.close()
        assert threading.active_count() == before

    def test_a_fleet_that_cannot_be_built_leaves_no_thread(self) -> None:
        """A configuration error comes out as it is, and the thread is gone."""
        before = threading.active_count()
        with pytest.raises(ConfigError):
            SyncFleetClient.from_config(FleetConfig(models=(MODEL,), strategy="nonsense"))
        assert threading.active_count() == before
