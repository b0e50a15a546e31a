"""Fallback tries the ranking in order, and knows when another try is in vain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import pytest

from kvfleet.adapters.call import Reply
from kvfleet.builtin.execute import Fallback
from kvfleet.config.schema import ModelCapabilities, ModelConfig
from kvfleet.errors import AttemptsExhaustedError, BackendError, Fault
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Answer, RouteRequest, RoutingContext
from kvfleet.router.scoring import Ranking
from kvfleet.telemetry.fleet_limits import FleetLimits


def model(name: str, endpoint: str = "", **more: Any) -> ModelConfig:
    """A candidate."""
    return ModelConfig(name=name, endpoint=endpoint or f"http://{name}", **more)


A, B, C = model("a"), model("b"), model("c")
A2 = model("a", "http://a2")


@attrs.define
class Attempts:
    """Fails as told, by replica id; records who was tried and why."""

    faults: Mapping[str, Fault | BackendError] = attrs.field(factory=dict)
    tried: list[tuple[str, str, float | None]] = attrs.field(factory=list)

    async def __call__(
        self, candidate: ModelConfig, *, timeout_s: float | None = None, reason: str = "first"
    ) -> Answer:
        self.tried.append((candidate.id, reason, timeout_s))
        fault = self.faults.get(candidate.id)
        if fault is None:
            return Answer(Reply(body=b"{}"), candidate)
        raise fault if isinstance(fault, BackendError) else BackendError(fault, f"it said {fault}")

    @property
    def names(self) -> list[str]:
        """Endpoints tried, in order."""
        return [tried[0].partition("@")[2].removeprefix("http://") for tried in self.tried]


def ctx(*, stream: bool = True) -> RoutingContext:
    """A context that execution only asks whether a stream was wanted."""
    return RoutingContext(request=RouteRequest(body={}, stream=stream), candidates=())


def ranking(*models: ModelConfig) -> Ranking:
    """A ranking of some models, best first."""
    return Ranking(models, [1.0] * len(models))


async def run(fallback: Fallback, attempts: Attempts, *models: ModelConfig, stream: bool = True) -> Answer:
    """Execute over a ranking."""
    return await fallback.execute(ctx(stream=stream), ranking(*models), attempts)


async def test_the_first_answer_ends_the_search() -> None:
    """Nobody else is asked once somebody answered."""
    attempts = Attempts()
    answer = await run(Fallback(), attempts, A, B)
    assert answer.served_by is A
    assert attempts.names == ["a"]


async def test_a_failure_moves_on_and_says_why() -> None:
    """The second attempt's reason is the first one's fault."""
    attempts = Attempts({A.id: Fault.CONNECT})
    answer = await run(Fallback(), attempts, A, B)
    assert answer.served_by is B
    assert [reason for _, reason, _ in attempts.tried] == ["first", "connect"]


async def test_no_more_than_max_attempts() -> None:
    """The limit holds, and the error counts the attempts."""
    attempts = Attempts(dict.fromkeys([A.id, B.id, C.id], Fault.SERVER_ERROR))
    with pytest.raises(AttemptsExhaustedError, match="b did not answer after 2 attempts") as raised:
        await run(Fallback(max_attempts=2), attempts, A, B, C)
    assert attempts.names == ["a", "b"]
    assert raised.value.details["attempts"] == [
        {"model": "a", "fault": "server_error"},
        {"model": "b", "fault": "server_error"},
    ]


async def test_a_callers_own_fault_is_not_tried_elsewhere() -> None:
    """A bad request comes back as what it is, with the backend's own words."""
    said = {"message": "temperature must be positive", "type": "invalid_request_error"}
    attempts = Attempts({A.id: BackendError(Fault.BAD_REQUEST, "bad", status=422, body=said)})
    with pytest.raises(AttemptsExhaustedError) as raised:
        await run(Fallback(), attempts, A, B)
    assert attempts.names == ["a"]
    assert (raised.value.status, raised.value.code) == (422, "invalid_request")
    assert raised.value.details["backend_error"] == said


async def test_a_prompt_too_long_is_tried_on_larger_windows_alone() -> None:
    """Models with the same or a smaller window are not bothered."""
    small, same, large = (
        model(name, capabilities=ModelCapabilities(max_context_window=window))
        for name, window in (("small", 4096), ("same", 4096), ("large", 32768))
    )
    attempts = Attempts({small.id: BackendError(Fault.CONTEXT_LENGTH, "too long", status=400)})
    answer = await run(Fallback(), attempts, small, same, large)
    assert answer.served_by is large
    assert attempts.names == ["small", "large"]


async def test_a_prompt_too_long_for_everybody_is_a_400() -> None:
    """The stable code tells a program what to do."""
    attempts = Attempts({A.id: BackendError(Fault.CONTEXT_LENGTH, "too long", status=400)})
    with pytest.raises(AttemptsExhaustedError) as raised:
        await run(Fallback(), attempts, A, B)
    assert (raised.value.status, raised.value.code) == (400, "context_length_exceeded")


