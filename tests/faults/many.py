"""Thousands of streams that break at a random byte, in one of several ways, and what a gateway makes of each."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping

from tests.faults.catalogue import ALONE, STREAM, Case, Fault
from tests.faults.judge import ask, judged
from tests.faults.sdks import made_of
from tests.faults.site import LAST_CHUNK, SSE_HEAD, Ask, LeaveError, Site, chunk
from tests.faults.tongues import CHAT, MESSAGES, RESPONSES, TOKENS, TONGUES, Tongue

EVENTS = {tongue.name: b"".join(tongue.events_of(TOKENS)) for tongue in TONGUES}
WIRES = {tongue.name: b"".join(map(chunk, tongue.events_of(TOKENS))) for tongue in TONGUES}
_CLOSING = {
    CHAT.name: b'"finish_reason":"stop"',
    MESSAGES.name: b'"stop_reason":"end_turn"',
    RESPONSES.name: b"response.completed",
}
"""What says that an answer is whole; none of it is left of a stream that ends properly."""
_JUNK = (b"\n\nid: 17\ndata: {not JSON\n\n", b"\0\xff\n\n", b"<html>\n\n", b"data: [1,2]\n\n", b"data: \n{}\n\n")


def random_break(chance: random.Random) -> Fault:
    """A way to break, drawn anew for every request."""

    async def behave(ask: Ask) -> None:
        await ask.say(SSE_HEAD)
        events, wire = EVENTS[ask.tongue.name], WIRES[ask.tongue.name]
        how = chance.choice(("close", "reset", "end", "junk", "half"))
        if how in ("close", "reset"):  # amid HTTP's own framing, an event, a JSON token or a letter
            await ask.say(wire[: chance.randrange(len(wire) - 20)])
            await asyncio.sleep(0.002 if how == "reset" else 0)
            raise LeaveError(resets=how == "reset")
        kept = events[: chance.randrange(1, events.index(_CLOSING[ask.tongue.name]))]
        if how == "junk":
            kept = kept[: kept.rfind(b"\n\n") + 2] + chance.choice(_JUNK)
        if how == "half" and len(kept) > 1:
            middle = chance.randrange(1, len(kept))
            await ask.say(chunk(kept[:middle]))
            kept = kept[middle:]
        await ask.say(chunk(kept), LAST_CHUNK)

    return Fault("random break", behave, streams=STREAM, engines=ALONE)


async def broken_streams(
    url: str,
    site: Site,
    *,
    count: int,
    seed: int = 0,
    at_once: int = 32,
    tongue: Tongue = CHAT,
    headers: Mapping[str, str] | None = None,
) -> Counter[str]:
    """How many of so many streams ended how: a verdict and its reason."""
    case = Case(random_break(random.Random(seed)), stream=True, engines=1)
    await site.befall(case.fault.behaviour)
    site.is_everybody = True
    ports = [engine.port for engine in site.engines]
    found: Counter[str] = Counter()
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            heard = await ask(url, stream=True, deadline_s=20.0, tongue=tongue, headers=headers)
            is_seen = tongue is not CHAT and heard.status == 200
            made = await made_of(tongue, heard.body, stream=True) if is_seen else None
            verdict = judged(case, heard, ports, tongue, made)
            found[f"{verdict.verdict}: {verdict.why}"] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(client())
    return found
