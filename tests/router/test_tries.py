"""After a failure: another replica at once; the same one only when nobody else is left, after a wait, and if it helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, DeadlineExceededError, Fault, RouteError
from kvfleet.router.attempts import FallbackRules
from kvfleet.router.retry_budget import RetryBudget
from kvfleet.router.tries import Tries

A, B, C, D = (ModelConfig(name="m", endpoint=f"http://{host}") for host in "abcd")
END = BackendError(Fault.SERVER_ERROR, "it failed")


@attrs.define
class Scene:
    """Backends that fail as told, one fault after the other, and a clock that sleeping moves."""

    faults: Mapping[str, Sequence[Fault | BackendError]] = attrs.field(factory=dict)
    clock: FrozenClock = attrs.field(factory=FrozenClock)
    tried: list[str] = attrs.field(factory=list)
    waits: list[float] = attrs.field(factory=list)
    takes_s: float = 0.0

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.clock.advance(seconds)

    async def attempt(self, candidate: ModelConfig, timeout_s: float | None, reason: str) -> str:
        where = candidate.endpoint.removeprefix("http://")
        made = self.tried.count(where)
        self.tried.append(where)
        self.clock.advance(self.takes_s)
        faults = self.faults.get(where, ())
        if made >= len(faults):
            return where
        fault = faults[made]
        raise fault if isinstance(fault, BackendError) else BackendError(fault, f"it said {fault}")

    def tries(self, *ranked: ModelConfig, chance: float = 1.0, **more: Any) -> Tries:
        rules = more.pop("rules", FallbackRules())
        return Tries(rules=rules, ranked=ranked, clock=self.clock, sleep=self.sleep, chance=lambda: chance, **more)

    async def run(self, *ranked: ModelConfig, **more: Any) -> str:
        return await self.tries(*ranked, **more).first_answer(self.attempt, is_stream=True)


@attrs.define
class Counted(RetryBudget):
    """Grants everything, and counts it."""

    taken: int = 0

    def take(self, model: str) -> str:
        del model
        self.taken += 1
        return ""


def limited(seconds: float) -> BackendError:
    """A refusal that asks to wait."""
    return BackendError(Fault.RATE_LIMITED, "slow down", status=429, retry_after_s=seconds)


async def test_another_replica_is_asked_at_once() -> None:
    """No wait, and not the same one again."""
    scene = Scene({"a": [Fault.SERVER_ERROR]})
    assert await scene.run(A, B) == "b"
    assert (scene.tried, scene.waits) == (["a", "b"], [])


async def test_the_same_replica_is_asked_again_when_nobody_else_is_left() -> None:
    """After a tenth of a second, or half of that."""
    scene = Scene({"a": [Fault.DISCONNECTED]})
    assert await scene.run(A) == "a"
    assert scene.waits == [pytest.approx(0.1)]
    scene = Scene({"a": [Fault.DISCONNECTED]})
    await scene.run(A, chance=0.0)
    assert scene.waits == [pytest.approx(0.05)]


async def test_waits_double() -> None:
    """Each further time the same replica is asked."""
    often = attrs.evolve(A, max_retries=3)
    scene = Scene({"a": [Fault.CONNECT] * 3})
    await scene.run(often, rules=FallbackRules(max_attempts=9))
    assert scene.waits == pytest.approx([0.1, 0.2, 0.4])


async def test_the_one_that_may_be_asked_first_is() -> None:
    """Both have failed; the one that asked for less time comes first."""
    scene = Scene({"a": [limited(4)], "b": [limited(1)]})
    assert await scene.run(A, B, chance=0.0) == "b"
    assert (scene.tried, scene.waits) == (["a", "b", "b"], [1.0])


async def test_retry_after_is_honoured() -> None:
    """Never less than was asked for, and at most a second more."""
    for chance, wait_s in ((0.0, 4.0), (1.0, 5.0)):
        scene = Scene({"a": [limited(4)]})
        await scene.run(A, chance=chance, rules=FallbackRules(longest_wait_ms=6000))
        assert scene.waits == [pytest.approx(wait_s)]


async def test_a_wait_that_is_too_long_is_the_clients() -> None:
    """It gets the refusal, with the time."""
    scene = Scene({"a": [limited(30)]})
    tries = scene.tries(A)
    with pytest.raises(RouteError) as raised:
        await tries.first_answer(scene.attempt, is_stream=True)
    assert (tries.stopped, raised.value.retry_after_s, raised.value.status) == ("retry_after", 30, 429)
    assert raised.value.details["stopped"] == "retry_after"


async def test_who_was_not_called_uses_up_no_attempt() -> None:
    """A breaker that lets only its probe through costs neither an attempt nor a retry, wherever it stands in the row."""
    scene, budget = Scene({"a": [Fault.CIRCUIT_OPEN], "b": [Fault.SERVER_ERROR], "c": [Fault.CIRCUIT_OPEN]}), Counted()
    assert await scene.run(A, B, C, D, rules=FallbackRules(max_attempts=2), budget=budget) == "d"
    assert (scene.tried, budget.taken) == (["a", "b", "c", "d"], 1)


async def test_the_error_tells_of_those_who_were_called() -> None:
    """What is said last is the last call's fault, and not that somebody was not called after it."""
    scene = Scene({"a": [Fault.OVERLOADED] * 2, "b": [Fault.CIRCUIT_OPEN]})
    with pytest.raises(RouteError, match=r"m did not answer after 2 attempts: it said overloaded") as raised:
        await scene.run(A, B)
    assert (raised.value.status, raised.value.code) == (503, "backend_overloaded")
    assert [one["fault"] for one in raised.value.details["attempts"]] == ["overloaded", "circuit_open", "overloaded"]


