"""Affinity where engines themselves tell what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest

pytest.importorskip("msgspec")

from kvfleet.adapters.call import Usage
from kvfleet.builtin.affinity import PrefixAffinity
from kvfleet.builtin.tokens import TOKENS, PromptTokens
from kvfleet.cache.kv_events import AllCleared
from kvfleet.cache.kv_state import CacheState, KVMode
from kvfleet.clock import FrozenClock
from kvfleet.config.caching import KVEventsConfig, PromptBlocksConfig
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import RoutingContext
from kvfleet.trace import names
from kvfleet.trace.spans import Span
from tests.builtin.making import context, outcome, user
from tests.cache.made import removed, stored
from tests.cache.publisher import Publisher, pump
from tests.cache.test_knowledge import chain

PROMPT = list(range(100, 300))
TELLING: dict[str, Any] = {
    "kv_events": KVEventsConfig(replay="tcp://{host}:1"),
    "prompt_blocks": PromptBlocksConfig(mode="engine", block_tokens=4),
}
A, B = (ModelConfig(name="m", endpoint=f"http://{name}", **TELLING) for name in "ab")
PLAIN = ModelConfig(name="n", endpoint="http://n")
FLEET = (A, B, PLAIN)


class Fleet:
    """Two replicas that tell, and one that does not."""

    def __init__(self, **options: Any) -> None:
        self.clock = FrozenClock()
        self.services = Services(clock=self.clock, models=FLEET)
        self.services.caches.clock = self.clock
        self.services.caches.register(FLEET)
        self.stage = PrefixAffinity(**options)
        self.stage.provision(self.services)
        for at in (0, 1):
            self.state(at).connected()
            pump(Publisher(self.clock), self.state(at))  # type: ignore[arg-type]

    def state(self, at: int = 0) -> CacheState:
        """What an engine told."""
        return self.services.caches.sources[at].states[0]

    def store(self, name: int, tokens: list[int], at: int = 0, **more: Any) -> None:
        """An engine stored blocks."""
        names = [name + i for i in range(len(tokens) // 4)]
        self.state(at).take_in(0, [stored(names, tokens, **more)], 0.0)

    def request(self, tokens: list[int] | None = PROMPT) -> RoutingContext:
        """A request of so many tokens, a second later."""
        self.clock.advance(1.0)
        text = " ".join(map(str, tokens or []))
        ctx = context(FLEET, [user(text)], now_s=self.clock.now_s())
        if tokens is not None:
            facts: dict[Any, Any] = ctx.facts  # type: ignore[assignment]
            facts[TOKENS] = PromptTokens({"m": chain(tokens)})
        return ctx

    def expect(
        self, tokens: list[int] | None = PROMPT, ctx: RoutingContext | None = None
    ) -> dict[str, tuple[int, str]]:
        """By replica: what is expected, and how that is known."""
        ctx = ctx or self.request(tokens)
        found = self.stage.affinity(ctx)
        known: dict[str, float] = ctx.affinity  # type: ignore[assignment]
        known.update(zip([m.id for m in FLEET], found.tokens, strict=True))
        return {
            model.endpoint[-1]: (round(count), mode.value)
            for model, count, mode in zip(FLEET, found.tokens, found.modes, strict=True)
        }

    def reasons(self, tokens: list[int] | None = PROMPT) -> Sequence[str]:
        """Why each replica's cache is known no better."""
        return self.stage.affinity(self.request(tokens)).reasons

    async def answer(self, served: ModelConfig | None, cached: int | None = None, *, continued: int = 0) -> None:
        """A request that was answered by a replica; `continued` times by another than began it."""
        ctx = self.request()
        self.expect(ctx=ctx)
        self.stage.placed(ctx, served or A)
        usage = Usage(len(PROMPT), 1, cached_tokens=cached) if served is not None else None
        route = Span("kvfleet.route", 0, attributes={names.CONTINUED: continued} if continued else {})
        await self.stage.observe(outcome(ctx, served, usage=usage, spans=[route]))


