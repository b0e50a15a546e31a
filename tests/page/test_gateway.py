"""OpenAI-Compatible Gateway."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.cli.test_serve import gateway as served
from tests.docs.running import free_ports
from tests.page.fleets import QUICKSTART
from tests.page.living import live
from tests.page.printed import curl, fleet, run_apart

SERVE = "kvfleet serve fleet.yaml --port 8000"

CHAT = """\
curl http://localhost:8000/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "auto",
    "messages": [{"role": "user", "content": "Hello!"}]
  }'
"""

EXPLAIN = """\
curl http://localhost:8000/v1/route/explain \\
  -H "Content-Type: application/json" \\
  -d '{"messages": [{"role": "user", "content": "Hello"}]}'
"""

HEALTH = "curl http://localhost:8000/health"

SDK = """\
# Works with OpenAI Python SDK
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v1", api_key="optional")
response = client.chat.completions.create(
    model="auto",  # kvfleet selects the best model
    messages=[{"role": "user", "content": "What is Python?"}],
)
"""


@contextlib.contextmanager
def page_s_gateway(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`kvfleet serve fleet.yaml --port N` in a folder with the page's file."""
    (port,) = free_ports(1)
    command = SERVE.replace("8000", str(port)).split()[1:]
    (folder / "fleet.yaml").write_text(QUICKSTART)
    with served(folder, *[folder / "fleet.yaml" if part == "fleet.yaml" else part for part in command]) as (
        url,
        _,
        process,
    ):
        assert url.endswith(f":{port}")
        yield url, process


async def test_serve_starts_it(tmp_path: Path) -> None:
    """As printed, with the page's fleet: it listens on the port, explains, and says how the fleet is."""
    with page_s_gateway(tmp_path) as (url, _):
        explained = await curl(EXPLAIN, url)
        assert json.loads(explained.body)["selected_model"] == "llama-3-8b"
        health = await curl(HEALTH, url)
        assert (health.status, json.loads(health.body)["status"]) == (200, "ok")


async def test_a_chat_by_curl() -> None:
    """OpenAI's shape, and headers that say who answered."""
    async with live(fleet(QUICKSTART)) as gateway:
        answer = await curl(CHAT, gateway.url)
        body = json.loads(answer.body)
        assert (answer.status, body["object"]) == (200, "chat.completion")
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "llama-3-8b speaking."}
        assert answer.headers["x-kvfleet-model"] == "llama-3-8b"
        assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(body["usage"])


async def test_an_explanation_calls_nobody() -> None:
    """And names whom the same request then gets."""
    async with live(fleet(QUICKSTART)) as gateway:
        explained = json.loads((await curl(EXPLAIN, gateway.url)).body)
        assert [gateway.asked_of(model.name) for model in gateway.router.config.models] == [0, 0, 0]
        assert explained["selected_model"] == await gateway.served({"messages": [{"role": "user", "content": "Hello"}]})


async def test_openais_sdk() -> None:
    """The client reads the answer as one of OpenAI's own."""
    async with live(fleet(QUICKSTART)) as gateway:
        ran = await run_apart(SDK, at={"http://localhost:8000": gateway.url})
        assert ran["response"].choices[0].message.content == "llama-3-8b speaking."
        ran["client"].close()
        assert gateway.last.outcome == "answered"
