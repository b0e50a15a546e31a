"""Filters by what replicas can do, and by whether they may be used now: their health, and their rate limits."""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import attrs

from kvfleet.adapters.call import MOST_TOKENS, Native, Operation
from kvfleet.builtin.facts import LANGUAGE, MODALITY, PROMPT
from kvfleet.config.fields import number
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Component, Services, Stability
from kvfleet.plugin.contract import Drop, Filtered, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.registry.models import serves
from kvfleet.router.multimodal import accepts_audio, accepts_images, accepts_video
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.trace import names

__all__ = ["CapabilityFilter", "HealthFilter", "RateLimitFilter"]

_NO_LIMIT = 1 << 62
_JSON_FORMATS = frozenset({"json_object", "json_schema"})


class _Need(enum.IntFlag):
    """What a request may need of a model."""

    CHAT = enum.auto()
    COMPLETION = enum.auto()
    EMBEDDING = enum.auto()
    RERANK = enum.auto()
    TOOLS = enum.auto()
    JSON_MODE = enum.auto()
    STREAMING = enum.auto()
    VISION = enum.auto()
    AUDIO = enum.auto()
    VIDEO = enum.auto()


_OPERATIONS = {
    Operation.CHAT: _Need.CHAT,
    Operation.COMPLETION: _Need.COMPLETION,
    Operation.EMBEDDING: _Need.EMBEDDING,
    Operation.RERANK: _Need.RERANK,
}
# In the order in which they are told, the most telling first.
_REASONS = (
    *((need, "model_type", f"does not serve {operation} requests") for operation, need in _OPERATIONS.items()),
    (_Need.TOOLS, "tools", "does not support tools"),
    (_Need.JSON_MODE, "json_mode", "does not support JSON mode"),
    (_Need.VISION, "vision", "does not accept images"),
    (_Need.AUDIO, "audio", "does not accept audio"),
    (_Need.VIDEO, "video", "does not accept video"),
    (_Need.STREAMING, "streaming", "does not stream"),
)


