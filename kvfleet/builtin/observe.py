"""Observers: what is counted and logged of a route once its answer has left."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.call import Usage
from kvfleet.config.fields import choice
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import Fault
from kvfleet.plugin.component import Component, Services, Stability
from kvfleet.plugin.contract import Kind, Outcome
from kvfleet.plugin.spec import hookimpl
from kvfleet.telemetry.cost import cost_usd
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.trace import names
from kvfleet.trace.attributes import verdicts_of
from kvfleet.trace.spans import AttributeValue, Span, Status, Step, Trace

__all__ = ["LogObserver", "MetricsObserver"]

_log = logging.getLogger("kvfleet.routes")
_ESCALATED = "low_confidence"
_FOR_JUDGES = ("sample", "judge")
_STATUSES = {"answered": "success", "cached": "success", "failed": "error"}
_OF_USUAL = 2
"""Spans of a route without anything unusual: its own, and its one attempt's."""
_MOST_USUAL = 1024
_PLAIN = re.compile(r"[\w.:/@+-]+")


def _is_attempt(span: Span) -> bool:
    return names.ATTEMPT in span.attributes


def _decided_ns(trace: Trace) -> int:
    """When the choice was made: the last stage's end before the attempts; 0 if none was made."""
    for record in reversed(trace.records):
        if isinstance(record, Step):
            return record.end_ns if record.shape.fixed.get(names.STAGE_KIND) == Kind.SELECT else 0
        if record.attributes.get(names.STAGE_KIND) == Kind.SELECT:
            return int(record.end_ns)
    return 0


