"""Affinity learned from where requests were answered."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Usage
from kvfleet.builtin.affinity import PrefixAffinity
from kvfleet.builtin.facts import PROMPT
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import RouteError
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import CacheMode
from tests.builtin.making import context, model, outcome, user

A, B, OTHER = model("m", "http://a"), model("m", "http://b"), model("n", "http://c")
FLEET = (A, B, OTHER)
SYSTEM = {"role": "system", "content": "You are a helpful assistant, and you answer in verse. " * 10}
HELLO = user("Hello, who are you?")
ANSWER = {"role": "assistant", "content": "A poet in a box of sand, " * 20}
MORE = user("Tell me more.")


class Fleet:
    """An affinity stage, and requests that go through it."""

    def __init__(self, **options: Any) -> None:
        self.services = Services(models=FLEET)
        self.stage = PrefixAffinity(**options)
        self.stage.provision(self.services)

    def expect(self, *messages: Any, **ctx: Any) -> dict[str, tuple[float, str]]:
        """By replica: tokens expected and how that is known, where it is known at all."""
        request = context(FLEET, messages, **ctx)
        found = self.stage.affinity(request)
        assert len(found.tokens) == len(found.modes) == len(FLEET)
        return {
            m.endpoint[-1]: (round(tokens), mode.value)
            for m, tokens, mode in zip(FLEET, found.tokens, found.modes, strict=True)
            if mode is not CacheMode.NONE
        }

    async def answer(self, served: ModelConfig | None, *messages: Any, **more: Any) -> None:
        """A request that was answered by some replica."""
        told = {key: more.pop(key) for key in ("usage", "error") if key in more}
        ctx = context(FLEET, messages, **more)
        found = self.stage.affinity(ctx)
        known: dict[str, float] = ctx.affinity  # type: ignore[assignment]
        known.update(zip([m.id for m in FLEET], found.tokens, strict=True))
        if served is not None and not ctx.dry_run:
            self.stage.placed(ctx, served)
        await self.stage.observe(outcome(ctx, served, **told))

    def hits(self, kind: str) -> float:
        """Cache hits counted so far."""
        name = "kvfleet_cache_affinity_hits_total"
        return self.services.metrics.registry.get_sample_value(name, {"type": kind}) or 0.0


@pytest.mark.parametrize("served", FLEET)
async def test_the_second_turn_is_expected_where_the_first_was_answered(served: ModelConfig) -> None:
    """With the answer, which that replica wrote; almost the whole prompt."""
    fleet = Fleet()
    await fleet.answer(served, SYSTEM, HELLO)
    found = fleet.expect(SYSTEM, HELLO, ANSWER, MORE)
    assert found == {served.endpoint[-1]: (271, "approximate")}


async def test_a_system_prompt_is_shared() -> None:
    """Another question under the same system prompt is expected where it was seen, by that part."""
    fleet = Fleet()
    await fleet.answer(A, SYSTEM, HELLO)
    assert fleet.expect(SYSTEM, user("Something else entirely?")) == {"a": (137, "approximate")}


async def test_how_often_a_system_prompt_returns_is_known_to_its_end() -> None:
    """Not only as far as the power of two below its length; by those who hold it and one more, each has its share."""
    fleet = Fleet()
    long = {"role": "system", "content": "You are a helpful assistant, and you answer in verse. " * 60}
    for i in range(9):
        await fleet.answer(A, long, user(f"{i} is my question. " * 30))
    found = fleet.stage.affinity(context(FLEET, [long, user("Mine is another. " * 30)]))
    held, returns = max(found.tokens), found.returns
    assert held == pytest.approx(800, rel=0.05)
    assert held - 64 < max(returns) <= held  # in whole blocks
    assert returns[max(returns)] == pytest.approx(8 / 2, rel=0.01)
    assert returns[min(returns)] == pytest.approx(9 / 2, rel=0.01)


async def test_another_system_prompt_is_nobodys() -> None:
    """The same question under other instructions has nothing in common with it."""
    fleet = Fleet()
    await fleet.answer(A, SYSTEM, HELLO)
    assert fleet.expect({"role": "system", "content": "Be brief."}, HELLO) == {}


async def test_a_small_part_counts_as_none() -> None:
    """Below the share that is asked for, it is not worth waiting for."""
    fleet = Fleet(min_affinity=0.3)
    await fleet.answer(A, SYSTEM, HELLO)
    assert fleet.expect(SYSTEM, user("x" * 4000)) == {}
    eager = Fleet()
    await eager.answer(A, SYSTEM, HELLO)
    assert eager.expect(SYSTEM, user("x" * 4000)) == {"a": (137, "approximate")}


async def test_a_named_conversation_stays_where_it_is_if_nothing_speaks_against_it() -> None:
    """Nothing of a changed text is in the cache, and nothing is said to be; its replica breaks ties, and no more."""
    fleet = Fleet()
    await fleet.answer(B, HELLO, session="s", tenant="t", usage=Usage(5, 40))

    def found(**ctx: Any) -> list[float]:
        return list(fleet.stage.affinity(context(FLEET, [user("Shorter now.")], **ctx)).tokens)

    assert found(session="s", tenant="t") == [0, 1, 0]
    assert found(session="s", tenant="u") == found() == [0, 0, 0]


async def test_what_was_learned_ages() -> None:
    """After its time, beginnings and sessions are forgotten."""
    fleet = Fleet(session_ttl_s=100.0)
    await fleet.answer(A, SYSTEM, HELLO, session="s", now_s=1000.0)
    assert fleet.expect(SYSTEM, HELLO, session="s", now_s=1100.0)
    assert fleet.expect(SYSTEM, HELLO, session="s", now_s=1200.0) == {}


async def test_an_engine_that_reports_no_cached_tokens_is_believed_less() -> None:
    """Expectation and report are compared; the mode says that reports were seen."""
    fleet = Fleet()
    for _ in range(8):
        await fleet.answer(A, SYSTEM, HELLO, usage=Usage(150, 10, 160, cached_tokens=0))
    tokens, mode = fleet.expect(SYSTEM, HELLO)["a"]
    assert mode == "observed"
    assert tokens < 30
    for _ in range(20):
        await fleet.answer(A, SYSTEM, HELLO, usage=Usage(150, 10, 160, cached_tokens=144))
    assert fleet.expect(SYSTEM, HELLO)["a"][0] > 120


async def test_an_engine_that_says_nothing_of_its_cache_is_believed() -> None:
    """No report is not a report of nothing."""
    fleet = Fleet()
    for _ in range(8):
        await fleet.answer(A, SYSTEM, HELLO, usage=Usage(150, 10))
    assert fleet.expect(SYSTEM, HELLO) == {"a": (144, "approximate")}


async def test_an_unknown_long_beginning_has_a_home() -> None:
    """One replica of each model with several, the same in every gateway: enough to break ties, and no cache hit."""
    one, two = Fleet(), Fleet()
    homes = set()
    for i in range(30):
        ctx = context(FLEET, [user(f"document {i} " * 60)])
        found = one.stage.affinity(ctx)
        assert found == two.stage.affinity(ctx)
        assert sorted(found.tokens) == [0.0, 0.0, 1.0]
        assert set(found.modes) == {CacheMode.NONE}
        homes.add(FLEET[list(found.tokens).index(1.0)].endpoint)
    assert homes == {"http://a", "http://b"}


@pytest.mark.parametrize("share", [0.4, 1.2, 3.0])
async def test_prompts_that_begin_alike_have_one_home_however_many_tokens_each_has(share: float) -> None:
    """Engines count other tokens for one text than for another: that is nothing to the beginning of both."""
    stage = Fleet().stage
    for i in range(10):
        ctx, counted = (context(FLEET, [user(f"document {i} " * 60)]) for _ in range(2))
        prompt = counted.fact(PROMPT)
        prompt.counted(int(share * prompt.token_estimate))
        assert stage.affinity(counted).tokens == stage.affinity(ctx).tokens


async def test_the_home_moves_on_if_it_is_no_candidate() -> None:
    """A replica that was filtered out is nobody's home."""
    stage = Fleet().stage
    for i in range(10):
        found = stage.affinity(context((B, OTHER), [user(f"document {i} " * 60)]))
        assert list(found.tokens) == [1.0, 0.0]