@pytest.fixture
def fleet() -> Fleet:
    """A fleet."""
    return Fleet()


async def test_what_is_told_is_expected(fleet: Fleet) -> None:
    """By those who tell; and that the others of them have nothing is known too."""
    fleet.store(1, PROMPT[:80])
    assert fleet.expect() == {"a": (80, "exact"), "b": (0, "exact"), "n": (0, "none")}


async def test_what_was_routed_does_not_count_against_it(fleet: Fleet) -> None:
    """An engine that has forgotten what it answered is not expected to have it."""
    await fleet.answer(A)
    await fleet.answer(PLAIN)
    assert fleet.expect() == {"a": (0, "exact"), "b": (0, "exact"), "n": (202, "approximate")}


async def test_without_tokens_it_is_what_was_routed(fleet: Fleet) -> None:
    """A prompt that could not be tokenised is compared by bytes."""
    await fleet.answer(A)
    found = fleet.expect(ctx=context(FLEET, [user(" ".join(map(str, PROMPT)))], now_s=fleet.clock.now_s()))
    assert found == {"a": (202, "approximate"), "b": (0, "none"), "n": (0, "none")}


async def test_an_engine_that_no_longer_tells(fleet: Fleet) -> None:
    """For a moment what it told is used, then what was routed; and what it tells again."""
    fleet.store(1, PROMPT[:80])
    await fleet.answer(A)
    fleet.state().disconnected()
    assert fleet.expect()["a"] == (202, "degraded")
    fleet.clock.advance(20)
    assert fleet.expect()["a"] == (202, "approximate")
    fleet.state().connected()
    pump(Publisher(fleet.clock), fleet.state())  # type: ignore[arg-type]
    assert fleet.expect()["a"] == (80, "exact")


async def test_the_trace_says_why_it_is_not_exact(fleet: Fleet) -> None:
    """Of each that tells and is not known exactly, whether anything of the prompt is expected there or not."""
    assert fleet.reasons() == ()
    fleet.state().lose("something was lost")
    assert fleet.reasons() == ("degraded: something was lost", "", "")
    fleet.store(1, PROMPT[:80])
    fleet.state(1).disconnected()
    assert fleet.reasons() == ("degraded: something was lost", "degraded: the connection is lost", "")
    fleet.clock.advance(20)
    assert fleet.reasons(None) == ("degraded: something was lost", "approximate: the connection is lost", "")
    only_n = attrs.evolve(fleet.request(), candidates=(PLAIN,))
    assert fleet.stage.affinity(only_n).reasons == ()
    fleet.state().take_in(0, [AllCleared()], 0.0)
    fleet.state(1).connected()
    pump(Publisher(fleet.clock), fleet.state(1))  # type: ignore[arg-type]
    assert fleet.reasons() == ()


async def test_reasons_are_made_when_they_change(fleet: Fleet) -> None:
    """A request with the same candidates as the one before gets the same object, so that none pays for them."""
    fleet.state().lose("something was lost")
    found = [fleet.stage.affinity(fleet.request()).reasons for _ in range(2)]
    assert found[0] is found[1]


async def test_a_part_is_the_least_that_is_there(fleet: Fleet) -> None:
    """What was routed may be there as well."""
    fleet.state().lose("something")
    fleet.store(1, PROMPT[:80])
    assert fleet.expect()["a"] == (80, "degraded")
    await fleet.answer(A)
    assert fleet.expect()["a"] == (202, "degraded")


