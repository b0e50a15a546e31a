"""What must hold of the semantic cache, asked of a running gateway."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.config.schema import FleetConfig, GatewayConfig, ModelConfig, SemanticCacheConfig, TenantConfig
from tests.page.living import Live, live, question

CONFIG = FleetConfig(
    models=(
        ModelConfig(name="a", endpoint="http://a", provider="vllm", quality_score=0.9),
        ModelConfig(name="b", endpoint="http://b", provider="vllm"),
    ),
    gateway=GatewayConfig(tenant_header="X-Tenant-ID"),
    tenants={"one": TenantConfig(), "two": TenantConfig()},
    semantic_cache=SemanticCacheConfig(enabled=True),
    strategy="quality_first",
)
ASKED = question("What is the capital of France?", temperature=0)


async def found(gateway: Live, body: dict[str, Any], **headers: str) -> str:
    """What the cache said of a request: hit, near or miss."""
    answer = await gateway.ask(body, **{"X_Tenant_ID": "one", **headers})
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-kvfleet-cache"])


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (ASKED, {"X_Tenant_ID": "two"}),
        (ASKED, {"X_KVFleet_Data_Class": "public"}),
        ({**ASKED, "model": "b"}, {}),
        ({**ASKED, "max_tokens": 5}, {}),
        ({**ASKED, "seed": 1}, {}),
        ({**ASKED, "some_new_parameter": 1}, {}),
        (question("What is the capital of Peru?", temperature=0), {}),
        (question("What is not the capital of France?", temperature=0), {}),
        ({**ASKED, "messages": [{"role": "system", "content": "Be rude."}, *ASKED["messages"]]}, {}),
    ],
    ids=["tenant", "data class", "model", "length", "seed", "unknown", "question", "negation", "instructions"],
)
async def test_whatever_changes_an_answer_is_another_question(body: dict[str, Any], headers: dict[str, str]) -> None:
    """Nobody gets the answer to somebody else's, or to another one."""
    async with live(CONFIG) as gateway:
        assert await found(gateway, ASKED) == "miss"
        assert await found(gateway, ASKED) == "hit"
        assert await found(gateway, body, **headers) == "miss"


async def test_a_near_duplicate_is_found_above_the_threshold() -> None:
    """The same question in another form; and not at a threshold that asks for more."""
    alike = question("What's the capital of France", temperature=0)
    async with live(CONFIG) as gateway:
        assert [await found(gateway, body) for body in (ASKED, alike)] == ["miss", "near"]


async def test_streams_are_replayed_as_streams() -> None:
    """Event by event, as the engine's came; a whole answer is not given for one."""
    streamed = {**ASKED, "stream": True}
    async with live(CONFIG) as gateway:
        first = await gateway.ask(streamed, X_Tenant_ID="one")
        again = await gateway.ask(streamed, X_Tenant_ID="one")
        assert again.headers["x-kvfleet-cache"] == "hit"
        assert again.headers["content-type"].startswith("text/event-stream")
        ids = [answer.headers["x-request-id"] for answer in (first, again)]
        assert first.text.replace(ids[0], "") == again.text.replace(ids[1], "")
        assert again.text.count("data: ") > 3
        assert gateway.asked_of("a") == 1
