"""The fault wall: whatever an engine does, a client gets a right answer or an honest error, in time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import attrs
import pytest

from kvfleet.clock import SystemClock
from kvfleet.config.schema import FallbackConfig, FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from tests.faults.catalogue import Case, cases
from tests.faults.judge import Verdict
from tests.faults.site import Site, site
from tests.faults.tongues import CHAT, MESSAGES, MODEL, RESPONSES, TONGUES, Tongue
from tests.faults.wall import Times, a_moment, run

UNIT_S = 0.1
HOUR_S = 3600.0


@attrs.define
class Clock(SystemClock):
    """The machine's, and it can be put forward."""

    ahead_s: float = 0.0

    def now_s(self) -> float:  # type: ignore[override]
        return SystemClock.now_s() + self.ahead_s

    async def hour(self) -> None:
        """Let an hour pass."""
        self.ahead_s += HOUR_S

    async def minute(self) -> None:
        """Let a minute and a bit pass."""
        self.ahead_s += 61.0
        await a_moment()


@contextlib.asynccontextmanager
async def gateway_before(
    one: Site, clock: Clock, *, unit_s: float = UNIT_S, failures: int = 3, tongues: Sequence[str] = (), **fallback: Any
) -> AsyncIterator[str]:
    """A gateway with the default pipeline before a site's engines.

    Args:
        one: The site.
        clock: The time.
        unit_s: Of the time limits.
        failures: So many in a row open a breaker.
        tongues: What APIs beside chat the engines are said to speak.
        fallback: Options of that name.
    """
    first, *others = [engine.url for engine in one.engines]
    model = ModelConfig(
        name=MODEL,
        endpoint=first,
        replicas=tuple(others),
        provider="vllm",
        options={"surfaces": list(tongues)},
        timeout_seconds=2 * unit_s,
        idle_timeout_seconds=2 * unit_s,
    )
    config = FleetConfig(
        models=(model,),
        fallback=FallbackConfig(timeout_ms=2000 * unit_s, **fallback),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    router = Router(config, polls=False, clock=clock, seed=1)
    router.services.health.failure_threshold = failures
    async with running(config, router=router) as serving:
        yield serving.url


# An error event is honest, but the second engine could have gone on: with `fallback.continue_streams` it does.
AMID = frozenset(
    {
        "stall amid the answer",
        "cut at a random byte",
        "reset at a random byte",
        "truncated JSON",
        "malformed events, malformed JSON",
        "one broken event",
        "clean end, no finish reason",
        "error event amid the stream",
    }
)


def expected(case: Case) -> Verdict:
    """What the gateway's defaults come to."""
    is_amid = case.fault.name in AMID and case.stream and case.engines > 1
    return Verdict.SAFE if is_amid else Verdict.PASS


@pytest.mark.parametrize("case", cases(UNIT_S), ids=str)
async def test_the_wall(case: Case) -> None:
    """No case misleads a client, and an answer is had wherever one is to be had before the first byte."""
    clock = Clock()
    times = Times(UNIT_S, 10 * UNIT_S + 1.5, clock.hour, clock.minute, recoveries=3)
    async with site(case.engines) as one, gateway_before(one, clock) as url:
        found = await run(case, url, one, times)
    assert found.verdict is expected(case), found.why


@pytest.mark.parametrize("is_native", [True, False], ids=["spoken", "translated"])
@pytest.mark.parametrize("tongue", TONGUES, ids=lambda one: one.name)
@pytest.mark.parametrize(
    "case", [case for case in cases(UNIT_S) if case.stream and case.engines > 1 and case.fault.name in AMID], ids=str
)
async def test_the_wall_with_streams_gone_on_with(case: Case, tongue: Tongue, is_native: bool) -> None:
    """Then whoever is well says the rest of it, byte for byte, in whichever API it was begun."""
    clock = Clock()
    times = Times(UNIT_S, 10 * UNIT_S + 1.5, clock.hour, clock.minute, recoveries=3)
    spoken = [tongue] if is_native and tongue is not CHAT else []
    async with (
        site(case.engines, *spoken) as one,
        gateway_before(one, clock, tongues=[each.name for each in spoken], continue_streams=True) as url,
    ):
        found = await run(case, url, one, times, tongue)
    assert found.verdict is Verdict.PASS, found.why


@pytest.mark.parametrize("is_native", [True, False], ids=["spoken", "translated"])
@pytest.mark.parametrize("tongue", [MESSAGES, RESPONSES], ids=lambda one: one.name)
@pytest.mark.parametrize("case", cases(UNIT_S), ids=str)
async def test_the_wall_in_other_words(case: Case, tongue: Tongue, is_native: bool) -> None:
    """The same in Anthropic's words and in those of OpenAI's responses, as their SDKs have it, whether or not the engine speaks them."""
    clock = Clock()
    times = Times(UNIT_S, 10 * UNIT_S + 1.5, clock.hour, clock.minute, recoveries=3)
    spoken = [tongue] if is_native else []
    async with (
        site(case.engines, *spoken) as one,
        gateway_before(one, clock, tongues=[each.name for each in spoken]) as url,
    ):
        found = await run(case, url, one, times, tongue)
    assert found.verdict is expected(case), found.why


def test_the_count() -> None:
    """No fail by the test above, and so many that pass."""
    verdicts = [expected(case) for case in cases(UNIT_S)]
    assert Verdict.FAIL not in verdicts
    assert (len(verdicts), verdicts.count(Verdict.PASS)) == (84, 76)
