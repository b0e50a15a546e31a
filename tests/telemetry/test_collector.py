"""Background polling."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import attrs
import pytest

from kvfleet.adapters.base import EndpointHealth, EngineLoad, InferenceAdapter
from kvfleet.adapters.call import Call, Reply
from kvfleet.clock import FrozenClock
from kvfleet.errors import BackendError, Fault
from kvfleet.telemetry.collector import Collector
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad


@attrs.define(kw_only=True)
class Engine(InferenceAdapter):
    """An engine that answers polls as told, and counts them."""

    load: EngineLoad = EngineLoad(running=1)
    fails: Exception | None = None
    hangs: bool = False
    checks: int = 0
    readings: int = 0

    async def send(self, call: Call) -> Reply:
        raise NotImplementedError

    async def health_check(self) -> EndpointHealth:
        self.checks += 1
        await self._trouble()
        return EndpointHealth(endpoint="as the adapter writes it", healthy=True, latency_ms=3.0)

    async def get_load(self) -> EngineLoad:
        self.readings += 1
        await self._trouble()
        return self.load

    async def _trouble(self) -> None:
        if self.hangs:
            await anyio.sleep_forever()
        if self.fails is not None:
            raise self.fails


class Sleeps:
    """Records the pauses asked for, and ends the polling after some."""

    def __init__(self, most: int, done: Callable[[], None]) -> None:
        self.pauses: list[float] = []
        self.most, self.done = most, done

    async def __call__(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if len(self.pauses) >= self.most:
            self.done()
        await anyio.lowlevel.checkpoint()


def collector(adapters: dict[str, InferenceAdapter], **options: object) -> Collector:
    """A collector on a frozen clock."""
    clock = FrozenClock()
    return Collector(adapters, HealthManager(clock=clock), FleetLoad(clock), clock=clock, **options)  # type: ignore[arg-type]


async def test_engines_that_share_an_endpoint_are_asked_once() -> None:
    """Two models on one engine mean one health check and one reading."""
    one, two = Engine(endpoint="http://shared/v1"), Engine(endpoint="http://shared/v1")
    polls = collector({"a@http://shared": one, "b@http://shared": two})
    await polls.collect_once()
    assert (one.checks, one.readings, two.checks, two.readings) == (1, 1, 0, 0)
    assert polls.load.engine("http://shared") == EngineLoad(running=1)


async def test_findings_are_kept_under_the_replicas_endpoint() -> None:
    """However an adapter writes its address, the fleet's own spelling is used."""
    polls = collector({"a@http://e/v1/": Engine()})
    await polls.collect_once()
    assert polls.health.get_health("http://e/v1/") == EndpointHealth(
        endpoint="http://e/v1/", healthy=True, latency_ms=3.0
    )


@pytest.mark.parametrize("error", [BackendError(Fault.CONNECT, "no"), ValueError("a plugin's own"), OSError("no")])
async def test_a_poll_that_fails_is_staleness_and_not_saturation(error: Exception) -> None:
    """A failed reading leaves the load unknown; a failed check says the engine is down; neither raises."""
    polls = collector({"a@http://e": Engine(fails=error)})
    await polls.collect_once()
    assert polls.load.engine("http://e") is None
    assert polls.failed_readings == 1
    found = polls.health.get_health("http://e")
    assert found is not None
    assert (found.healthy, found.error) == (False, f"the health check failed: {type(error).__name__}")


async def test_an_engine_that_hangs_is_given_up() -> None:
    """Every poll has a deadline."""
    polls = collector({"a@http://e": Engine(hangs=True)}, deadline_s=0.01)
    await polls.collect_once()
    found = polls.health.get_health("http://e")
    assert found is not None
    assert found.error == "no answer to the health check within 0.01 s"
    assert polls.failed_readings == 1


async def test_an_engine_that_says_nothing_leaves_no_report() -> None:
    """Silence is not zero load."""
    polls = collector({"a@http://e": Engine(load=EngineLoad())})
    await polls.collect_once()
    assert polls.load.engine("http://e") is None


async def pauses(engine: Engine, **options: object) -> list[float]:
    """The pauses between the readings of one engine, without those between its health checks."""
    scope = anyio.CancelScope()
    sleeps = Sleeps(30, scope.cancel)
    polls = collector({"a@http://e": engine}, sleep=sleeps, health_interval_s=1000.0, seed=1, **options)
    with scope:
        await polls.run()
    return [pause for pause in sleeps.pauses if pause < 600]


async def test_polling_repeats_with_jitter() -> None:
    """Pauses vary around the interval by a fifth at most."""
    found = await pauses(Engine(), load_interval_s=2.0)
    assert len(found) > 10
    assert len(set(found)) == len(found)
    assert all(1.6 <= pause <= 2.4 for pause in found)


async def test_an_engine_that_fails_is_asked_less_often() -> None:
    """A dead engine does not cost a connection attempt every second."""
    found = await pauses(Engine(fails=OSError()), load_interval_s=1.0)
    assert all(4.0 <= pause <= 6.0 for pause in found)
    assert found


async def test_a_silent_engine_is_asked_for_its_load_as_rarely_as_for_its_health() -> None:
    """A provider without load figures is not polled for them every second."""
    assert await pauses(Engine(load=EngineLoad()), load_interval_s=1.0) == []


async def test_large_fleets_are_polled_more_slowly() -> None:
    """All engines together are read at most 100 times a second."""
    scope = anyio.CancelScope()
    sleeps = Sleeps(900, scope.cancel)
    adapters: dict[str, InferenceAdapter] = {f"m@http://{i}": Engine() for i in range(400)}
    polls = collector(adapters, sleep=sleeps, health_interval_s=1000.0, load_interval_s=1.0)
    with scope:
        await polls.run()
    readings = [pause for pause in sleeps.pauses if pause < 600]
    assert readings
    assert min(readings) >= 3.2


@attrs.define(kw_only=True)
class Strict(Engine):
    """An engine that refuses what it does not list."""

    refuses_unlisted = True
    lists: tuple[str, ...] = ()

    async def list_models(self) -> tuple[str, ...]:
        await self._trouble()
        return self.lists


async def test_what_an_engine_lists_is_held_against_each_replica_behind_it() -> None:
    """Those whose model it does not list are told apart; a list that cannot be read says nothing of anybody."""
    engine = Strict(endpoint="http://gpu", model_id="llama", lists=("llama", "adapter-1"))
    other = Strict(endpoint="http://gpu", model_id="qwen")
    lenient = Engine(endpoint="http://cpu", model_id="phi")
    made = collector({"a@http://gpu": engine, "b@http://gpu": other, "c@http://cpu": lenient})
    await made.check_health()
    assert made.health.unserved == {"b@http://gpu": "the engine serves llama, adapter-1, not qwen"}
    engine.lists = ("one", "two", "three", "four", "qwen")
    await made.check_health()
    assert made.health.unserved == {"a@http://gpu": "the engine serves one, two, three and 2 more, not llama"}
    engine.lists = ()
    await made.check_health()
    assert made.health.unserved == {}
