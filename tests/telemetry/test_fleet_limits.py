"""Rate limits of a fleet's replicas: who shares which, and what attempts tell of them."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.rate_limits import RateLimitTracker

API = "https://api.example"
SPENT = {"ratelimit": "limit=60, remaining=0, reset=30"}


def model(name: str, endpoint: str = API, **known: Any) -> ModelConfig:
    """A replica."""
    return ModelConfig(name=name, endpoint=endpoint, **known)


def limits_of(*models: ModelConfig, clock: FrozenClock | None = None, **options: Any) -> FleetLimits:
    """The limits of a fleet."""
    limits = FleetLimits(RateLimitTracker(**options, clock=clock or FrozenClock()))
    limits.register(models)
    return limits


def held(limits: FleetLimits, *models: ModelConfig) -> list[str]:
    """Names of those to be left alone now."""
    return [one.name for one, _ in limits.held(models, limits.tracker.clock.now_s())]


def refusal(kind: Fault = Fault.RATE_LIMITED, **known: Any) -> BackendError:
    """A call that was refused."""
    return BackendError(kind, "no", **known)


A, B = model("a"), model("b")


def test_models_have_limits_of_their_own() -> None:
    """As they do at OpenAI, Anthropic, Groq and Azure."""
    limits = limits_of(A, B)
    limits.begin(A.id).heard(SPENT)
    assert held(limits, A, B) == ["a"]


def test_one_model_under_two_names_is_one() -> None:
    """The provider knows only its own name; a trailing slash or `/v1` makes no other endpoint."""
    twin = model("twin", f"{API}/v1/", model_id="a")
    limits = limits_of(A, twin)
    limits.begin(A.id).heard(SPENT)
    assert held(limits, A, twin) == ["a", "twin"]


@pytest.mark.parametrize("other", [{"api_key": "sk-2"}, {"custom_headers": {"OpenAI-Project": "p"}}])
def test_each_credential_has_limits_of_its_own(other: dict[str, Any]) -> None:
    """The same model under two keys is two; nothing that is shown says which key."""
    one, two = model("one", model_id="m", api_key="sk-1"), model("two", model_id="m", **other)
    limits = limits_of(one, two)
    limits.begin(two.id).ended(refusal(retry_after_s=9.0))
    assert held(limits, one, two) == ["two"]
    shown = repr(limits) + repr(limits.summary()) + repr(limits.tracker.summary())
    assert not any(word in shown for word in ("sk-1", "sk-2", "OpenAI-Project"))
    assert list(limits.tracker.summary()) == [f"m@{API} (account 2)"]


def test_a_shared_limit_holds_for_all_who_share_it() -> None:
    """Models of one endpoint and credential that say so; the others keep their own."""
    shared = [model(name, shared_rate_limit=True) for name in "xy"]
    elsewhere = model("z", "https://other.example", shared_rate_limit=True)
    limits = limits_of(*shared, A, elsewhere)
    limits.begin(shared[0].id).ended(refusal(retry_after_s=9.0))
    assert held(limits, *shared, elsewhere) == ["x", "y"]
    assert held(limits, A) == ["a"], "what holds for the whole account holds for a model that has its own limit too"


def test_requests_of_all_count_for_the_account() -> None:
    """A model with a limit of its own uses the account up, too."""
    shared = model("x", shared_rate_limit=True, rpm=3)
    limits = limits_of(shared, A)
    limits.begin(shared.id)
    for _ in range(2):
        limits.begin(A.id)
    assert held(limits, shared) == ["x"]


def test_configured_limits_are_held() -> None:
    """The model's own before the defaults; of models that are one, the least."""
    twin = model("twin", model_id="a", rpm=2, tpm=5000)
    limits = limits_of(model("a", rpm=4), twin, B, default_rpm=100, default_tpm=100)
    for _ in range(2):
        limits.begin(A.id).ended(None, tokens=100)
    assert held(limits, A, twin, B) == ["a", "twin"]
    limits.begin(B.id).ended(None, tokens=100)
    assert held(limits, B) == ["b"]


