"""Models side by side, and recorded requests put to other models."""

from __future__ import annotations

import re

import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest, ChatResponse
from kvfleet.errors import Fault
from kvfleet.eval.compare import ModelComparator, ReplayEngine, ReplayRecord, ReplayResult, RouteCalibrator
from kvfleet.testing.fakes import FakeAdapter, FakeReply

REQUEST = ChatRequest([ChatMessage("system", "Be brief."), ChatMessage("user", "What is the sky?")])


def adapters(**texts: str) -> dict[str, FakeAdapter]:
    """One adapter for each model, that says this."""
    return {
        name.replace("_", "-"): FakeAdapter(model_id=name, script=FakeReply(text=text)) for name, text in texts.items()
    }


async def test_the_pages_comparison_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is printed: each model's time and the beginning of its answer."""
    request, known = REQUEST, adapters(llama_8b="Blue.", llama_70b="It is blue.", gpt_4o="The sky is blue, mostly.")
    comparator = ModelComparator()
    result = await comparator.compare(request, known, ["llama-8b", "llama-70b", "gpt-4o"])
    for model, resp in result.results.items():
        print(f"{model}: {result.latencies[model]:.0f}ms — {resp.content[:50]}...")  # noqa: T201 - the page prints it
    assert re.sub(r"\d+ms", "9ms", capsys.readouterr().out) == (
        "llama-8b: 9ms — Blue....\nllama-70b: 9ms — It is blue....\ngpt-4o: 9ms — The sky is blue, mostly....\n"
    )
    assert result.prompt == "What is the sky?"


async def test_the_pages_replay_runs() -> None:
    """As it is printed: recorded once, and put to another model later."""
    request, response = REQUEST, ChatResponse("The sky is blue.")
    replay = ReplayEngine()
    replay.record(request, "llama-8b", response)
    results = await replay.replay(adapters(new_model_v2="The sky is grey."), model_names=["new-model-v2"])
    (result,) = results
    assert (result.record.model, result.results["new-model-v2"].content) == ("llama-8b", "The sky is grey.")
    assert result.similarities == {"new-model-v2": 0.75}


async def test_every_model_is_a_result_or_an_error() -> None:
    """A fault and a missing adapter are told by model, and the others answer."""
    down = FakeAdapter(model_id="down", script=FakeReply(fail=Fault.SERVER_ERROR))
    known = {**adapters(well="Fine."), "down": down}
    result = await ModelComparator().compare(REQUEST, known, ["well", "down", "absent", "well"])
    assert (list(result.results), list(result.errors)) == (["well"], ["down", "absent"])
    assert list(result.latencies) == ["well", "down", "absent"]
    assert len(known["well"].calls) == 1


async def test_the_whole_request_reaches_the_model() -> None:
    """Parameters and messages go along; the model's name is its own."""
    known = adapters(m="Hi.")
    request = ChatRequest([ChatMessage("user", [{"type": "text", "text": "Hi"}])], max_tokens=5, extra={"top_k": 3})
    result = await ModelComparator().compare(request, known, ["m"])
    body = known["m"].calls[0].body
    assert (body["max_tokens"], body["top_k"], result.prompt) == (5, 3, "Hi")


async def test_records_are_bounded_and_the_newest_are_replayed() -> None:
    """The oldest go, a limit takes the newest, and clearing forgets."""
    engine = ReplayEngine(most_records=3)
    for number in range(5):
        engine.record(ChatRequest([ChatMessage("user", str(number))]), "m")
    assert engine.record_count == 3
    told: list[str] = []
    known = adapters(m="Hi.")
    await engine.replay(
        known, ["m"], limit=2, on_result=lambda one: told.append(str(one.record.request.messages[0].content))
    )
    assert told == ["3", "4"]
    assert [record.response for record in engine.get_records()] == [None] * 3
    engine.clear_records()
    assert engine.get_records() == []


def test_replays_calibrate_what_a_fleet_file_declares() -> None:
    """Latency at the middle and the tail over the answers, the share answered, and the likeness."""
    answer = ChatResponse("Hi.")
    results = [
        ReplayResult(ReplayRecord(REQUEST, "old"), {"m": answer}, {"m": float(time)}, {}, {"m": 0.5})
        for time in range(1, 101)
    ]
    results += [ReplayResult(ReplayRecord(REQUEST, "old"), {}, {"m": 9999.0, "down": 1.0}, {"m": "no", "down": "no"})]
    found = RouteCalibrator().calibrate_from_replay(results)
    assert found.requests == 101
    assert (found.latency_p50_ms, found.latency_p95_ms) == ({"m": 50.0}, {"m": 95.0})
    assert found.success_rate == {"m": 100 / 101, "down": 0.0}
    assert found.similarity == {"m": 0.5}
