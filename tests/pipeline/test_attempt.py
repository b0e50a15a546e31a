"""Routes on which several answers are made: one is given, and all of them are paid for."""

from __future__ import annotations

import importlib.metadata
import types
from collections.abc import AsyncIterator, Iterable
from typing import Any

import attrs
import pytest

from kvfleet.adapters.call import Reply, Usage
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import BudgetConfig, FleetConfig, ModelConfig, StageConfig
from kvfleet.errors import DeadlineExceededError
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Answer, Attempt, Kind, Outcome, RouteRequest, RoutingContext
from kvfleet.plugin.manager import discover
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.scoring import Ranking
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation

PRICES = {"cost_per_1k_input_tokens": 1.0, "cost_per_1k_output_tokens": 1.0}
A, B = (ModelConfig(name=name, endpoint=f"http://{name}", **PRICES) for name in ("a", "b"))  # type: ignore[arg-type]


@attrs.define
class Second:
    """Asks everybody, and gives the last one's answer; or, with `first`, the first one's."""

    async def execute(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt) -> Answer:
        answers = [await attempt(model, reason="first" if i == 0 else "also") for i, model in enumerate(ranking.models)]
        given = answers[0] if ctx.request.tags.get("give") == "first" else answers[-1]
        for answer in answers:
            if answer is not given:
                await answer.reply.close()
        return attrs.evolve(given, details={"kvfleet.told": "by the executor"})


@attrs.define
class Own:
    """Gives an answer that no backend made."""

    async def execute(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt) -> Answer:
        return Answer(Reply(body=b"{}"))


@attrs.define
class ThenNothing:
    """Has an answer, and fails."""

    async def execute(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt) -> Answer:
        await attempt(ranking.models[0])
        raise DeadlineExceededError("too late")


class Plugin:
    """Brings the executors."""

    @hookimpl
    def kvfleet_components(self) -> Iterable[Component]:
        return [Component(Kind.EXECUTE, cls.__name__.lower(), cls) for cls in (Second, Own, ThenNothing)]


POINT: Any = types.SimpleNamespace(name="made", value="made", dist=None, load=Plugin)
TABLE = discover(entry_points=(*importlib.metadata.entry_points(group="kvfleet"), POINT))


class Running:
    """A router over an executor, and what it was told at the end."""

    def __init__(self, use: str, *, models: tuple[ModelConfig, ModelConfig] = (A, B)) -> None:
        self.adapters = {
            m.id: FakeAdapter(endpoint=m.endpoint, model_id=m.name, script=FakeReply(text=f"I am {m.name}.", usage=u))
            for m, u in zip(models, (Usage(100, 10), Usage(200, 20)), strict=True)
        }
        pipeline = tuple(StageConfig(use=one) for one in ("classify.prompt", "admit.budget", "select.static", use))
        budget = BudgetConfig(enabled=True, per_request_max_usd=None, unknown_price="allow")
        config = FleetConfig(models=models, pipeline=pipeline, budget=budget)
        self.router = Router(config, table=TABLE, adapters=self.adapters, polls=False, clock=FrozenClock())
        self.outcomes: list[Outcome] = []
        self.router._observing.finished = self.outcomes.append

    async def ask(self, *, stream: bool = False, give: str = "") -> Answer:
        """One request, its answer's beginning."""
        body = {"messages": [{"role": "user", "content": "x" * 400}], "stream": stream}
        request = RouteRequest(body=body, stream=stream, tags={"give": give})
        return (await self.router.dispatch(request)).answer

    async def end(self) -> tuple[Outcome, Explanation, dict[str, Any]]:
        """What the route came to, and the fleet's account."""
        await self.router.settled()
        outcome = self.outcomes[-1]
        (account,) = self.router.state()["stages"]["admit.budget"]["accounts"]
        return outcome, Explanation(outcome.trace), account


@pytest.fixture
async def second() -> AsyncIterator[Running]:
    """Everybody is asked."""
    running = Running("execute.second")
    async with running.router:
        yield running


