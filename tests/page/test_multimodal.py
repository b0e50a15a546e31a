"""Vision & Multimodal Routing."""

from __future__ import annotations

from kvfleet.config.schema import ModelCapabilities, ModelConfig
from tests.page.living import live
from tests.page.printed import fleet, run

EXAMPLE = """
from kvfleet.router.multimodal import detect_modality, filter_vision_capable

# OpenAI vision format
messages = [
    {"role": "user", "content": [
        {"type": "text", "text": "What's in this image?"},
        {"type": "image_url", "image_url": {"url": "https://example.com/photo.jpg"}},
    ]},
]

# Detect modalities
detection = detect_modality(messages)
print(f"Multimodal: {detection.is_multimodal}")     # True
print(f"Modality: {detection.primary_modality}")     # "vision"
print(f"Images: {detection.image_count}")             # 1
print(f"Est. image tokens: {detection.estimated_image_tokens}")  # 765

# Filter to vision-capable models only
capable = filter_vision_capable(all_models, detection)
# → Only models with capabilities.supports_vision=True or tags.vision="true"
"""

TAGGED = """\
models:
  - name: gpt-4o
    capabilities:
      supports_vision: true
  - name: llama-3-8b
    capabilities:
      supports_vision: false
"""

PLACES = """\
models:
  - {name: gpt-4o, endpoint: "https://api.openai.com", latency_p50_ms: 4000}
  - {name: llama-3-8b, endpoint: "http://gpu-1:8000", provider: vllm}
"""

MODELS = [
    ModelConfig(name="sees", endpoint="http://a", capabilities=ModelCapabilities(supports_vision=True)),
    ModelConfig(name="tagged", endpoint="http://b", tags={"vision": "true"}),
    ModelConfig(name="blind", endpoint="http://c"),
]


async def test_the_example() -> None:
    """Its four lines, and the models of its comment."""
    ran = await run(EXAMPLE, all_models=MODELS)
    assert ran.lines == ["Multimodal: True", "Modality: vision", "Images: 1", "Est. image tokens: 765"]
    assert [model.name for model in ran["capable"]] == ["sees", "tagged"]


async def test_a_live_picture_goes_to_who_can_see_it() -> None:
    """The other model is dropped with the reason; a text alone goes to the faster one."""
    async with live(fleet(TAGGED, PLACES)) as gateway:
        messages = (await run(EXAMPLE, all_models=MODELS))["messages"]
        assert await gateway.served({"model": "auto", "messages": messages}) == "gpt-4o"
        (drop,) = gateway.last.drops
        assert (drop.stage, drop.model) == ("filter.capabilities", "llama-3-8b")
        assert "image" in drop.reason
        (call,) = gateway.engines["gpt-4o"][0].calls
        assert call.body["messages"] == messages
        assert await gateway.served("What is in this image?") == "llama-3-8b"
