"""Model Comparison & Replay."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kvfleet.adapters.base import ChatMessage, ChatRequest, ChatResponse
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from tests.page.living import live
from tests.page.printed import fleet, run, shell

EXAMPLE = """
from kvfleet.eval.compare import ModelComparator, ReplayEngine

# Compare models side-by-side
comparator = ModelComparator()
result = await comparator.compare(request, adapters, ["llama-8b", "llama-70b", "gpt-4o"])
for model, resp in result.results.items():
    print(f"{model}: {result.latencies[model]:.0f}ms — {resp.content[:50]}...")

# Record and replay production traffic
replay = ReplayEngine()
replay.record(request, "llama-8b", response)

# Later: replay against new models
results = await replay.replay(adapters, model_names=["new-model-v2"])
"""


async def test_models_side_by_side_and_a_replay() -> None:
    """Each model's line; and the recorded request, put to the new model, beside the recorded answer."""
    models = ("llama-8b", "llama-70b", "gpt-4o", "new-model-v2")
    ran = await run(
        EXAMPLE,
        request=ChatRequest([ChatMessage("user", "Who are you?")]),
        response=ChatResponse("I am llama-8b.", model="llama-8b"),
        adapters={name: FakeAdapter(model_id=name, script=FakeReply(text=f"I am {name}.")) for name in models},
    )
    shown = [re.fullmatch(r"([\w-]+): \d+ms — I am ([\w-]+)\.\.\.\.", line) for line in ran.lines]
    assert [(row[1], row[2]) for row in shown if row] == [(name, name) for name in models[:3]]
    (result,) = ran["results"]
    assert result.record.model == "llama-8b"
    assert result.results["new-model-v2"].content == "I am new-model-v2."


FLEET = """\
models:
  - {name: llama-8b, endpoint: "http://a:8000", provider: vllm}
pipeline: [classify.prompt, select, execute, {use: observe.record, with: {content: true}}]
"""

CANDIDATE = "models: [{name: new-model-v2, provider: mock, options: {speed: 1000, reply: llama-8b speaking.}}]\n"


async def test_a_gateways_traffic_is_put_to_a_candidate(tmp_path: Path) -> None:
    """What a running gateway recorded is asked of another model, and the answers are compared."""
    async with live(fleet(FLEET), state_dir=tmp_path) as gateway:
        for number in range(3):
            await gateway.served(f"Question {number}")
    (tmp_path / "next.yaml").write_text(CANDIDATE)
    printed = await shell("kvfleet rerun requests.jsonl next.yaml --models new-model-v2 --json", folder=tmp_path)
    shown = json.loads(printed)
    assert shown["requests"] == 3
    assert [(one["model"], one["answered"], one["similarity"]) for one in shown["models"]] == [("new-model-v2", 3, 1.0)]