@pytest.mark.parametrize(("give", "served", "tokens"), [("first", "a", 110), ("last", "b", 220)])
async def test_every_answer_is_paid_for_and_one_is_given(second: Running, give: str, served: str, tokens: int) -> None:
    """Cost, tokens and attempts: the route's cost is everybody's, its tokens are those of the answer given."""
    answer = await second.ask(give=give)
    assert f"I am {served}.".encode() in answer.reply.body
    outcome, explanation, account = await second.end()
    assert (explanation.served_by, explanation.outcome) == (served, "answered")
    assert explanation.usage is not None
    assert explanation.usage.total_tokens == tokens
    assert explanation.cost_usd == pytest.approx(0.33)
    assert outcome.cost_usd == pytest.approx(0.33)
    assert [(one.model.name, one.usage) for one in outcome.unused] == [
        ("b", Usage(200, 20)) if served == "a" else ("a", Usage(100, 10))
    ]
    assert (account["spent_usd"], account["reserved_usd"]) == (pytest.approx(0.33), 0.0)
    assert (account["requests"], account["prompt_tokens"], account["completion_tokens"]) == (1, 300, 30)
    assert outcome.trace.route.attributes["kvfleet.told"] == "by the executor"


@pytest.mark.parametrize(("give", "served", "left"), [("first", "a", "b"), ("last", "b", "a")])
async def test_a_stream_that_is_not_given_ends_at_once(second: Running, give: str, served: str, left: str) -> None:
    """Its engine stops, nobody is blamed, and what it wrote so far is paid for as well as can be told."""
    answer = await second.ask(stream=True, give=give)
    assert answer.reply.events is not None
    content = b"".join([piece async for piece in answer.reply.events])
    assert b'" a"' in content or served.encode() in content
    outcome, explanation, account = await second.end()
    by_name = {one.model: one for one in explanation.attempts}
    assert (by_name["a"].fault, by_name["b"].fault) == ("", "")
    spans = [span for span in outcome.trace.stages if span.attributes.get(names.ATTEMPT_DISCARDED)]
    assert [span.attributes[names.MODEL] for span in spans] == [left]
    assert {m.partition("@")[0]: one.cancelled for m, one in second.adapters.items()} == {left: 1, served: 0}
    (unused,) = outcome.unused
    assert unused.usage is not None
    assert unused.usage.prompt_tokens == pytest.approx(100, abs=10)
    assert 0 < unused.usage.completion_tokens < 5
    assert account["spent_usd"] == pytest.approx(outcome.cost_usd)
    assert outcome.cost_usd == pytest.approx((110 if served == "a" else 220) / 1000 + unused.cost_usd)  # type: ignore[operator]
    assert second.router.services.health.summary()["unhealthy"] == 0
    assert all(second.router.services.load.in_flight(model.id) == 0 for model in (A, B))


async def test_a_client_that_leaves_is_no_discarded_answer(second: Running) -> None:
    """The answer that was given is the one that was left."""
    answer = await second.ask(stream=True)
    await answer.reply.close()
    _, explanation, _ = await second.end()
    assert explanation.outcome == "cancelled"
    assert [(one.model, one.fault) for one in explanation.attempts] == [("a", ""), ("b", "cancelled")]


async def test_one_unknown_cost_makes_the_whole_unknown() -> None:
    """Unknown is not nothing; the budget books what is known, and counts what is not."""
    running = Running("execute.second", models=(A, ModelConfig(name="b", endpoint="http://b")))
    async with running.router:
        await running.ask()
        outcome, explanation, account = await running.end()
    assert outcome.cost_usd is explanation.cost_usd is None
    assert (account["spent_usd"], account["unpriced"]) == (pytest.approx(0.11), 1)


async def test_what_was_answered_before_a_failure_is_paid_for() -> None:
    """A route that fails after an answer still cost it."""
    running = Running("execute.thennothing")
    async with running.router:
        with pytest.raises(DeadlineExceededError):
            await running.ask()
        outcome, explanation, account = await running.end()
    assert (explanation.outcome, explanation.served_by) == ("failed", "")
    assert outcome.cost_usd == account["spent_usd"] == pytest.approx(0.11)


async def test_an_executors_own_answer_closes_the_books() -> None:
    """Nobody was asked, and nothing is held for ever."""
    running = Running("execute.own")
    async with running.router:
        answer = await running.ask()
        assert answer.reply.body == b"{}"
        outcome, _, account = await running.end()
    assert (outcome.served_by, outcome.cost_usd) == (None, None)
    assert (account["spent_usd"], account["reserved_usd"]) == (0.0, 0.0)
