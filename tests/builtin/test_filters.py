"""Filters by capability, health and rate limits."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.base import EndpointHealth
from kvfleet.adapters.call import Operation
from kvfleet.builtin.classify import LanguageClassifier
from kvfleet.builtin.filters import CapabilityFilter, HealthFilter, RateLimitFilter
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import Fault
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Drop, RoutingContext
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.rate_limits import RateLimitTracker
from tests.builtin.making import able, context, model, user

PLAIN = able("plain")
ABLE = able(
    "able",
    supports_tools=True,
    supports_json_mode=True,
    supports_vision=True,
    supports_audio=True,
    supports_video=True,
)
TOOL = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def part(kind: str) -> dict[str, Any]:
    """A user message with one part of some kind."""
    return {"role": "user", "content": [{"type": kind, kind: {}}]}


def dropped(ctx: RoutingContext, **options: Any) -> dict[str, tuple[str, str]]:
    """By model: rule and reason, the same whether the fleet is known beforehand or not."""
    known, unknown = CapabilityFilter(**options), CapabilityFilter(**options)
    known.provision(Services(models=ctx.candidates))
    found = {drop.candidate.name: (drop.rule, drop.reason) for drop in known.filter(ctx)}
    assert {drop.candidate.name: (drop.rule, drop.reason) for drop in unknown.filter(ctx)} == found
    return found


@pytest.mark.parametrize(
    ("ctx", "rule", "reason"),
    [
        ({"body": {"tools": TOOL}}, "tools", "does not support tools"),
        ({"body": {"functions": [{"name": "f"}]}}, "tools", "does not support tools"),
        ({"body": {"response_format": {"type": "json_object"}}}, "json_mode", "does not support JSON mode"),
        ({"body": {"response_format": {"type": "json_schema"}}}, "json_mode", "does not support JSON mode"),
        ({"messages": [part("image_url")]}, "vision", "does not accept images"),
        ({"messages": [part("input_audio")]}, "audio", "does not accept audio"),
        ({"messages": [part("video_url")]}, "video", "does not accept video"),
    ],
)
def test_each_need_drops_who_cannot(ctx: dict[str, Any], rule: str, reason: str) -> None:
    """With the exact reason, and nobody else."""
    assert dropped(context([PLAIN, ABLE], **ctx)) == {"plain": (rule, reason)}


@pytest.mark.parametrize(
    "body", [{}, {"tools": []}, {"tools": None}, {"response_format": {"type": "text"}}, {"response_format": None}]
)
def test_who_needs_nothing_drops_nobody(body: dict[str, Any]) -> None:
    """An empty list of tools, or plain text as the format, asks nothing of a model."""
    assert dropped(context([PLAIN, ABLE], [user("Hi")], body=body)) == {}


def test_streaming_is_a_capability() -> None:
    """Only asked of requests that stream."""
    whole = able("whole", supports_streaming=False)
    assert dropped(context([whole, PLAIN], stream=True)) == {"whole": ("streaming", "does not stream")}
    assert dropped(context([whole, PLAIN])) == {}


async def test_a_language_that_is_known_drops_who_is_not_good_at_it() -> None:
    """By the request's tag or its text; a model that names no languages takes any, and so does all where none is known."""
    models = (
        able("any"),
        able("english", supported_languages=("en",)),
        able("german", supported_languages=("de", "en")),
    )
    german = [user("Wie backe ich ein Brot, das nicht trocken wird?")]

    async def found(**asked: Any) -> dict[str, tuple[str, str]]:
        ctx = context(models, **asked)
        ctx.facts.update(await LanguageClassifier().classify(ctx))  # type: ignore[attr-defined]
        return dropped(ctx)

    reason = "is not good at the language"
    assert await found(messages=german) == {"english": ("language", f"{reason} de")}
    assert await found(messages=german, tags={"language": "en-GB"}) == {}
    assert set(await found(tags={"language": "fr"})) == {"english", "german"}
    assert await found(messages=[user("x = f(3)")]) == {}
    assert dropped(context(models, messages=german)) == {}