@pytest.mark.parametrize("fault", [Fault.TIMEOUT, Fault.CONNECT_TIMEOUT, Fault.IDLE_TIMEOUT])
async def test_who_kept_silent_is_not_asked_again(fault: Fault) -> None:
    """Its silence has cost enough."""
    scene = Scene({"a": [fault]})
    with pytest.raises(RouteError):
        await scene.run(A)
    assert scene.tried == ["a"]


@pytest.mark.parametrize("fault", [Fault.BAD_REQUEST, Fault.CONTENT_POLICY, Fault.CONTEXT_LENGTH, Fault.DEADLINE])
async def test_what_nobody_can_help_is_final(fault: Fault) -> None:
    """Neither another replica nor the same one; even if an earlier one might answer now."""
    scene = Scene({"a": [Fault.CONNECT], "b": [fault]})
    tries = scene.tries(A, B)
    with pytest.raises(RouteError):
        await tries.first_answer(scene.attempt, is_stream=True)
    assert (scene.tried, tries.stopped) == (["a", "b"], "final")


async def test_nothing_begins_after_the_deadline() -> None:
    """Neither an attempt elsewhere, nor a wait that would end too late; the error is the deadline's."""
    scene = Scene({"a": [Fault.SERVER_ERROR]}, takes_s=2.0)
    tries = scene.tries(A, B, by_s=scene.clock.now_s() + 1.5)
    with pytest.raises(DeadlineExceededError):
        await tries.first_answer(scene.attempt, is_stream=True)
    assert (scene.tried, tries.stopped) == (["a"], "deadline")
    scene = Scene({"a": [limited(2)]})
    tries = scene.tries(A, by_s=scene.clock.now_s() + 1.5)
    with pytest.raises(DeadlineExceededError):
        await tries.first_answer(scene.attempt, is_stream=True)
    assert (scene.waits, tries.stopped) == ([], "deadline")


async def test_retries_are_paid_for() -> None:
    """With an empty budget the first failure is the last; the model's, or the fleet's."""
    scene = Scene({"a": [Fault.SERVER_ERROR]})
    tries = scene.tries(A, B, budget=RetryBudget(0.0, 0.0, scene.clock))
    with pytest.raises(RouteError) as raised:
        await tries.first_answer(scene.attempt, is_stream=True)
    assert (scene.tried, tries.stopped) == (["a"], "model_budget")
    assert raised.value.details["stopped"] == "model_budget"


async def test_a_failing_fleet_gets_little_more_than_its_requests() -> None:
    """While everything fails, attempts are 1.2 times the requests, and three a second (figure 4 of the list)."""
    scene = Scene({"a": [END] * 100_000, "b": [END] * 100_000})
    budget = RetryBudget(0.2, 3.0, scene.clock)
    for _ in range(3000):  # for a minute, 50 a second
        with pytest.raises(RouteError):
            await scene.run(A, B, budget=budget, rules=FallbackRules(backoff_ms=1))
        scene.clock.advance(0.02)
    seconds = scene.clock.now_s() - 1000.0
    assert len(scene.tried) <= 3000 * 1.2 + 3 * (seconds + 10) * 1.05
    assert len(scene.tried) > 3000 * 1.2


async def test_a_model_may_forbid_it() -> None:
    """`max_retries: 0` asks each replica once."""
    scene = Scene({"a": [Fault.CONNECT]})
    with pytest.raises(RouteError):
        await scene.run(attrs.evolve(A, max_retries=0))
    assert scene.tried == ["a"]
