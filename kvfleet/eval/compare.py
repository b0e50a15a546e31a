"""Models side by side on one request, and recorded requests put to other models."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import attrs

from kvfleet.adapters.base import ChatRequest, ChatResponse, InferenceAdapter
from kvfleet.clock import Clock, SystemClock
from kvfleet.eval.asking import Asked, ask, call_for, quantile, similarity

__all__ = [
    "CalibrationResult",
    "ComparisonResult",
    "ModelComparator",
    "ReplayEngine",
    "ReplayRecord",
    "ReplayResult",
    "RouteCalibrator",
]


@attrs.frozen
class ComparisonResult:
    """What several models made of one request; each model is among `results` or among `errors`.

    Attributes:
        prompt: The last message of the user.
        results: Answers by model.
        latencies: Milliseconds until the whole answer, or until it was given up, by model.
        errors: Why there was no answer, by model.
    """

    prompt: str = attrs.field(repr=False)
    results: Mapping[str, ChatResponse] = attrs.field(factory=dict, repr=False)
    latencies: Mapping[str, float] = attrs.field(factory=dict)
    errors: Mapping[str, str] = attrs.field(factory=dict)


@attrs.define
class ModelComparator:
    """Asks several models the same, at once.

    Args:
        timeout_s: Longest wait for one answer.
        most_at_once: Most calls in flight.
        clock: For latencies.
    """

    timeout_s: float = 60.0
    most_at_once: int = 8
    clock: Clock = attrs.field(factory=SystemClock, repr=False)

    async def compare(
        self, request: ChatRequest, adapters: Mapping[str, InferenceAdapter], model_names: Sequence[str]
    ) -> ComparisonResult:
        """Ask each; a model that fails, is too slow, or has no adapter is among the errors.

        Args:
            request: What to ask; its ``model`` does not count.
            adapters: By model name.
            model_names: Whom to ask.
        """
        call = call_for(request, timeout_s=self.timeout_s)
        found: dict[str, Asked] = {}
        limit = anyio.CapacityLimiter(self.most_at_once)

        async def one(name: str, adapter: InferenceAdapter) -> None:
            async with limit:
                found[name] = await ask(adapter, call, timeout_s=self.timeout_s, clock=self.clock)

        async with anyio.create_task_group() as group:
            for name in dict.fromkeys(model_names):
                adapter = adapters.get(name)
                if adapter is None:
                    found[name] = Asked(error=f"no adapter for {name!r}", fault="connect")
                else:
                    group.start_soon(one, name, adapter)
        ordered = {name: found[name] for name in dict.fromkeys(model_names)}
        return ComparisonResult(
            prompt=_prompt(request),
            results={name: asked.response for name, asked in ordered.items() if asked.response is not None},
            latencies={name: asked.latency_ms for name, asked in ordered.items()},
            errors={name: asked.error for name, asked in ordered.items() if asked.error},
        )


@attrs.frozen
class ReplayRecord:
    """A request that was answered: what was asked, who answered, and what."""

    request: ChatRequest = attrs.field(repr=False)
    model: str
    response: ChatResponse | None = attrs.field(default=None, repr=False)
    recorded_ns: int = 0


@attrs.frozen
class ReplayResult:
    """A recorded request beside what other models made of it.

    Attributes:
        record: The record.
        results, latencies, errors: As in `ComparisonResult`.
        similarities: How alike each answer is to the recorded one, 0 to 1; only if that was recorded.
    """

    record: ReplayRecord
    results: Mapping[str, ChatResponse] = attrs.field(factory=dict, repr=False)
    latencies: Mapping[str, float] = attrs.field(factory=dict)
    errors: Mapping[str, str] = attrs.field(factory=dict)
    similarities: Mapping[str, float] = attrs.field(factory=dict)


@attrs.define
class ReplayEngine:
    """Remembers requests and puts them to other models later.

    In a gateway, `observe.record` writes requests to a file and ``kvfleet rerun`` does this with them.

    Args:
        most_records: Records kept; the oldest go first.
        comparator: Asks the models.
    """

    most_records: int = 10_000
    comparator: ModelComparator = attrs.field(factory=ModelComparator, repr=False)
    _records: deque[ReplayRecord] = attrs.field(init=False, repr=False)

    @_records.default
    def _make_records(self) -> deque[ReplayRecord]:
        return deque(maxlen=self.most_records)

    def record(self, request: ChatRequest, model: str, response: ChatResponse | None = None) -> None:
        """Remember a request, who answered it, and what."""
        self._records.append(ReplayRecord(request, model, response, self.comparator.clock.time_ns()))

    async def replay(
        self,
        adapters: Mapping[str, InferenceAdapter],
        model_names: Sequence[str],
        limit: int = 100,
        *,
        on_result: Callable[[ReplayResult], Any] | None = None,
    ) -> list[ReplayResult]:
        """Put the newest `limit` records to each of these models, the oldest of them first.

        Args:
            adapters: By model name.
            model_names: Whom to ask.
            limit: Most records.
            on_result: Told of each, for a progress display.
        """
        found = []
        for record in self.get_records(limit):
            compared = await self.comparator.compare(record.request, adapters, model_names)
            result = ReplayResult(
                record, compared.results, compared.latencies, compared.errors, _similarities(record, compared)
            )
            found.append(result)
            if on_result is not None:
                on_result(result)
        return found

    def get_records(self, limit: int | None = None) -> list[ReplayRecord]:
        """The newest records, the oldest of them first."""
        kept = list(self._records)
        return kept if limit is None else kept[max(len(kept) - limit, 0) :]

    def clear_records(self) -> None:
        """Forget them."""
        self._records.clear()

    @property
    def record_count(self) -> int:
        """How many there are."""
        return len(self._records)


@attrs.frozen
class CalibrationResult:
    """What replays say of each model, in the terms of a fleet file.

    Attributes:
        requests: Replays looked at.
        latency_p50_ms, latency_p95_ms: For the fields of these names; over the answers there were.
        success_rate: Share of the replays that were answered, 0 to 1.
        similarity: Mean likeness to the recorded answers, 0 to 1; only models with any.
    """

    requests: int
    latency_p50_ms: Mapping[str, float] = attrs.field(factory=dict)
    latency_p95_ms: Mapping[str, float] = attrs.field(factory=dict)
    success_rate: Mapping[str, float] = attrs.field(factory=dict)
    similarity: Mapping[str, float] = attrs.field(factory=dict)


class RouteCalibrator:
    """Measures what a fleet file declares of its models, from replays."""

    def calibrate_from_replay(self, results: Sequence[ReplayResult]) -> CalibrationResult:
        """The measures of every model among the replays."""
        models = list(dict.fromkeys(name for one in results for name in one.latencies))
        times = {name: [one.latencies[name] for one in results if name in one.results] for name in models}
        asked = {name: sum(name in one.latencies for one in results) for name in models}
        alike = {name: [one.similarities[name] for one in results if name in one.similarities] for name in models}
        return CalibrationResult(
            requests=len(results),
            latency_p50_ms={name: quantile(found, 0.5) for name, found in times.items() if found},
            latency_p95_ms={name: quantile(found, 0.95) for name, found in times.items() if found},
            success_rate={name: len(times[name]) / asked[name] for name in models},
            similarity={name: sum(found) / len(found) for name, found in alike.items() if found},
        )


def _similarities(record: ReplayRecord, compared: ComparisonResult) -> dict[str, float]:
    if record.response is None:
        return {}
    return {name: similarity(record.response.content, given.content) for name, given in compared.results.items()}


def _prompt(request: ChatRequest) -> str:
    """The last message of the user, as far as it is text."""
    for message in reversed(request.messages):
        if message.role == "user":
            content = message.content
            if isinstance(content, str):
                return content
            return "\n".join(str(part["text"]) for part in content or () if "text" in part)
    return ""