def test_a_burst_is_counted_before_it_is_answered() -> None:
    """Sixty may be sent, and the answers take their time: the fifty-first is the last that goes there."""
    limits = limits_of(A)
    limits.begin(A.id).heard({"ratelimit": "limit=60, remaining=60, reset=60"})
    sent = 0
    while not held(limits, A):
        limits.begin(A.id)
        sent += 1
    assert sent == 51


def test_an_answer_does_not_know_of_those_sent_after_its_request() -> None:
    """They are taken off until their own answers come."""
    limits = limits_of(A)
    first = limits.begin(A.id)
    later = [limits.begin(A.id) for _ in range(5)]
    first.heard({"ratelimit": "limit=20, remaining=19, reset=60"})
    assert limits.state(A.id).requests_left == 14  # type: ignore[union-attr]
    for number, ticket in enumerate(later):
        ticket.heard({"ratelimit": f"limit=20, remaining={18 - number}, reset=60"})
    assert limits.state(A.id).requests_left == 14  # type: ignore[union-attr]


def test_the_share_that_is_left_is_told_if_it_is_known() -> None:
    """For the trace."""
    limits = limits_of(A, B)
    assert limits.begin(A.id).heard({"content-type": "application/json"}) is None
    assert limits.begin(A.id).heard({"ratelimit": "limit=60, remaining=15, reset=60"}) == 0.25


def test_a_refusal_tells_its_headers_too() -> None:
    """A 429 without `Retry-After` whose window says when it ends closes the replica until then."""
    clock = FrozenClock()
    limits = limits_of(A, clock=clock)
    limits.begin(A.id).ended(refusal(headers=SPENT))
    hold = limits.hold(A.id, clock.now_s())
    assert hold is not None
    assert (hold.rule, hold.wait_s(clock.now_s())) == ("requests", 30.0)


def test_a_full_replica_that_asks_to_wait_is_left_alone() -> None:
    """503 with `Retry-After`; without it the breaker alone decides."""
    limits = limits_of(A, B)
    limits.begin(A.id).ended(refusal(Fault.OVERLOADED, retry_after_s=3.0))
    limits.begin(B.id).ended(refusal(Fault.OVERLOADED))
    assert held(limits, A, B) == ["a"]


@pytest.mark.parametrize("fault", [Fault.SERVER_ERROR, Fault.CANCELLED, Fault.BAD_REQUEST, Fault.TIMEOUT])
def test_other_faults_say_nothing_of_limits(fault: Fault) -> None:
    """Not even with `Retry-After`, which only a refusal for the moment may carry."""
    limits = limits_of(A)
    limits.begin(A.id).ended(refusal(fault, retry_after_s=3.0))
    assert held(limits, A) == []


def test_only_a_later_request_proves_that_the_cooldown_is_over() -> None:
    """An answer to one that was sent before the refusal does not."""
    limits = limits_of(A)
    before, refused = limits.begin(A.id), limits.begin(A.id)
    refused.ended(refusal())
    before.heard({})
    assert held(limits, A) == ["a"]
    limits.begin(A.id).heard({})
    assert held(limits, A) == []


def test_a_stream_that_ends_is_counted_once() -> None:
    """Begun, heard, ended: one request in flight less, its tokens counted once."""
    limits = limits_of(A)
    ticket = limits.begin(A.id)
    ticket.heard({})
    ticket.ended(None, tokens=30)
    entry = limits.tracker.of((API, "a", ""))
    assert (entry.in_flight, entry.started, entry.minute.requests, entry.minute.tokens) == (0, 1, 1, 30)


def test_only_what_is_known_is_shown() -> None:
    """By replica; what was learned survives that the fleet is told anew, and who is not of it is unknown."""
    limits = limits_of(A, B)
    limits.begin(A.id).heard({"ratelimit": "limit=60, remaining=15, reset=60"})
    limits.begin("a stranger").heard({})
    limits.register([A, B])
    assert list(limits.summary()) == [A.id]
    assert limits.summary()[A.id]["capacity"] == 0.25
    assert limits.state(B.id) is None
    assert limits.capacity(B.id, 1000.0) == 1.0