async def test_a_short_unknown_prompt_has_no_home() -> None:
    """Nothing would be gained."""
    assert list(Fleet().stage.affinity(context(FLEET, [user("Hi")])).tokens) == [0.0, 0.0, 0.0]


async def test_hits_are_counted_by_kind() -> None:
    """A request that went where its prompt was expected counts, as a session or as a prefix."""
    fleet = Fleet()
    await fleet.answer(A, SYSTEM, HELLO, session="s")
    assert (fleet.hits("session"), fleet.hits("prefix")) == (0, 0)
    await fleet.answer(A, SYSTEM, HELLO, ANSWER, MORE, session="s")
    await fleet.answer(A, SYSTEM, MORE)
    await fleet.answer(B, SYSTEM, user("And I go elsewhere."))
    assert (fleet.hits("session"), fleet.hits("prefix")) == (1, 1)


@pytest.mark.parametrize(
    "what",
    [
        {"dry_run": True},
        {"served": None},
        {"error": RouteError("the answer broke off", code="stream_interrupted")},
    ],
)
async def test_nothing_is_learned_from_what_did_not_happen(what: dict[str, Any]) -> None:
    """A dry run, a route without an answer, a replica that died amid it."""
    fleet = Fleet()
    await fleet.answer(what.pop("served", A), SYSTEM, HELLO, **what)
    assert fleet.expect(SYSTEM, HELLO) == {}


