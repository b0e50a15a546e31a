"""Runs the wall's cases against a gateway, whichever it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import attrs

from tests.faults.catalogue import Case
from tests.faults.judge import Judgement, Verdict, ask, judged
from tests.faults.sdks import made_of
from tests.faults.site import Site
from tests.faults.tongues import CHAT, Tongue

REFUSED_TRIES = 4  # a gateway may ask either engine first; one of these meets the one that is not there


@attrs.frozen
class Times:
    """How long things may take.

    Attributes:
        unit_s: The gateway is set to wait two of these for a first byte, and amid an answer.
        deadline_s: The client's patience.
        outage: Lets an outage go on for its time.
        recovery: Lets a moment pass after an outage; asked up to `recoveries` times.
    """

    unit_s: float
    deadline_s: float
    outage: Callable[[], Awaitable[None]]
    recovery: Callable[[], Awaitable[None]]
    recoveries: int


async def run(case: Case, url: str, site: Site, times: Times, tongue: Tongue = CHAT) -> Judgement:
    """One case: the fault befalls the site, the client asks in an API, and all is well again afterwards."""
    fault = case.fault
    await site.befall(fault.behaviour, refuses=fault.refuses)
    try:
        if fault.is_outage:
            return await _outage(case, url, site, times, tongue)
        tries = REFUSED_TRIES if fault.refuses and case.engines > 1 else 1
        return worst([await _once(case, url, site, times, tongue) for _ in range(tries)])
    finally:
        await site.heal()


def worst(judgements: list[Judgement]) -> Judgement:
    """The worst of several, of equals the last."""
    return max(judgements, key=lambda one: one.rank)


async def _once(case: Case, url: str, site: Site, times: Times, tongue: Tongue) -> Judgement:
    heard = await ask(url, stream=case.stream, deadline_s=times.deadline_s, tongue=tongue)
    is_seen = tongue is not CHAT and heard.status == 200  # chats are judged by hand, by the same rules for all gateways
    made = await made_of(tongue, heard.body, stream=case.stream) if is_seen else None
    return judged(case, heard, [engine.port for engine in site.engines], tongue, made)


async def _outage(case: Case, url: str, site: Site, times: Times, tongue: Tongue) -> Judgement:
    """While it lasts, errors must be honest, and a second engine must answer; soon after it, the first must, too."""
    during = [await _once(case, url, site, times, tongue) for _ in range(6)]
    await times.outage()
    during.append(await _once(case, url, site, times, tongue))
    await site.heal()
    for _ in range(times.recoveries):
        await times.recovery()
        after = await _once(case, url, site, times, tongue)
        if after.verdict is Verdict.PASS:
            return worst([*during, after])
        if after.verdict is Verdict.FAIL:
            return after
    return worst([*during, Judgement(Verdict.SAFE, "gave no answer after the outage")])


async def a_moment() -> None:
    """Let others run."""
    await asyncio.sleep(0.01)