def test_everything_that_is_lacking_is_told() -> None:
    """The rule is the most telling one; the reason has them all."""
    ctx = context([PLAIN], [part("image_url")], body={"tools": TOOL})
    assert dropped(ctx) == {"plain": ("tools", "does not support tools; does not accept images")}


@pytest.mark.parametrize(
    ("operation", "left"),
    [
        (Operation.CHAT, ["chat"]),
        (Operation.COMPLETION, ["chat", "completion"]),
        (Operation.EMBEDDING, ["embedding"]),
        (Operation.RERANK, ["rerank"]),
    ],
)
def test_a_model_serves_what_its_type_serves(operation: Operation, left: list[str]) -> None:
    """Embedding models stay out of chat, and chat models out of embedding."""
    models = [able(kind, model_type=kind) for kind in ("chat", "completion", "embedding", "rerank")]
    found = dropped(context(models, operation=operation))
    assert [m.name for m in models if m.name not in found] == left
    assert set(found.values()) <= {("model_type", f"does not serve {operation} requests")}


def test_a_prompt_must_fit_the_window_with_its_answer() -> None:
    """Prompt and `max_tokens` together; a window nobody declared is not checked."""
    small, large = able("small", max_context_window=4096), able("large", max_context_window=32_768)
    models, talk = [small, large, PLAIN], [user("x" * 4000)]
    assert dropped(context(models, talk)) == {}
    assert dropped(context(models, talk, body={"max_tokens": 4000})) == {
        "small": (
            "context_window",
            "a context window of 4096 tokens is too small for about 1000 tokens and 4000 for the answer",
        )
    }
    assert dropped(context(models, [user("x" * 40_000)])) == {
        "small": ("context_window", "a context window of 4096 tokens is too small for about 10000 tokens")
    }


def test_the_newer_name_of_max_tokens_counts() -> None:
    """`max_completion_tokens` is asked for first; what is no number is not counted."""
    models = [able("small", max_context_window=4096)]
    body = {"max_completion_tokens": 9000, "max_tokens": 1}
    assert list(dropped(context(models, body=body))) == ["small"]
    assert dropped(context(models, body={"max_tokens": "many"})) == {}


def test_pictures_take_room_in_the_window() -> None:
    """765 tokens each."""
    models = [able("small", max_context_window=512, supports_vision=True)]
    assert list(dropped(context(models, [part("image_url")]))) == ["small"]


def test_an_estimate_that_is_a_little_too_long_is_left_to_the_engine() -> None:
    """The estimate may be a fifth too high; the engine counts exactly, and says so itself."""
    models = [able("small", max_context_window=1000)]
    talk = [user("x" * 4800)]
    assert dropped(context(models, talk)) == {}
    assert list(dropped(context(models, talk), window_share=1.0)) == ["small"]


def test_if_nobody_is_capable_everybody_is_dropped() -> None:
    """There is no falling open to models that would fail."""
    assert len(dropped(context([PLAIN, able("other")], body={"tools": TOOL}))) == 2


# Health


def fleet(*, threshold: int = 1) -> tuple[HealthFilter, Services, list[ModelConfig]]:
    """A health filter over two replicas of a model and another model beside one of them."""
    clock = FrozenClock()
    models = [model("m", "http://a"), model("m", "http://b"), model("n", "http://a")]
    health = HealthManager(failure_threshold=threshold, recovery_timeout_seconds=60, clock=clock)
    services = Services(clock=clock, models=tuple(models), health=health)
    stage = HealthFilter()
    stage.provision(services)
    return stage, services, models


def test_a_healthy_fleet_is_left_alone() -> None:
    """Nobody is dropped for being unknown."""
    stage, _, models = fleet()
    assert list(stage.filter(context(models))) == []


