"""Shadow Traffic."""

from __future__ import annotations

import re

from kvfleet.adapters.base import ChatMessage, ChatRequest, ChatResponse
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from tests.page.living import live
from tests.page.printed import fleet, run

SECTION = """\
shadow:
  enabled: true
  shadow_models: [candidate-model-v2, experimental-model]
  sample_rate: 0.1  # 10% of traffic
  log_outputs: true
"""

EXAMPLE = """
from kvfleet.eval.shadow import ShadowTrafficManager

shadow = ShadowTrafficManager(
    sample_rate=0.1,
    shadow_models=["new-model-v2"],
    enabled=True,
)

# Automatically mirrors traffic (non-blocking)
if shadow.should_shadow():
    comparison = await shadow.execute_shadow(
        request=request,
        primary_model="llama-8b",
        primary_response=response,
        adapters=adapters,
    )
    for result in comparison.shadow_results:
        print(f"{result.model}: {result.latency_ms:.0f}ms")
"""

MODELS = """\
models:
  - {name: in-use, endpoint: "http://a:8000", provider: vllm}
  - {name: candidate-model-v2, endpoint: "http://b:8000", provider: vllm}
  - {name: experimental-model, endpoint: "http://c:8000", provider: vllm}
strategy: static
default_model: in-use
"""


async def test_about_a_tenth_is_mirrored() -> None:
    """The example again and again: each time nothing, or the shadow model with its time."""
    given = {
        "request": ChatRequest([ChatMessage("user", "Why?")]),
        "response": ChatResponse("Because.", model="llama-8b"),
        "adapters": {"new-model-v2": FakeAdapter(model_id="m", script=FakeReply(text="So."))},
    }
    printed = [(await run(EXAMPLE, **given)).printed for _ in range(300)]
    mirrored = [line for line in printed if line]
    assert all(re.fullmatch(r"new-model-v2: \d+ms\n", line) for line in mirrored)
    assert 8 <= len(mirrored) <= 65  # a tenth of 300, six standard deviations wide


async def test_live_requests_are_mirrored_and_the_trace_says_to_whom() -> None:
    """The section as printed, a tenth of the traffic: each trace's shadow models are those that were called."""
    async with live(fleet(MODELS, SECTION), seed=3) as gateway:
        for count in range(60):
            assert await gateway.served(f"Question {count}") == "in-use"
        stage = next(one.component for one in gateway.router.pipeline.observe if one.name == "shadow")
        await stage.settled()
        told = [trace.route.attributes.get("kvfleet.shadow.replicas", ()) for trace in gateway.kept.traces]
        mirrored = [replicas for replicas in told if replicas]
        assert 1 <= len(mirrored) <= 20
        for model in ("candidate-model-v2", "experimental-model"):
            assert gateway.asked_of(model) == len(mirrored)
            assert gateway.metric("kvfleet_shadow_requests_total", model=model) == len(mirrored)
