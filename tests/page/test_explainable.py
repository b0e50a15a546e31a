"""Explainable Routing."""

from __future__ import annotations

import json
import re

from kvfleet import Router
from tests.page.fleets import QUICKSTART
from tests.page.living import live, question
from tests.page.loopback import Served, serving
from tests.page.printed import fleet, run

EXAMPLE = """
config = load_config("fleet.yaml")
router = Router(config)

response, explanation = await router.route(prompt="Write a haiku about Python")

# Human-readable summary
print(explanation.summary())
# Strategy: hybrid_score
# Selected: llama-3-8b
# Cache affinity: MISS
# Candidate scores:
#   ✓ llama-3-8b: 0.750 
#   ✗ llama-3-70b: 0.620
#   ✗ gpt-4o: 0.480 (rejected: Lower score)

# Machine-readable JSON
import json
print(json.dumps(explanation.to_dict(), indent=2))
"""  # noqa: W291 - as printed

HOSTS = ("http://gpu-1:8000", "http://gpu-2:8000", "https://api.openai.com")

SHOWN = """\
Strategy: hybrid_score
Selected: llama-3-8b
Cache affinity: MISS
Candidate scores:
  ✓ llama-3-8b: N
  ✗ llama-3-70b: N (rejected: Lower score)
  ✗ gpt-4o-fallback: N (rejected: Lower score)"""

DOCUMENTED = [
    "request_id",
    "timestamp",
    "strategy",
    "selected_model",
    "selected_endpoint",
    "candidates",
    "policy_decisions",
    "fallback_triggered",
    "cache_affinity_used",
    "cache_hit",
    "shadow_models",
    "total_latency_ms",
]


async def test_the_example_prints_summary_and_json() -> None:
    """The summary in the page's form, line by line, and the same as JSON."""
    async with serving(Served("Green snake on the wall."), Served(), Served()) as engines:
        at = dict(zip(HOSTS, [engine.url for engine in engines], strict=True))
        config = fleet(QUICKSTART.replace("    allowed_data_classes: [public]\n", ""), at=at)
        ran = await run(EXAMPLE, Router=Router, load_config=lambda _: config)
        await ran["router"].close()
    summary, _, rest = ran.printed.partition("\n{")
    assert re.sub(r"\d\.\d{3}", "N", summary) == SHOWN
    assert ran["response"].content == "Green snake on the wall."
    whole = json.loads("{" + rest)
    assert whole == json.loads(json.dumps(ran["explanation"].to_dict()))
    assert set(DOCUMENTED) <= set(whole)


async def test_every_live_request_has_a_trace() -> None:
    """Its stages in order, each candidate with its score or its reason, the attempt, and the outcome."""
    async with live(fleet(QUICKSTART)) as gateway:
        answer = await gateway.ask(question("Hello!"))
        explanation = gateway.last
        assert answer.headers["x-kvfleet-trace"] == explanation.trace_id
        kinds = [stage.kind for stage in explanation.stages]
        assert kinds == sorted(kinds, key=("classify", "filter", "affinity", "score", "select", "execute").index)
        assert {candidate.model for candidate in explanation.candidates} == {
            "llama-3-8b",
            "llama-3-70b",
            "gpt-4o-fallback",
        }
        assert all(c.total_score is not None or c.rejected_reason for c in explanation.candidates)
        (attempt,) = explanation.attempts
        assert (attempt.model, attempt.fault, explanation.outcome) == (explanation.served_by, "", "answered")
