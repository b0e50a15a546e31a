"""A vLLM on the CPU that publishes its KV events, and a gateway that knows its cache by them."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import openai
import pytest

from kvfleet.adapters.call import Operation
from kvfleet.cache.tokens import LocalTokenizer, packed
from kvfleet.errors import TraceError
from kvfleet.trace.reader import TraceReader
from kvfleet.trace.spans import Trace
from tests.real import engines
from tests.real.contract import ASK, ASK_COUNT, TOOL, TOOL_TURN
from tests.real.engines import Engine, free_port
from tests.real.environments import model as tiny
from tests.real.gateways import gateway as gateway_of
from tests.real.gateways import model

BLOCK = 32
BLOCKS = 160
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "hello",
    "from",
    "a",
    "tiny",
    "model",
    "that",
    "counts",
]


@attrs.define
class Scene:
    """A gateway in front of one engine."""

    engine: Engine
    gateway: Engine
    folder: Path

    def ask(self, messages: list[Any], **more: Any) -> tuple[int, int, float, str]:
        """A chat: its prompt's tokens, those the engine had cached, those that were expected, and how that was known."""
        client = openai.OpenAI(base_url=f"{self.gateway.url}/v1", api_key="none", max_retries=0)
        with client:
            answer = client.chat.completions.with_raw_response.create(
                model="tiny", messages=messages, temperature=0, max_tokens=3, **more
            )
        usage = answer.parse().usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        expected, mode = self._expected(answer.headers["x-request-id"])
        return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0, expected, mode

    def _expected(self, request_id: str) -> tuple[float, str]:
        """What the trace says was expected of the engine."""
        trace = wait_for(lambda: self._trace(request_id))
        stage = next(span for span in trace.stages if span.name == "kvfleet.affinity.prefix")
        (value,) = stage.attributes["kvfleet.score.values"]  # type: ignore[misc]
        (mode,) = stage.attributes["kvfleet.affinity.modes"]  # type: ignore[misc]
        return float(value), str(mode)

    def _trace(self, request_id: str) -> Trace | None:
        with contextlib.suppress(TraceError), TraceReader(self.folder / "traces.sqlite") as reader:
            return reader.get(request_id)
        return None

    def mode(self) -> str:
        """How the gateway knows the engine's cache now."""
        (endpoint,) = httpx.get(f"{self.gateway.url}/health", trust_env=False).json()["endpoints"].values()
        return str(endpoint["cache_mode"])

    def metric(self, name: str) -> float:
        """A metric of the gateway's."""
        lines = self.metrics().splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(name + "{")))

    def metrics(self) -> str:
        """All of them."""
        return httpx.get(f"{self.gateway.url}/metrics", trust_env=False).text

    def settled(self) -> None:
        """Wait until what the engine told is known."""
        wait_for(lambda: self.mode() == "exact")
        time.sleep(0.3)  # a process of somebody else's says when it likes


def wait_for(found: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What is found, as soon as it is something."""
    by_s = time.monotonic() + seconds
    while time.monotonic() < by_s:
        if value := found():
            return value
        time.sleep(0.1)  # the same
    pytest.fail("it did not come")


@pytest.fixture(scope="module", params=["tokenizer", "engine"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """An engine with a small cache, and a gateway, for a module's tests; the prompts' tokens made here or there."""
    ports = free_port(), free_port()
    engine = engines.vllm(events=ports, blocks=BLOCKS)
    folder = tmp_path_factory.mktemp(request.param)
    told = {"endpoint": f"tcp://{{host}}:{ports[0]}", "replay": f"tcp://{{host}}:{ports[1]}", "topic": "kv"}
    blocks = {"mode": request.param, "block_tokens": BLOCK, "deadline_ms": 5000}
    if request.param == "tokenizer":
        blocks["tokenizer"] = str(tiny() / "hf")
    engine.start()
    gateway = gateway_of([model(engine, "vllm", kv_events=told, prompt_blocks=blocks)], folder)
    try:
        gateway.start()
        yield Scene(engine, gateway, folder)
    finally:
        gateway.stop()
        engine.stop()


def prompt(rng: random.Random, words: int) -> list[Any]:
    """A conversation's beginning."""
    return [{"role": "user", "content": " ".join(rng.choices(WORDS, k=words))}]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": ASK},
        {"messages": [{"role": "system", "content": "Be brief."}, *ASK_COUNT], "tools": [TOOL]},
        {"messages": TOOL_TURN, "tools": [TOOL]},
        {"messages": ASK, "tools": [{"function": {"odd": 1, "name": "f"}, "type": "function", "odd": 2}]},
        {
            "messages": ASK,
            "tools": [{"type": "function", "function": {"name": "f", "description": "é <b>", "strict": True}}],
        },
        {"messages": [{"role": "developer", "content": "Be brief."}, *ASK]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("One part,", "and another.")]}
            ]
        },
        {"messages": [*ASK, {"role": "assistant", "content": "Hel"}], "add_generation_prompt": False},
    ],
)
def test_tokens_made_here_are_the_engines(scene: Scene, body: dict[str, Any]) -> None:
    """Also of tools, tool calls, and texts in parts."""
    answer = httpx.post(f"{scene.engine.url}/tokenize", json={"model": "tiny", **body}, trust_env=False)
    made = LocalTokenizer.load(tiny() / "hf")
    assert made.cuts
    assert made.tokenise(Operation.CHAT, body) == packed(answer.json()["tokens"])


def test_every_answer_had_cached_what_was_expected(scene: Scene) -> None:
    """To the token: conversations that grow, tools, salts, and a cache that is too small and forgets."""
    scene.settled()
    rng = random.Random(1)
    talks = [prompt(rng, rng.randrange(20, 300)) for _ in range(8)]
    wrong, hits, modes = [], 0, set()
    for turn in range(60):
        talk = rng.choice(talks)
        more: dict[str, Any] = {"extra_body": {"cache_salt": "team"}} if turn % 7 == 3 else {}
        if turn % 5 == 4:
            more["tools"] = [TOOL]
        tokens, cached, expected, mode = scene.ask(talk, **more)
        hits += cached > 0
        modes.add(mode)
        if abs(expected - cached) > 1:  # 1 is what the home of an unknown prompt is given
            wrong.append((turn, tokens, cached, expected, mode))
        talk += [{"role": "assistant", "content": "Hello."}, *prompt(rng, 20)]
        scene.settled()
    assert wrong == []
    assert hits > 20
    assert modes <= {"exact", "none"}
    assert scene.metric("kvfleet_kv_gaps_total") == 0
    assert "kvfleet_prompt_tokens_miscounted_total{" not in scene.metrics()


def test_an_engine_that_is_killed_and_comes_back(scene: Scene) -> None:
    """Is not known while it is gone, known to hold nothing when it is back, and known exactly from then on."""
    scene.settled()
    talk = prompt(random.Random(2), 200)
    scene.ask(talk)
    scene.settled()
    assert scene.ask(talk)[3] == "exact"
    scene.engine.kill()
    wait_for(lambda: scene.mode() in ("degraded", "approximate"))
    scene.engine.start()
    wait_for(lambda: scene.mode() == "exact", 60)
    wait_for(lambda: scene.metric("kvfleet_model_health") == 1.0, 60)
    tokens, cached, expected, _ = scene.ask(talk)
    assert (cached, expected <= 1) == (0, True)
    scene.settled()
    assert scene.ask(talk) == (tokens, (tokens - 1) // BLOCK * BLOCK, (tokens - 1) // BLOCK * BLOCK, "exact")
    assert scene.metric("kvfleet_kv_restarts_total") == 1