@attrs.define
class CapabilityFilter:
    """Drop models that cannot do what the request needs.

    Looked at are: the type of model, tools, JSON mode, pictures, sound, video, streaming, the language if
    `classify.language` can tell it, and whether prompt and answer fit into the context window. If nobody is capable,
    nobody is left, and the error says why: a 400, for the same request will fare no better later.
    """

    judges_request: ClassVar[bool] = True  # what it drops, it drops as long as the request is as it is

    window_share: float = number(
        0.8,
        ge=0,
        le=2,
        doc="Share of the estimated prompt that must fit into the window beside `max_tokens`; below 1 because the "
        "estimate may be too high, and the engine counts exactly.",
    )
    _services: Services = attrs.field(init=False, factory=Services, repr=False, eq=False)
    _lacks: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    _windows: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    _has_languages: bool = attrs.field(init=False, default=True, repr=False)
    _smallest: int = attrs.field(init=False, default=0)
    _lacked: int = attrs.field(init=False, default=-1, repr=False)
    _texts: dict[int, tuple[str, str]] = attrs.field(init=False, factory=dict, repr=False)

    def provision(self, services: Services) -> None:
        """Note what each replica cannot do."""
        self._services = services
        self._lacks = {model.id: _lacks(model) for model in services.models}
        self._windows = {model.id: _window(model) for model in services.models}
        self._has_languages = any(model.capabilities.supported_languages for model in services.models)
        self._smallest = min(self._windows.values(), default=0)
        self._lacked = functools.reduce(operator.or_, self._lacks.values(), 0) if self._lacks else -1

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """The drops."""
        native = ctx.request.native
        drops = self._incapable(ctx)
        if self._has_languages:
            drops = [*drops, *self._foreign(ctx, {drop.candidate.id for drop in drops})]
        if native is not None and native.only:
            return [*drops, *self._deaf(ctx, native, {drop.candidate.id for drop in drops})]
        return drops

    def _foreign(self, ctx: RoutingContext, dropped: Container[str]) -> list[Drop]:
        """Those of the rest that are not good at the request's language, where it is known."""
        found = ctx.fact_or_none(LANGUAGE)
        if found is None or not found.language:
            return []
        reason = f"is not good at the language {found.language}"
        return [
            Drop(model, reason, "language")
            for model in ctx.candidates
            if (spoken := model.capabilities.supported_languages)
            and found.language not in spoken
            and model.id not in dropped
        ]

    def _deaf(self, ctx: RoutingContext, native: Native, dropped: Container[str]) -> list[Drop]:
        """Those of the rest that do not speak the client's API, where only who does can answer."""
        adapters = self._services.adapters
        reason = f"does not speak the {native.surface} API itself, which {native.only} needs"
        left = [model for model in ctx.candidates if model.id not in dropped and model.id in adapters]
        return [Drop(model, reason, "surface") for model in left if not adapters[model.id].speaks(native.surface)]

    def _incapable(self, ctx: RoutingContext) -> Sequence[Drop]:
        need = _needs(ctx)
        if not need & self._lacked:  # nobody in the fleet lacks any of it
            return self._too_long(ctx, ())
        lacks = self._lacks
        drops = []
        for model in ctx.candidates:
            lacking = lacks.get(model.id, -1)
            if lacking < 0:
                lacking = _lacks(model)
            if lacking & need:
                rule, reason = self._text(lacking & need)
                drops.append(Drop(model, reason, rule))
        return drops + self._too_long(ctx, {drop.candidate.id for drop in drops})

    def _too_long(self, ctx: RoutingContext, dropped: Container[str]) -> list[Drop]:
        """Those of the rest whose window is too small."""
        prompt = ctx.fact(PROMPT).token_estimate + ctx.fact(MODALITY).estimated_image_tokens
        answer = _answer_tokens(ctx.request.body)
        needed = prompt * self.window_share + answer
        if self._windows and needed <= self._smallest:
            return []
        windows = self._windows
        found = [(m, windows[m.id] if m.id in windows else _window(m)) for m in ctx.candidates if m.id not in dropped]
        asked = f"about {prompt} tokens" + (f" and {answer} for the answer" if answer else "")
        return [
            Drop(model, f"a context window of {window} tokens is too small for {asked}", "context_window")
            for model, window in found
            if window < needed
        ]

    def _text(self, lacking: int) -> tuple[str, str]:
        """Rule and reason for what is lacking; made once for each combination, of which there are few."""
        found = self._texts.get(lacking)
        if found is None:
            told = [(rule, reason) for need, rule, reason in _REASONS if need & lacking]
            found = self._texts[lacking] = (told[0][0], "; ".join(reason for _, reason in told))
        return found


def _lacks(model: ModelConfig) -> int:
    """What a model cannot do."""
    can = model.capabilities
    checks = {
        _Need.TOOLS: can.supports_tools,
        _Need.JSON_MODE: can.supports_json_mode,
        _Need.STREAMING: can.supports_streaming,
        _Need.VISION: accepts_images(model),
        _Need.AUDIO: accepts_audio(model),
        _Need.VIDEO: accepts_video(model),
        **{need: serves(model, operation) for operation, need in _OPERATIONS.items()},
    }
    return sum(need for need, is_there in checks.items() if not is_there)


def _window(model: ModelConfig) -> int:
    return model.capabilities.max_context_window or _NO_LIMIT


def _needs(ctx: RoutingContext) -> int:
    """What a request needs."""
    request = ctx.request
    body = request.body
    need = _OPERATION_BITS[request.operation]
    if request.stream:
        need |= _STREAMING
    if body.get("tools") or body.get("functions"):
        need |= _TOOLS
    wanted = body.get("response_format")
    if isinstance(wanted, Mapping) and wanted.get("type") in _JSON_FORMATS:
        need |= _JSON_MODE
    modality = ctx.fact(MODALITY)
    if modality.is_multimodal:
        need |= modality.has_images * _VISION | modality.has_audio * _AUDIO | modality.has_video * _VIDEO
    return need


