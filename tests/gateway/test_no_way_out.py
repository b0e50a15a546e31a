"""Nothing a client or a backend says makes the gateway call anybody but the engines of its file, or show a key to another.

A second server listens, whose address is put wherever a client or a backend can put one. It must stay alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import attrs
import httpx
import pytest

from kvfleet.config.schema import (
    FallbackConfig,
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    SemanticCacheConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from tests.gateway.test_canaries import ANSWERED, BODIES
from tests.gateway.upstream import Upstream, upstream, whole

TLS = httpx.create_ssl_context()
OFF = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
FIELDS = (
    *("api_base", "base_url", "apiBase", "API_BASE", "endpoint", "url", "host", "proxy", "custom_host", "api_key"),
    *("azure_endpoint", "deployment", "provider", "target", "callback_url", "webhook", "guardrails", "extra_headers"),
    *("kv_transfer_params", "prefill_url", "x-prefiller-url", "router", "fallbacks", "model_list", "litellm_params"),
)
HEADERS = (
    *("x-prefiller-url", "x-api-base", "x-base-url", "x-custom-host", "x-portkey-custom-host", "x-target-url"),
    *("x-forwarded-host", "x-forwarded-for", "x-original-url", "x-rewrite-url", "x-kvfleet-endpoint", "forwarded"),
    *("x-gateway-destination-endpoint", "proxy", "via", "x-upstream", "x-kvfleet-models", "x-kvfleet-strategy"),
)


@contextlib.asynccontextmanager
async def stage(*models: ModelConfig, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway and its client."""
    config = FleetConfig(
        models=models, strategy="static", telemetry=OFF, fallback=FallbackConfig(max_attempts=3), **more
    )
    async with (
        running(config, router=Router(config, polls=False)) as serving,
        httpx.AsyncClient(base_url=serving.url, verify=TLS) as client,
    ):
        yield client


def places(surface: str, url: str) -> Iterator[Mapping[str, Any]]:
    """Bodies of a surface with an address in every place one might look at."""
    body = BODIES[surface]
    yield {**body, "model": url}
    yield {**body, "model": f"openai/{url}"}
    for field in FIELDS:
        yield {**body, field: url}
        yield {**body, field: {"api_base": url, "url": url, "api_key": "k"}}
        yield {**body, field: [{"api_base": url}]}
        yield {**body, "metadata": {field: url}, "extra_body": {field: url}, "litellm_params": {field: url}}
    picture = {"type": "image_url", "image_url": {"url": f"{url}/a.png"}}
    source = {"type": "image", "source": {"type": "url", "url": f"{url}/a.png"}}
    document = {"type": "document", "source": {"type": "url", "url": f"{url}/a.pdf"}}
    inputs = {"type": "input_image", "image_url": f"{url}/a.png"}
    file = {"type": "input_file", "file_url": f"{url}/a.pdf"}
    parts = [inputs, file] if surface == "/v1/responses" else [picture] if "chat" in surface else [source, document]
    key = "input" if surface == "/v1/responses" else "messages"
    yield {**body, key: [{"role": "user", "content": parts}]}
    yield {**body, "mcp_servers": [{"type": "url", "url": url, "name": "x"}]}
    yield {**body, "tools": [{"type": "mcp", "server_url": url, "server_label": "x"}]}


def callers(one: Upstream) -> int:
    """How many connected."""
    return len(one.writers)


@pytest.mark.parametrize("provider", ["openai_compat", "anthropic", "vllm"])
@pytest.mark.parametrize("surface", BODIES)
async def test_no_field_of_a_request_is_an_address(surface: str, provider: str) -> None:
    """Bodies, headers and paths with an address in every place: none of them is called."""
    kind = surface if provider != "openai_compat" and surface == "/v1/messages" else "/v1/chat/completions"
    if provider == "anthropic":
        kind = "/v1/messages"
    async with upstream(whole(ANSWERED[kind])) as engine, upstream(whole(ANSWERED[kind])) as other:
        async with stage(ModelConfig(name="m", provider=provider, endpoint=engine.url, api_key="key-1")) as client:
            for body in places(surface, other.url):
                await client.post(surface, json=body)
            for header in HEADERS:
                await client.post(surface, json=BODIES[surface], headers={header: other.url})
            for path in (f"/{other.url}/v1/chat/completions", f"/v1/{other.url}", f"{surface}?api_base={other.url}"):
                await client.post(path, json=BODIES[surface])
        assert engine.requests
        assert callers(other) == 0


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"303 See Other", b"307 Temporary", b"308 Permanent"])
@pytest.mark.parametrize("surface", BODIES)
async def test_a_redirect_is_not_followed(surface: str, status: bytes) -> None:
    """It is a failure of the backend, which tells nothing of where it points; the key stays with its engine."""
    async with upstream(whole(ANSWERED[surface])) as other:
        place = other.url.encode()
        head = b"HTTP/1.1 %b\r\nlocation: %b/steal\r\nrefresh: 0;url=%b\r\ncontent-length: 0\r\n\r\n"
        async with upstream(head % (status, place, place)) as engine:
            model = ModelConfig(name="m", endpoint=engine.url, api_key="key-1", options={"surfaces": ["messages"]})
            async with stage(attrs.evolve(model, max_retries=0)) as client:
                answer = await client.post(surface, json=BODIES[surface])
        assert callers(other) == 0
        assert answer.status_code == 502
        told = f"{answer.text} {answer.headers}"
        assert other.url.removeprefix("http://") not in told
        assert "location" not in answer.headers


