"""`observe.record` in a live router: what it writes, how much, and what of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FleetConfig, ModelConfig, StageConfig
from kvfleet.eval.records import RecordedRequest, older, read_records
from kvfleet.plugin.contract import RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.explanation import Explanation

TABLE = discover()
MODEL = ModelConfig(name="m", endpoint="http://m", provider="vllm")
BODY = {"model": "auto", "messages": [{"role": "user", "content": "Open sesame"}]}


async def record(
    folder: Path | None, number: int = 1, state: list[Any] | None = None, **options: Any
) -> list[RecordedRequest]:
    """What is in the file after so many requests."""
    stages = [StageConfig(use=use) for use in ("classify.prompt", "select.static", "execute.fallback")]
    config = FleetConfig(models=(MODEL,), pipeline=(*stages, StageConfig(use="observe.record", options=options)))
    adapters: Mapping[str, FakeAdapter] = {MODEL.id: FakeAdapter(model_id="m", script=FakeReply(text="It opens."))}
    router = Router(config, table=TABLE, clock=FrozenClock(), adapters=adapters, polls=False, seed=3, state_dir=folder)
    async with router:
        for _ in range(number):
            await router.dispatch(
                RouteRequest(body=BODY, tenant="t", session="s", tags={"k": "v"}, condition_headers={"x-tier": "1"})
            )
            await router.settled()
    if state is not None:
        state.append(router.state()["stages"]["observe.record"])
    return list(read_records(folder / "requests.jsonl")) if folder and (folder / "requests.jsonl").exists() else []


async def test_without_content_a_record_has_the_decision_and_no_text(tmp_path: Path) -> None:
    """Who asked, how it was decided, and what it took."""
    (one,) = await record(tmp_path)
    assert (one.tenant, one.tags, one.model, one.model_requested) == ("t", {"k": "v"}, "m", "auto")
    assert one.condition_headers == {"x-tier": "1"}
    assert Explanation(one.trace).selected_model == "m"
    assert one.completion_tokens
    written = (tmp_path / "requests.jsonl").read_bytes()
    assert b"sesame" not in written
    assert b"opens" not in written
    assert (tmp_path / "requests.jsonl").stat().st_mode & 0o777 == 0o600


async def test_with_content_it_has_the_request_and_the_answer(tmp_path: Path) -> None:
    """As they were."""
    (one,) = await record(tmp_path, content=True)
    assert (one.body, one.answer) == (BODY, "It opens.")


async def test_the_files_are_bounded(tmp_path: Path) -> None:
    """A full file replaces the one before it; together they keep to the limit."""
    state: list[Any] = []
    await record(tmp_path, 40, state, max_megabytes=0.01)
    assert state[0]["recorded"] == 40
    paths = [tmp_path / "requests.jsonl", older(tmp_path / "requests.jsonl")]
    assert all(path.exists() for path in paths)
    assert sum(path.stat().st_size for path in paths) <= 10_000


@pytest.mark.parametrize(("rate", "least", "most"), [(0.0, 0, 0), (0.5, 5, 35), (1.0, 40, 40)])
async def test_a_share_is_recorded(tmp_path: Path, rate: float, least: int, most: int) -> None:
    """None, about half, or all."""
    assert least <= len(await record(tmp_path, 40, sample_rate=rate)) <= most


async def test_without_a_place_nothing_is_written() -> None:
    """A router that keeps no state records nothing, and says nothing was recorded."""
    state: list[Any] = []
    assert await record(None, state=state) == []
    assert state == [{"recorded": 0, "dropped": 0, "waiting": 0}]


async def test_a_place_that_cannot_be_written_costs_records_alone(tmp_path: Path) -> None:
    """They are counted, and the answers were given."""
    place = tmp_path / "file"
    place.write_text("in the way")
    state: list[Any] = []
    await record(None, state=state, path=str(place / "r.jsonl"))
    assert state[0]["dropped"] == 1