async def test_a_client_that_left_leaves_a_warm_cache() -> None:
    """The prompt was computed all the same."""
    fleet = Fleet()
    await fleet.answer(A, SYSTEM, HELLO, error=RouteError("the client left", code="client_left"))
    assert fleet.expect(SYSTEM, HELLO)["a"] == (144, "approximate")


async def test_what_is_remembered_is_bounded() -> None:
    """However many conversations come."""
    fleet = Fleet(max_entries=300)
    for i in range(500):
        await fleet.answer(A, user(f"conversation {i}"), session=f"s{i}", now_s=1000.0 + i * 10)
    assert fleet.stage.state() == {"entries": 100, "max_entries": 300, "sessions": 361, "trust": {}}


async def test_expecting_changes_nothing() -> None:
    """The stage is pure: asking twice gives the same, and leaves no trace."""
    fleet = Fleet()
    await fleet.answer(A, SYSTEM, HELLO)
    before = fleet.stage.state()
    assert fleet.expect(SYSTEM, HELLO) == fleet.expect(SYSTEM, HELLO)
    assert fleet.stage.state() == before


async def test_where_a_request_goes_counts_at_once() -> None:
    """A burst of siblings finds the first one's replica before it has answered; nothing came of it is nothing known."""
    fleet = Fleet()
    ctx = context(FLEET, [SYSTEM, HELLO])
    fleet.stage.placed(ctx, B)
    assert fleet.expect(SYSTEM, user("A sibling.")) == {"b": (137, "approximate")}
    assert fleet.expect(SYSTEM, user("A sibling."), now_s=1100.0) == {}
    fleet.stage.placed(ctx, A)
    await fleet.stage.observe(outcome(ctx, None, error=RouteError("nobody answered")))
    assert fleet.expect(SYSTEM, user("A sibling.")) == {}


async def test_an_attempt_that_failed_is_taken_back_and_the_one_that_answered_stays() -> None:
    """And what was there before the failed attempt is still there."""
    fleet = Fleet()
    await fleet.answer(A, SYSTEM, user("Before."))
    ctx = context(FLEET, [SYSTEM, HELLO, user("and more " * 100)])
    fleet.stage.placed(ctx, A)
    fleet.stage.placed(ctx, B)
    await fleet.stage.observe(outcome(ctx, B))
    assert fleet.expect(SYSTEM, HELLO, user("and more " * 100)) == {
        "a": (137, "approximate"),
        "b": (370, "approximate"),
    }


async def test_tenants_can_be_kept_apart() -> None:
    """Where engines salt their caches, or the request does."""
    fleet = Fleet(isolate_tenants=True)
    await fleet.answer(A, SYSTEM, HELLO, tenant="t")
    assert fleet.expect(SYSTEM, HELLO, tenant="u") == {}
    assert fleet.expect(SYSTEM, HELLO, tenant="t")


async def test_a_replica_forgets_as_its_engine_does() -> None:
    """The engine tells the size of its cache; what was used longest ago is gone first."""
    fleet = Fleet()
    size = EngineLoad(cache_blocks=64, block_tokens=16)
    fleet.services.load.register(FLEET)
    fleet.services.load.report("http://a", size, 1000.0)
    for i in range(12):
        await fleet.answer(A, user(f"{i} is the number of this document. " * 20))
    known = [bool(fleet.expect(user(f"{i} is the number of this document. " * 20))) for i in range(12)]
    assert known == [False] * 6 + [True] * 6


async def test_too_many_broken_expectations_raise_the_alarm() -> None:
    """In the metric and the state, until they come true again."""
    fleet = Fleet()

    def metric(name: str) -> float | None:
        return fleet.services.metrics.registry.get_sample_value(name, {"model": "m", "endpoint": "http://a"})

    for _ in range(20):
        await fleet.answer(A, SYSTEM, HELLO, usage=Usage(150, 10, 160, cached_tokens=0))
    assert metric("kvfleet_cache_trust_alarm") == 1
    assert (metric("kvfleet_cache_trust") or 1) < 0.2
    assert (metric("kvfleet_cache_prediction_error_tokens") or 0) > 100
    assert fleet.stage.state()["trust"]["m@http://a"] < 0.2
    for _ in range(20):
        await fleet.answer(A, SYSTEM, HELLO, usage=Usage(150, 10, 160, cached_tokens=144))
    assert metric("kvfleet_cache_trust_alarm") == 0
