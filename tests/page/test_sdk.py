"""SDK: Async and Sync Clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfleet.adapters.base import ChatResponse
from kvfleet.trace.explanation import Explanation
from tests.page.printed import run, run_apart

ASYNC = """
# Async (recommended for production)
from kvfleet.sdk.async_client import AsyncFleetClient

async with AsyncFleetClient.from_yaml("fleet.yaml") as client:
    response = await client.chat("Explain recursion")
    print(response.content)

    # With explanation
    response, explanation = await client.chat_with_explanation("Hello")

    # Simulate without calling backends
    explanation = await client.simulate("Test prompt")
"""

SYNC = """
# Sync (for scripts, notebooks)
from kvfleet.sdk.sync_client import SyncFleetClient

with SyncFleetClient.from_yaml("fleet.yaml") as client:
    response = client.chat("What is Python?")
    print(response.content)
"""

FLEET = "models: [{name: mocked, provider: mock, options: {speed: 1000, reply: As I said before.}}]\n"


@pytest.fixture
def at(tmp_path: Path) -> dict[str, str]:
    """The page's file, with an engine inside the process."""
    (tmp_path / "fleet.yaml").write_text(FLEET)
    return {"fleet.yaml": str(tmp_path / "fleet.yaml")}


async def test_the_asynchronous_client(at: dict[str, str]) -> None:
    """An answer, one with its explanation, and a simulation."""
    ran = await run(ASYNC, at=at)
    assert ran.printed == "As I said before.\n"
    assert isinstance(ran["response"], ChatResponse)
    assert isinstance(ran["explanation"], Explanation)
    assert (ran["explanation"].selected_model, ran["explanation"].outcome) == ("mocked", "simulated")


async def test_the_synchronous_client(at: dict[str, str]) -> None:
    """In a thread without an event loop, and in one that has a loop running, as a notebook does."""
    assert (await run_apart(SYNC, at=at)).printed == "As I said before.\n"
    assert (await run(SYNC, at=at)).printed == "As I said before.\n"
