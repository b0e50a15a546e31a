"""Installation and Quickstart: a file, a question from Python, and the commands that inspect it."""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import metadata
from pathlib import Path

import pytest

from tests.page.fleets import QUICKSTART
from tests.page.loopback import Served, serving
from tests.page.printed import fleet, run_apart, shell

ROUTE = """\
import asyncio
from kvfleet import Router
from kvfleet.config.loader import load_config

async def main():
    config = load_config("fleet.yaml")
    router = Router(config)

    response, explanation = await router.route(
        prompt="Explain quantum computing in simple terms",
        data_class="internal",
    )

    print(f"Model: {explanation.selected_model}")
    print(f"Response: {response.content}")
    print(f"\\nExplanation:\\n{explanation.summary()}")

    await router.close()

asyncio.run(main())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's file in it."""
    (tmp_path / "fleet.yaml").write_text(QUICKSTART)
    return tmp_path


def test_the_extras_are_there() -> None:
    """Whoever installs kvfleet with one of the page's extras gets no warning of an unknown one."""
    assert {"gateway", "semantic", "dev"} <= set(metadata("kvfleet").get_all("Provides-Extra") or ())


async def test_init_writes_a_file_to_begin_with(tmp_path: Path) -> None:
    """`kvfleet init --output fleet.yaml`, and the file is valid."""
    await shell("kvfleet init --output fleet.yaml", folder=tmp_path)
    await shell("kvfleet validate fleet.yaml", folder=tmp_path)


def test_the_file_is_valid() -> None:
    """As printed, without a finding; what it says arrives."""
    config = fleet(QUICKSTART)
    assert [model.name for model in config.models] == ["llama-3-8b", "llama-3-70b", "gpt-4o-fallback"]
    assert config.models[0].get_model_id() == "meta-llama/Llama-3-8B-Instruct"
    assert (config.fallback.max_attempts, config.cache_affinity.prefix_hash_tokens) == (3, 128)


async def test_a_question_from_python(folder: Path) -> None:
    """The program prints model, answer and explanation; internal data never reaches the cloud."""
    async with serving(Served("It is about chance."), Served("In other words.")) as (small, large):
        at = {"http://gpu-1:8000": small.url, "http://gpu-2:8000": large.url}
        config = QUICKSTART
        for shown, real in at.items():
            config = config.replace(shown, real)
        (folder / "here.yaml").write_text(config)
        ran = await run_apart(ROUTE, at={"fleet.yaml": str(folder / "here.yaml")})
    assert ran.lines[:4] == ["Model: llama-3-8b", "Response: It is about chance.", "", "Explanation:"]
    assert ran.lines[4:6] == ["Strategy: hybrid_score", "Selected: llama-3-8b"]
    assert any(line.startswith("  ✗ gpt-4o-fallback") and "rejected" in line for line in ran.lines)
    assert "  [BLOCK] data_class_enforcement" in ran.printed
    (asked,) = [json.loads(request.body) for request in small.requests if request.method == "POST"]
    assert asked["model"] == "meta-llama/Llama-3-8B-Instruct"


async def test_validate_and_inspect(folder: Path) -> None:
    """The four commands: validate, fleet, simulate, explain."""
    valid, shown, simulated, explained = await asyncio.gather(
        shell("kvfleet validate fleet.yaml", folder=folder),
        shell("kvfleet fleet fleet.yaml", folder=folder),
        shell('kvfleet simulate fleet.yaml --prompt "Write a Python function"', folder=folder),
        shell('kvfleet explain fleet.yaml --prompt "Hello" --json', folder=folder),
    )
    assert "✓ fleet.yaml is valid" in valid
    assert all(model in shown for model in ("llama-3-8b", "llama-3-70b", "gpt-4o-fallback"))
    assert simulated.splitlines()[:2] == ["Strategy: hybrid_score", "Selected: llama-3-8b"]
    decision = json.loads(explained)
    assert decision["selected_model"] == "llama-3-8b"
    assert [candidate["model"] for candidate in decision["candidates"]][-1] == "gpt-4o-fallback"