async def test_a_timeout_stays_where_promotion_is_off() -> None:
    """`promote_on_timeout: false` ends the search at a timeout, not at other faults."""
    attempts = Attempts({A.id: Fault.TIMEOUT})
    with pytest.raises(AttemptsExhaustedError) as raised:
        await run(Fallback(promote_on_timeout=False), attempts, A, B)
    assert (raised.value.status, raised.value.code) == (504, "backend_timeout")


async def test_fallback_order_follows_the_first_choice_and_its_replicas() -> None:
    """First the choice, then its model's other replica, then the order given; others not at all."""
    attempts = Attempts(dict.fromkeys([A.id, A2.id, B.id, C.id], Fault.TIMEOUT))
    with pytest.raises(AttemptsExhaustedError):
        await run(Fallback(max_attempts=9, fallback_order=("c",)), attempts, A, B, A2, C)
    assert attempts.names == ["a", "a2", "c"]


@pytest.mark.parametrize(
    ("faults", "status", "code"),
    [
        ([Fault.RATE_LIMITED, Fault.RATE_LIMITED], 429, "rate_limit_exceeded"),
        ([Fault.RATE_LIMITED, Fault.OVERLOADED], 503, "backend_overloaded"),
        ([Fault.TIMEOUT, Fault.CONNECT_TIMEOUT], 504, "backend_timeout"),
        ([Fault.TIMEOUT, Fault.CONNECT], 502, "backend_failed"),
    ],
)
async def test_the_status_tells_what_all_attempts_had_in_common(faults: list[Fault], status: int, code: str) -> None:
    """One overloaded fleet is a 503, one mixed bag a 502."""
    attempts = Attempts(dict(zip([A.id, B.id], faults, strict=True)))
    with pytest.raises(AttemptsExhaustedError) as raised:
        await run(Fallback(), attempts, A, B)
    assert (raised.value.status, raised.value.code) == (status, code)


async def test_the_shortest_wait_is_passed_on() -> None:
    """Coming back after the first backend is free again is soon enough."""
    attempts = Attempts(
        {
            A.id: BackendError(Fault.RATE_LIMITED, "slow down", retry_after_s=30),
            B.id: BackendError(Fault.RATE_LIMITED, "slow down", retry_after_s=5),
        }
    )
    with pytest.raises(AttemptsExhaustedError) as raised:
        await run(Fallback(), attempts, A, B)
    assert raised.value.retry_after_s == 5


async def test_our_own_wrong_credential_is_not_the_callers_401() -> None:
    """A backend that refuses the fleet's key is a bad gateway, not a bad client."""
    keyed = model("keyed", api_key="wrong")
    attempts = Attempts({keyed.id: BackendError(Fault.UNAUTHORIZED, "no", status=401)})
    with pytest.raises(AttemptsExhaustedError) as raised:
        await run(Fallback(), attempts, keyed)
    assert (raised.value.status, raised.value.code) == (502, "backend_unauthorized")


async def test_a_whole_answer_may_take_the_models_own_time() -> None:
    """`timeout_ms` is for a stream's first token; a whole answer's first byte is its last."""
    fallback = Fallback(timeout_ms=1000)
    streamed, whole = Attempts(), Attempts()
    await run(fallback, streamed, A, stream=True)
    await run(fallback, whole, A, stream=False)
    assert streamed.tried[0][2] == 1.0
    assert whole.tried[0][2] == A.timeout_seconds == 60


@pytest.mark.parametrize("stream", [False, True])
async def test_a_models_own_shorter_limit_counts(stream: bool) -> None:
    """Also below `timeout_ms`, whose default of ten seconds nobody has written: five seconds are five seconds."""
    hasty, attempts = model("hasty", timeout_seconds=5), Attempts()
    await run(Fallback(timeout_ms=10_000), attempts, hasty, stream=stream)
    assert attempts.tried[0][2] == 5


async def test_after_a_refusal_those_it_holds_for_too_come_last() -> None:
    """Other models of the same account would refuse as well; they are tried only when nobody else is left."""
    one, two = (model(name, "http://cloud", shared_rate_limit=True) for name in ("one", "two"))
    limits = FleetLimits()
    limits.register([one, two, B])
    refusal = BackendError(Fault.RATE_LIMITED, "slow down")
    limits.begin(one.id).ended(refusal)
    fallback = Fallback()
    fallback.provision(Services(limits=limits))
    attempts = Attempts({one.id: refusal, B.id: Fault.SERVER_ERROR})
    answer = await run(fallback, attempts, one, two, B)
    assert [tried[0] for tried in attempts.tried] == [one.id, B.id, two.id]
    assert answer.served_by is two