def _texts(value: AttributeValue | None) -> Sequence[str]:
    """A list of texts, as an attribute has it."""
    return [str(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else []


class _Usual:
    """What is raised for a route that its first attempt answered, by strategy and model: nearly all of them."""

    __slots__ = (
        "attempts",
        "completion",
        "decision",
        "latency",
        "metrics",
        "model",
        "prompt",
        "routes",
        "selected",
        "ttfb",
    )

    def __init__(self, metrics: MetricsExporter, strategy: str, model: str) -> None:
        self.metrics, self.model = metrics, model
        self.routes = metrics.counter("kvfleet_route_requests_total", strategy, "success")
        self.selected = metrics.counter("kvfleet_model_selected_total", model)
        self.attempts = metrics.counter("kvfleet_attempts_total", model, "ok")
        self.latency = metrics.histogram("kvfleet_route_latency_seconds", strategy)
        self.decision = metrics.histogram("kvfleet_decision_seconds", strategy)
        self.ttfb = metrics.histogram("kvfleet_time_to_first_byte_seconds", model)
        self.prompt: list[float] | None = None  # not there before there is something to count
        self.completion: list[float] = []

    def count(self, outcome: Outcome, decided_s: float) -> None:
        """Count one route."""
        self.routes[0] += 1
        self.selected[0] += 1
        self.attempts[0] += 1
        self.latency.add(outcome.duration_s)
        self.decision.add(decided_s)
        if outcome.ttfb_s is not None:
            self.ttfb.add(outcome.ttfb_s)
        usage, cost = outcome.usage, outcome.cost_usd
        if usage is not None:
            if self.prompt is None:
                self.prompt = self.metrics.counter("kvfleet_tokens_total", self.model, "prompt")
                self.completion = self.metrics.counter("kvfleet_tokens_total", self.model, "completion")
            self.prompt[0] += usage.prompt_tokens
            self.completion[0] += usage.completion_tokens
            if usage.cached_tokens:
                self.metrics.count("kvfleet_tokens_total", self.model, "cached", by=usage.cached_tokens)
        if cost is not None:
            self.metrics.count("kvfleet_cost_usd_total", self.model, by=cost)


@attrs.define
class MetricsObserver:
    """Count routes, attempts, drops and tokens for Prometheus, all read from the route's record."""

    _metrics: MetricsExporter = attrs.field(
        init=False, factory=lambda: MetricsExporter(enabled=False), repr=False, eq=False
    )

    _usual: dict[tuple[str, str], _Usual] = attrs.field(init=False, factory=dict, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Write to the fleet's metrics, and let them show the fleet's state."""
        self._metrics = services.metrics
        services.metrics.watch(services.models, services.health, services.load, services.limits)

    async def observe(self, outcome: Outcome) -> None:
        """Count one route."""
        if not self._metrics.enabled:
            return
        trace = outcome.trace
        strategy = str(trace.route.attributes.get(names.STRATEGY, ""))
        if len(trace.full) == _OF_USUAL and self._count_usual(outcome, strategy):
            return
        self._count_route(outcome, strategy)
        attempts: list[Span] = []
        for span in trace.full[1:]:  # what is a step still went as it should, and there is nothing in it to count
            if names.ATTEMPT in span.attributes:
                attempts.append(span)
            else:
                self._count_stage(span)
        decided_ns = _decided_ns(trace)
        if decided_ns:
            self._metrics.observe("kvfleet_decision_seconds", (decided_ns - trace.route.start_ns) / 1e9, strategy)
        self._count_attempts(attempts)
        if names.CONFIDENCE_ATTEMPTS in trace.route.attributes:
            self._observe_confidence(outcome, attempts)

    def _count_usual(self, outcome: Outcome, strategy: str) -> bool:
        """Count a route that went as nearly all do; False if it did not."""
        trace, served = outcome.trace, outcome.served_by
        route, attempt = trace.full
        if served is None or attempt.status is not Status.OK or names.ATTEMPT not in attempt.attributes:
            return False
        attributes = route.attributes
        if (
            attributes.get(names.OUTCOME) != "answered"
            or attributes.get(names.MODEL_SELECTED) != served.name
            or names.CONFIDENCE_ATTEMPTS in attributes
            or not (decided_ns := _decided_ns(trace))
        ):
            return False
        cells = self._usual.get((strategy, served.name))
        if cells is None:
            if len(self._usual) >= _MOST_USUAL:
                self._usual.clear()
            cells = self._usual[strategy, served.name] = _Usual(self._metrics, strategy, served.name)
        cells.count(outcome, (decided_ns - route.start_ns) / 1e9)
        return True

    def _count_route(self, outcome: Outcome, strategy: str) -> None:
        metrics, attributes = self._metrics, outcome.trace.route.attributes
        word = str(attributes.get(names.OUTCOME, "failed"))
        chosen = str(attributes.get(names.MODEL_SELECTED, ""))
        metrics.record_route(strategy, chosen, outcome.duration_s, outcome.is_success, status=_STATUSES.get(word, word))
        for one in outcome.unused:
            self._count_use(one.model, one.usage, one.cost_usd)
        served, usage = outcome.served_by, outcome.usage
        if served is None:
            return
        if outcome.ttfb_s is not None:
            metrics.observe("kvfleet_time_to_first_byte_seconds", outcome.ttfb_s, served.name)
        cost = outcome.cost_usd
        if outcome.unused:
            cost = None if usage is None else cost_usd(served, usage)
        self._count_use(served, usage, cost)

    def _count_use(self, model: ModelConfig, usage: Usage | None, cost: float | None) -> None:
        """Tokens and money of one answer, as far as they are known."""
        if usage is not None:
            self._metrics.record_tokens(model.name, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        if cost is not None:
            self._metrics.count("kvfleet_cost_usd_total", model.name, by=cost)

    def _count_attempts(self, attempts: Sequence[Span]) -> None:
        metrics = self._metrics
        before = None
        for span in attempts:
            attributes = span.attributes
            model, reason = str(attributes.get(names.MODEL, "")), attributes.get(names.ATTEMPT_REASON)
            outcome = str(attributes.get(names.ERROR_TYPE, "ok"))
            metrics.record_attempt(model, outcome)
            if outcome == Fault.RATE_LIMITED or (outcome == Fault.OVERLOADED and names.RETRY_AFTER_S in attributes):
                endpoint = str(attributes.get(names.REPLICA, "")).partition("@")[2]
                metrics.count("kvfleet_rate_limited_total", model, endpoint)
            if reason in _FOR_JUDGES:
                continue
            if before is not None and reason == _ESCALATED:
                metrics.count("kvfleet_escalations_total", before, model)
            elif before is not None:
                metrics.record_fallback(before, model)
            before = model

    def _observe_confidence(self, outcome: Outcome, attempts: Sequence[Span]) -> None:
        """How far answers were trusted, by the models that gave them."""
        verdicts = verdicts_of(outcome.trace)
        for span in attempts if verdicts else ():
            value, _ = verdicts.get(int(str(span.attributes[names.ATTEMPT])), (-1.0, ""))
            if value >= 0:
                self._metrics.observe("kvfleet_confidence", value, str(span.attributes.get(names.MODEL, "")))

    def _count_stage(self, span: Span) -> None:
        metrics, attributes = self._metrics, span.attributes
        kind = attributes.get(names.STAGE_KIND)
        key = f"{kind}.{attributes.get(names.STAGE_NAME)}"
        if kind == Kind.FILTER:
            for rule in _texts(attributes.get(names.DROPPED_RULES)):
                metrics.count("kvfleet_drops_total", key, rule)
                if attributes.get(names.STAGE_POLICY):
                    metrics.record_policy_block(rule or key)
        elif kind == Kind.ANSWER:
            metrics.count("kvfleet_answers_total", key, "true" if attributes.get(names.ANSWERED) else "false")
            if names.ANSWER_MATCH in attributes:
                self._count_savings(key, attributes)
        elif kind == Kind.ADMIT and attributes.get(names.ADMITTED) is False:
            metrics.count("kvfleet_admissions_refused_total", key)
        if span.status is Status.ERROR and names.ERROR_TYPE in attributes:
            metrics.count(
                "kvfleet_stage_failures_total", key, "true" if attributes.get(names.STAGE_SKIPPED) else "false"
            )

    def _count_savings(self, key: str, attributes: Mapping[str, AttributeValue]) -> None:
        """What an answer from memory saved."""
        metrics = self._metrics
        metrics.count("kvfleet_answer_hits_total", key, str(attributes[names.ANSWER_MATCH]))
        for kind, name in (("prompt", names.ANSWER_SAVED_PROMPT), ("completion", names.ANSWER_SAVED_COMPLETION)):
            if isinstance(count := attributes.get(name), int):
                metrics.count("kvfleet_answer_saved_tokens_total", key, kind, by=count)
        if isinstance(cost := attributes.get(names.ANSWER_SAVED_USD), float):
            metrics.count("kvfleet_answer_saved_usd_total", key, by=cost)


@attrs.frozen
class LogObserver:
    """Log one line for each route: who asked, who answered, how it went. Never what was asked or answered."""

    format: str = choice(
        "plain", of=("plain", "json"), doc="key=value pairs, or one JSON object a line for log collectors."
    )

    async def observe(self, outcome: Outcome) -> None:
        """Log one route."""
        if not _log.isEnabledFor(logging.INFO):
            return
        facts = _facts(outcome)
        if self.format == "json":
            _log.info("%s", json.dumps({"event": "route", **facts}))
        else:
            _log.info("route %s", " ".join(f"{key}={_quoted(value)}" for key, value in facts.items()))


def _facts(outcome: Outcome) -> Mapping[str, Any]:
    """What the line says; what is not known is left out."""
    attributes, usage = outcome.trace.route.attributes, outcome.usage
    found = {
        "request_id": attributes.get(names.REQUEST_ID),
        "trace_id": outcome.trace.trace_id,
        "tenant": outcome.context.tenant,
        "key": outcome.context.request.key,
        "outcome": attributes.get(names.OUTCOME),
        "error": outcome.error.code if outcome.error is not None else None,
        "strategy": attributes.get(names.STRATEGY),
        "selected": attributes.get(names.REPLICA_SELECTED),
        "served_by": outcome.served_by.id if outcome.served_by is not None else None,
        "attempts": sum(map(_is_attempt, outcome.trace.stages)),
        "ttfb_ms": None if outcome.ttfb_s is None else round(outcome.ttfb_s * 1000, 1),
        "duration_ms": round(outcome.duration_s * 1000, 1),
        "prompt_tokens": usage.prompt_tokens if usage is not None else None,
        "completion_tokens": usage.completion_tokens if usage is not None else None,
        "cached_tokens": usage.cached_tokens if usage is not None else None,
        "cost_usd": outcome.cost_usd,
    }
    return {key: value for key, value in found.items() if value not in (None, "")}


def _quoted(value: object) -> str:
    """A value that cannot end its pair or its line: request ids and tenants come from outside."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The observers."""
    yield Component(Kind.OBSERVE, "metrics", MetricsObserver, stability=Stability.STABLE)
    yield Component(Kind.OBSERVE, "log", LogObserver, stability=Stability.STABLE)
