"""Adapter Backends: vLLM, Ollama, TGI, Triton, custom HTTP."""

from __future__ import annotations

import orjson
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest, ChatResponse, InferenceAdapter
from kvfleet.adapters.openai_compat import OpenAICompatAdapter
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.plugin.contract import Kind
from tests.page.living import live, question
from tests.page.loopback import Served, serving
from tests.page.printed import TABLE, run

VLLM = """
from kvfleet.adapters.vllm import VLLMAdapter
from kvfleet.adapters.base import ChatMessage, ChatRequest

adapter = VLLMAdapter(endpoint="http://gpu-1:8000", model_id="meta-llama/Llama-3-8B")

# Chat
response = await adapter.chat(ChatRequest(
    messages=[ChatMessage(role="user", content="Hello!")],
))
print(response.content)

# Get KV-cache state
cache_state = await adapter.get_cache_state()
print(f"KV cache usage: {cache_state.get('kv_cache_usage_pct', 0)}%")

# Health check with GPU metrics
health = await adapter.health_check()
print(f"Healthy: {health.healthy}, Queue: {health.queue_depth}")
"""

OLLAMA = """
from kvfleet.adapters.ollama import OllamaAdapter

adapter = OllamaAdapter(endpoint="http://localhost:11434", model_id="llama3")
response = await adapter.chat(ChatRequest(
    messages=[ChatMessage(role="user", content="What is Rust?")],
))
"""

TGI = """
from kvfleet.adapters.tgi import TGIAdapter

adapter = TGIAdapter(endpoint="http://tgi-server:8080", model_id="mistral-7b")
response = await adapter.chat(ChatRequest(
    messages=[ChatMessage(role="user", content="Summarize this article...")],
))
"""

TRITON = """
from kvfleet.adapters.triton import TritonAdapter

adapter = TritonAdapter(endpoint="http://triton:8000", model_id="llama-3-70b")
health = await adapter.health_check()  # Uses /v2/health/ready
"""

CUSTOM = """
from kvfleet.adapters.custom_http import CustomHTTPAdapter

adapter = CustomHTTPAdapter(
    endpoint="http://internal-api:5000",
    model_id="proprietary-model",
    chat_path="/api/generate",
    health_path="/api/status",
    response_content_key="output",
    headers={"X-API-Key": "secret"},
)
"""

TAKEN = {"ChatRequest": ChatRequest, "ChatMessage": ChatMessage}
"""What the later examples take from the first one's imports."""


async def test_vllm() -> None:
    """The answer, the state of the KV cache, and the health with the queue."""
    async with serving(Served("Hello yourself.")) as (engine,):
        ran = await run(VLLM, at={"http://gpu-1:8000": engine.url})
        await ran["adapter"].close()
    assert ran.lines == ["Hello yourself.", "KV cache usage: 25.0%", "Healthy: True, Queue: 2"]
    assert orjson.loads(engine.requests[0].body)["model"] == "meta-llama/Llama-3-8B"


async def test_ollama() -> None:
    """Asked in its own tongue, and answered in ours."""
    said = {
        "model": "llama3",
        "message": {"role": "assistant", "content": "A language."},
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": 4,
        "eval_count": 3,
    }
    async with serving(Served(answers={"/api/chat": said})) as (engine,):
        ran = await run(OLLAMA, at={"http://localhost:11434": engine.url}, **TAKEN)
        await ran["adapter"].close()
    response = ran["response"]
    assert isinstance(response, ChatResponse)
    assert (response.content, response.usage.total_tokens) == ("A language.", 7)
    assert orjson.loads(engine.requests[0].body)["messages"] == [{"role": "user", "content": "What is Rust?"}]


async def test_tgi() -> None:
    """By its Messages API."""
    async with serving(Served("It says nothing.")) as (engine,):
        ran = await run(TGI, at={"http://tgi-server:8080": engine.url}, **TAKEN)
        await ran["adapter"].close()
    assert ran["response"].content == "It says nothing."