def test_replicas_behind_an_open_breaker_are_dropped() -> None:
    """With the breaker's reason; the other replica of the model stays."""
    stage, services, models = fleet()
    services.health.record_failure("http://a", Fault.CONNECT)
    drops = list(stage.filter(context(models, now_s=services.clock.now_s())))
    reason = "circuit open after 1 failed calls, last connect"
    assert drops == [Drop(models[0], reason, retry_after_s=60), Drop(models[2], reason, retry_after_s=60)]


def test_if_everybody_is_down_nobody_is_left() -> None:
    """That is an error with reasons, not a gamble."""
    stage, services, models = fleet()
    services.health.record_failure("http://a", Fault.CONNECT)
    for _ in range(3):
        services.health.update_health(EndpointHealth(endpoint="http://b", healthy=False))
    assert len(list(stage.filter(context(models, now_s=services.clock.now_s())))) == 3
    assert stage.state()["circuit_breakers_open"] == 2


def test_the_filter_goes_by_the_routes_own_time() -> None:
    """After the wait, the replica is a candidate again."""
    stage, services, models = fleet()
    services.health.record_failure("http://a", Fault.CONNECT)
    assert list(stage.filter(context(models, now_s=services.clock.now_s() + 60))) == []


# Rate limits


NEAR = {"ratelimit": "limit=100, remaining=8, reset=30"}
SPENT = {"ratelimit": "limit=100, remaining=0, reset=30"}


def limited(**told: dict[str, str]) -> tuple[RateLimitFilter, Services, list[ModelConfig]]:
    """A filter over three models, some of which have told of their limits."""
    clock = FrozenClock()
    models = [model(name) for name in "abc"]
    services = Services(clock=clock, models=tuple(models), limits=FleetLimits(RateLimitTracker(clock=clock)))
    services.limits.register(models)
    for one in models:
        if one.name in told:
            services.limits.begin(one.id).heard(told[one.name])
    stage = RateLimitFilter()
    stage.provision(services)
    return stage, services, models


def drops(stage: RateLimitFilter, models: list[ModelConfig], now_s: float = 1000.0) -> dict[str, tuple[str, str, Any]]:
    """By model: rule, reason, and when it may be there again."""
    found = stage.filter(context(models, now_s=now_s))
    return {drop.candidate.name: (drop.rule, drop.reason, drop.retry_after_s) for drop in found}


def test_without_limits_nobody_is_dropped() -> None:
    """Not knowing is no reason."""
    stage, _, models = limited()
    assert drops(stage, models) == {}


def test_who_is_near_or_beyond_a_limit_is_dropped_with_its_end() -> None:
    """The reason says what, and for how long."""
    stage, _, models = limited(a=NEAR, b=SPENT)
    assert drops(stage, models) == {
        "a": ("requests", "held back at 92% of its limit of requests, for another 30 s", 30.0),
        "b": ("requests", "its limit of requests is used up, for another 30 s", 30.0),
    }


def test_if_nobody_is_free_those_that_are_only_near_serve() -> None:
    """The last 15 % are there to be used; who would refuse is dropped all the same."""
    stage, _, models = limited(a=NEAR, b=SPENT, c=NEAR)
    assert list(drops(stage, models)) == ["b"]
    assert list(drops(stage, models[:2])) == ["b"]
    assert list(drops(stage, models[:1])) == []


def test_if_all_would_refuse_all_are_dropped() -> None:
    """No call is made that is known to fail."""
    stage, _, models = limited(a=SPENT, b=SPENT, c=SPENT)
    assert list(drops(stage, models)) == ["a", "b", "c"]


def test_limits_end_by_the_routes_own_time() -> None:
    """After the reset all are candidates again."""
    stage, _, models = limited(a=NEAR, b=SPENT)
    assert drops(stage, models, 1030.0) == {}


def test_a_threshold_of_its_own_is_the_fleets() -> None:
    """What capacity and dashboards say goes by it too."""
    stage, services, models = limited(a=NEAR)
    RateLimitFilter(throttle_threshold=0.95).provision(services)
    assert services.limits.tracker.throttle_threshold == 0.95
    assert drops(stage, models) == {}
