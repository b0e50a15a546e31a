"""A prompt's language behind a running gateway: who gets it, and what the trace says."""

from __future__ import annotations

import httpx

from kvfleet.config.schema import FleetConfig, ModelCapabilities, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace

ENGLISH = ModelConfig(
    name="english",
    provider="mock",
    endpoint="mock://1",
    quality_score=0.9,
    capabilities=ModelCapabilities(supported_languages=("en",)),
    options={"speed": 1000},
)
ANY = ModelConfig(name="any", provider="mock", endpoint="mock://2", quality_score=0.1, options={"speed": 1000})


class Kept:
    """A sink that keeps traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


async def test_a_live_prompt_goes_to_who_is_good_at_its_language() -> None:
    """By its text, or by the tag it carries; the trace says the language and the drop, never the text."""
    config = FleetConfig(
        models=(ENGLISH, ANY),
        strategy="quality_first",
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    sink = Kept()
    router = Router(config, polls=False, sinks=[sink])
    asked = [
        ("What is the capital of France?", {}, "english"),
        ("Wie heißt die Hauptstadt von Frankreich?", {}, "any"),
        ("Paris", {"language": "fr-CA"}, "any"),
        ("Paris", {}, "english"),
    ]
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        for prompt, metadata, model in asked:
            body = {"messages": [{"role": "user", "content": prompt}], "metadata": metadata}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.headers["x-kvfleet-model"] == model
        await router.settled()
        only = {
            "model": "english",
            "messages": [{"role": "user", "content": "Wie heißt die Hauptstadt von Frankreich?"}],
        }
        refused = await client.post("/v1/chat/completions", json=only)
    told = [Explanation(trace).to_dict() for trace in sink.traces[:4]]
    assert [next(s["facts"]["language"] for s in one["stages"] if s["name"] == "language") for one in told] == [
        "en",
        "de",
        "fr",
        "unknown",
    ]
    assert [[drop["rule"] for drop in one["drops"]] for one in told] == [[], ["language"], ["language"], []]
    assert "Hauptstadt" not in str(told)
    assert refused.status_code == 400
    assert "english: is not good at the language de" in refused.json()["error"]["message"]