# Plain numbers, because an operation on an enum's members takes a microsecond.
_OPERATION_BITS = {operation: need.value for operation, need in _OPERATIONS.items()}
_TOOLS, _JSON_MODE, _STREAMING = _Need.TOOLS.value, _Need.JSON_MODE.value, _Need.STREAMING.value
_VISION, _AUDIO, _VIDEO = _Need.VISION.value, _Need.AUDIO.value, _Need.VIDEO.value


def _answer_tokens(body: Mapping[str, Any]) -> int:
    """The longest answer the request allows; 0 if it does not say."""
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    return min(asked, MOST_TOKENS) if isinstance(asked, int) and asked > 0 else 0


@attrs.define
class HealthFilter:
    """Drop replicas whose circuit breaker is open. If that is everybody, nobody is left: an error, not a gamble.

    So are those whose engine lists other models than theirs, where it would refuse the request (vLLM).

    Unless the section `health` sets a `panic_threshold_percent`: if fewer of a model's replicas may be called, all are.
    """

    _health: HealthManager = attrs.field(init=False, factory=HealthManager, repr=False, eq=False)
    _metrics: MetricsExporter = attrs.field(
        init=False, factory=lambda: MetricsExporter(enabled=False), repr=False, eq=False
    )

    def provision(self, services: Services) -> None:
        """Use the fleet's health."""
        self._health, self._metrics = services.health, services.metrics

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """The drops."""
        health, now_s = self._health, ctx.now_s
        unavailable = health.unavailable(now_s)
        unserved = health.unserved
        if not unavailable and not unserved and not health.panicking:
            return ()
        drops = [
            Drop(model, unavailable[model.endpoint], retry_after_s=health.wait_s(model.endpoint, now_s))
            for model in ctx.candidates
            if model.endpoint in unavailable
        ]
        if unserved:
            drops += [
                Drop(model, unserved[model.id], "model")
                for model in ctx.candidates
                if model.id in unserved and model.endpoint not in unavailable
            ]
        return self._told(ctx, drops) if health.panicking else drops

    def _told(self, ctx: RoutingContext, drops: list[Drop]) -> list[Drop]:
        """The drops, and for which of the candidates' models there is panic."""
        names_here = {model.name for model in ctx.candidates}
        panic = tuple([name for name in self._health.panicking if name in names_here])
        if not panic:
            return drops
        if not ctx.dry_run:
            for name in panic:
                self._metrics.count("kvfleet_panic_routes_total", name)
        return Filtered(drops, {names.PANIC: panic})

    def state(self) -> Mapping[str, int]:
        """Counts of endpoints by health."""
        return self._health.summary()


@attrs.define
class RateLimitFilter:
    """Drop replicas that are near or beyond a rate limit of their provider's, or that refused for it not long ago.

    One that would refuse is dropped in any case. One that only comes near its limit is left to others: it is dropped
    as long as anybody is free, and serves when nobody is. If nobody is left, the error is a 429 that says when to come
    back. Stand this after the other filters, so that "anybody" means somebody who can serve the request.
    """

    throttle_threshold: float | None = number(
        None,
        gt=0,
        le=1,
        doc="Share of a limit from which on a replica is left to others; that of `rate_limits:` if absent.",
    )
    limits_rates: ClassVar[bool] = True  # if nobody is left because of it, that is a 429
    _limits: FleetLimits = attrs.field(init=False, factory=FleetLimits, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Use the fleet's limits."""
        self._limits = services.limits
        if self.throttle_threshold is not None:
            services.limits.tracker.throttle_at(self.throttle_threshold)

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """The drops, each with its end."""
        now_s = ctx.now_s
        held = self._limits.held(ctx.candidates, now_s)
        if len(held) == len(ctx.candidates):
            held = [(model, hold) for model, hold in held if hold.is_closed(now_s)]
        return [Drop(model, hold.reason(now_s), hold.rule, hold.wait_s(now_s)) for model, hold in held]


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The filters."""
    yield Component(Kind.FILTER, "capabilities", CapabilityFilter, needs=(PROMPT, MODALITY), stability=Stability.STABLE)
    yield Component(Kind.FILTER, "health", HealthFilter, stability=Stability.STABLE)
    yield Component(Kind.FILTER, "rate_limits", RateLimitFilter)