async def test_answers_correct_what_a_part_claims(fleet: Fleet) -> None:
    """Where events do not say what some layers lack, as much is expected as answers had of it; anew after a restart."""
    fleet.store(1, PROMPT[:160])
    fleet.store(500, PROMPT[:160], group=1, kind="chunked_local_attention")
    assert fleet.expect()["a"] == (160, "degraded")
    assert "it does not say how many (chunked local attention)" in fleet.reasons()[0]
    for _ in range(40):
        ctx = fleet.request(PROMPT[:161])
        fleet.expect(ctx=ctx)
        fleet.stage.placed(ctx, A)
        await fleet.stage.observe(outcome(ctx, A, usage=Usage(161, 1, cached_tokens=40)))
    assert fleet.expect([*PROMPT[:160], *range(40)])["a"] == (pytest.approx(40, abs=4), "degraded")
    fleet.state().counts.restarts += 1
    await fleet.answer(B)
    assert fleet.expect([*PROMPT[:160], *range(40)])["a"] == (160, "degraded")


async def test_siblings_follow_a_prompt_under_way(fleet: Fleet) -> None:
    """It counts as soon as it is sent, and until it is answered; then the engine has said itself."""
    first = fleet.request()
    assert fleet.expect(ctx=first)["a"] == (0, "exact")
    fleet.stage.placed(first, A)
    assert fleet.expect()["a"] == (199, "approximate")
    assert fleet.expect(PROMPT[:100])["a"] == (99, "approximate")
    fleet.store(1, PROMPT)
    assert fleet.expect([*PROMPT, 7])["a"] == (200, "exact")
    await fleet.stage.observe(outcome(first, A))
    fleet.state().take_in(0, [removed(*range(20, 60))], 0.0)
    assert fleet.expect()["a"] == (76, "exact")


async def test_a_prompt_that_came_to_nothing(fleet: Fleet) -> None:
    """Is under way no longer."""
    await fleet.answer(None)
    assert fleet.expect()["a"] == (0, "exact")


async def test_a_prompt_under_way_for_too_long() -> None:
    """Is not believed in."""
    fleet = Fleet(lease_s=5)
    fleet.stage.placed(fleet.request(), A)
    fleet.clock.advance(10)
    assert fleet.expect()["a"] == (0, "exact")


async def test_tokens_elsewhere_are_worth_less() -> None:
    """They must be loaded."""
    fleet = Fleet(other_tier_worth=0.5)
    fleet.store(1, PROMPT[:40])
    fleet.store(11, PROMPT[40:80], parent=10, tier="cpu")
    assert fleet.expect()["a"] == (60, "exact")


async def test_the_error_of_exact_expectations_is_measured(fleet: Fleet) -> None:
    """In the engine's own tokens; and what is exact is not discounted by it."""
    fleet.store(1, PROMPT[:80])
    await fleet.answer(A, cached=40)
    value = fleet.services.metrics.registry.get_sample_value
    labels = {"model": "m", "endpoint": "http://a"}
    assert value("kvfleet_cache_prediction_error_tokens", labels) == 20.0
    assert fleet.expect()["a"] == (80, "exact")


async def test_an_engine_whose_answers_belie_its_events(fleet: Fleet) -> None:
    """Is believed no longer."""
    fleet.store(1, PROMPT[:80])
    for _ in range(16):
        await fleet.answer(A, cached=0)
    assert fleet.state().judge()[0] is KVMode.APPROXIMATE


async def test_answers_that_another_replica_went_on_with(fleet: Fleet) -> None:
    """Belie nothing: it was asked later, and for more."""
    fleet.store(1, PROMPT[:80])
    for _ in range(16):
        await fleet.answer(A, cached=0, continued=1)
    assert fleet.expect()["a"] == (80, "exact")


async def test_a_restart_ends_what_was_routed_too(fleet: Fleet) -> None:
    """An engine that began anew has forgotten everything, however it is known."""
    await fleet.answer(A)
    fleet.state().counts.restarts += 1
    fleet.state().disconnected()
    await fleet.answer(B)
    fleet.clock.advance(20)
    assert fleet.expect()["a"] == (0, "none")


async def test_the_home_of_an_unknown_prompt(fleet: Fleet) -> None:
    """Is where it would begin, though nothing is there, which is known."""
    assert sorted(fleet.expect().values()) == [(0, "exact"), (0, "none"), (1, "none")]