@pytest.mark.parametrize("surface", BODIES)
async def test_a_key_goes_to_its_own_engine_alone(surface: str) -> None:
    """Through fallbacks over three engines, each sees its own key, in its own header, and nobody the client's."""
    failed = whole(b'{"error":{"message":"x"}}', b"500 Internal Server Error")
    async with (
        upstream(failed) as first,
        upstream(failed) as second,
        upstream(whole(ANSWERED["/v1/chat/completions"])) as third,
    ):
        engines = (first, second, third)
        models = [
            ModelConfig(name=f"m{i}", provider=provider, endpoint=one.url, api_key=f"key-{i}", max_retries=0)
            for i, (one, provider) in enumerate(zip(engines, ("openai_compat", "anthropic", "vllm"), strict=True))
        ]
        async with stage(*models, gateway=GatewayConfig(api_key="sk-client")) as client:
            headers = {"authorization": "Bearer sk-client", "cookie": "a=sk-client", "proxy-authorization": "sk-client"}
            answer = await client.post(surface, json=BODIES[surface], headers=headers)
        seen = [set(re.findall(rb"key-\d|sk-client", b"".join(one.requests))) for one in engines]
    assert seen == [{b"key-0"}, {b"key-1"}, {b"key-2"}]
    assert "key-" not in f"{answer.text} {answer.headers}"


@pytest.mark.parametrize("surface", BODIES)
async def test_no_header_of_a_backend_gets_through(surface: str) -> None:
    """What an engine says in its headers stays here: cookies, servers, addresses, keys."""
    body = ANSWERED["/v1/chat/completions"]
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nset-cookie: CANARY\r\nserver: CANARY\r\n"
        b"x-upstream: CANARY\r\nauthorization: CANARY\r\nvia: CANARY\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    async with upstream(head + body) as engine, stage(ModelConfig(name="m", endpoint=engine.url)) as client:
        answer = await client.post(surface, json=BODIES[surface])
    assert answer.status_code == 200
    assert "CANARY" not in f"{answer.headers}"


async def test_tenants_share_no_answer() -> None:
    """A hundred prompts of each of two tenants, the same ones, over three APIs: none gets what the other was told."""
    told: dict[str, set[str]] = {"red": set(), "blue": set()}
    model = ModelConfig(name="m", endpoint="http://m.internal")
    config = FleetConfig(
        models=(model,),
        tenants={"red": TenantConfig(), "blue": TenantConfig()},
        gateway=GatewayConfig(tenant_header="X-Tenant-ID"),
        semantic_cache=SemanticCacheConfig(enabled=True, any_temperature=True, similarity_threshold=0.5),
        telemetry=OFF,
    )
    count = iter(range(10_000))
    adapter = FakeAdapter(script=lambda call: FakeReply(text=f"answer {next(count)}"))
    router = Router(config, adapters={model.id: adapter}, polls=False)
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url, verify=TLS) as client:
        for number in range(100):
            words = f"what is the number of the {number}th house in the street"
            for tenant, found in told.items():
                surface = list(BODIES)[number % 3]
                body = {
                    **BODIES[surface],
                    "input" if surface == "/v1/responses" else "messages": [{"role": "user", "content": words}],
                }
                answer = await client.post(surface, json=body, headers={"X-Tenant-ID": tenant})
                found |= set(re.findall(r"answer \d+", answer.text))
            await asyncio.sleep(0)
        await router.settled()
    assert told["red"]
    assert not told["red"] & told["blue"]