async def test_triton() -> None:
    """The server's readiness and the model's own."""
    answers = {"/v2/health/ready": {}, "/v2/models/llama-3-70b/ready": {}}
    async with serving(Served(answers=answers)) as (engine,):
        ran = await run(TRITON, at={"http://triton:8000": engine.url})
        await ran["adapter"].close()
    assert ran["health"].healthy
    assert [request.path for request in engine.requests] == list(answers)


async def test_custom_http() -> None:
    """Paths, the answer's place and the headers are those of one's own service."""
    answers = {"/api/generate": {"output": "Forty-two."}, "/api/status": {}}
    async with serving(Served(answers=answers)) as (engine,):
        adapter = (await run(CUSTOM, at={"http://internal-api:5000": engine.url}))["adapter"]
        assert (await adapter.chat(ChatRequest([ChatMessage("user", "What is it?")]))).content == "Forty-two."
        assert (await adapter.health_check()).healthy
        await adapter.close()
    assert [request.path for request in engine.requests] == list(answers)
    assert {request.headers["x-api-key"] for request in engine.requests} == {"secret"}
    assert orjson.loads(engine.requests[0].body)["prompt"] == "What is it?"


@pytest.mark.parametrize("name", ["vllm", "ollama", "tgi", "triton", "openai_compat", "custom_http"])
def test_the_six_can_be_named_in_a_fleet_file(name: str) -> None:
    """Each `provider` of the page has its adapter, which is the documented class's kind."""
    made = TABLE.get(Kind.ADAPTER, name).cls
    assert issubclass(made, InferenceAdapter)
    assert made.__module__ == f"kvfleet.adapters.{name}"


async def test_openai_compatible_services() -> None:
    """The sixth one, which the page names in its table: with and without `/v1` at the end of the address."""
    async with serving(Served("Yes.")) as (engine,):
        for endpoint in (engine.url, f"{engine.url}/v1", f"{engine.url}/v1/"):
            adapter = OpenAICompatAdapter(endpoint=endpoint, model_id="m", api_key="sk-1")
            assert (await adapter.chat(ChatRequest([ChatMessage("user", "Well?")]))).content == "Yes."
            await adapter.close()
    assert {request.path for request in engine.requests} == {"/v1/chat/completions"}
    assert {request.headers["authorization"] for request in engine.requests} == {"Bearer sk-1"}


async def test_a_running_gateway_speaks_to_all_six() -> None:
    """One fleet with an engine of each kind: each answers in OpenAI's shape, and the trace has its tokens where it told."""
    chat = {"role": "assistant", "content": "Ollama."}
    said = {"model": "m", "message": chat, "done": True, "done_reason": "stop", "prompt_eval_count": 4, "eval_count": 3}
    engines = {
        "vllm": Served("vLLM."),
        "ollama": Served(answers={"/api/chat": said}),
        "tgi": Served("TGI."),
        "triton": Served(answers={"/v2/models/m/generate": {"model_name": "m", "text_output": "Triton."}}),
        "openai_compat": Served("OpenAI."),
        "custom_http": Served(answers={"/generate": {"output": "Custom."}}),
    }
    async with serving(*engines.values()) as urls:
        models = tuple(
            ModelConfig(
                name=name,
                endpoint=engine.url,
                provider=name,
                model_id="m",
                custom_content_key="output" if name == "custom_http" else "",
            )
            for name, engine in zip(engines, urls, strict=True)
        )
        async with live(FleetConfig(models=models), scripts=dict.fromkeys(engines)) as gateway:
            heard = {}
            for name in engines:
                answer = await gateway.ask({**question(), "model": name})
                assert answer.status_code == 200, answer.text
                heard[name] = answer.json()["choices"][0]["message"]["content"]
                assert (gateway.last.served_by, gateway.last.outcome) == (name, "answered")
            assert gateway.last.usage is None
    assert heard == {"vllm": "vLLM.", "ollama": "Ollama.", "tgi": "TGI.", "triton": "Triton.", "openai_compat": "OpenAI.", "custom_http": "Custom."}  # fmt: skip
