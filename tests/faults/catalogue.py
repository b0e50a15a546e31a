"""The faults of the wall: what an engine does, and what of it can be recovered from."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator

import attrs

from tests.faults.site import LAST_CHUNK, SSE_HEAD, Ask, Behaviour, LeaveError, chunk, refusal, whole
from tests.faults.tongues import TEXT, TOKENS

PAGE = b"<!doctype html><html><body><h1>502 Bad Gateway</h1></body></html>\n"
BOTH, STREAM = (False, True), (True,)
ALONE, PAIR, ANY = (1,), (2,), (1, 2)


@attrs.frozen
class Fault:
    """One fault.

    Attributes:
        name: For people.
        behaviour: What the engine at fault does with a chat.
        streams: Asked for with and without streaming, or streamed only.
        engines: With nobody else to turn to, with a second engine that is well, or both.
        heals: True if the same engine would answer, were it asked again a moment later.
        refuses: True if the first engine does not accept connections.
        statuses: What an honest refusal may be, if not any failure of a server and 429.
        is_outage: True if it ends after a while, and the gateway has to notice.
    """

    name: str
    behaviour: Behaviour
    streams: tuple[bool, ...] = BOTH
    engines: tuple[int, ...] = ANY
    heals: bool = False
    refuses: bool = False
    statuses: tuple[int, ...] = ()
    is_outage: bool = False


@attrs.frozen
class Case:
    """A fault, streamed or not, with one engine or two."""

    fault: Fault
    stream: bool
    engines: int

    def __str__(self) -> str:
        how, who = "stream" if self.stream else "whole", "alone" if self.engines == 1 else "pair"
        return f"{self.fault.name}, {how}, {who}"

    @property
    def can_recover(self) -> bool:
        """True if a right answer is to be had."""
        return self.fault.statuses == () and (self.engines > 1 or self.fault.heals)


# Before a byte of the answer -----------------------------------------------------------------------------------------


def says(*pieces: bytes) -> Behaviour:
    """Say this, whatever was asked."""

    async def behave(ask: Ask) -> None:
        await ask.say(*pieces)

    return behave


def once(behaviour: Behaviour) -> Behaviour:
    """Misbehave with the first request only."""

    async def behave(ask: Ask) -> None:
        await (behaviour(ask) if ask.number == 1 else ask.answer())

    return behave


async def resets(ask: Ask) -> None:
    """Read the request, and reset the connection."""
    raise LeaveError(resets=True)


async def is_silent(ask: Ask) -> None:
    """Read the request, and never answer."""
    await ask.silence()


async def begins_and_is_silent(ask: Ask) -> None:
    """Send a stream's head, and never an event."""
    await ask.say(SSE_HEAD)
    await ask.silence()


def answers_late(seconds: float) -> Behaviour:
    """Be silent for that long before the answer's head."""

    async def behave(ask: Ask) -> None:
        await asyncio.sleep(seconds)
        await ask.answer()

    return behave


def names_its_address(status: str) -> Behaviour:
    """Fail with a message that gives the engine's address away."""

    async def behave(ask: Ask) -> None:
        where = f"{ask.engine.url}/v1, see ('127.0.0.1', {ask.engine.port})"
        await ask.say(refusal(status, f"cannot connect to {where}"))

    return behave


async def answers_with_an_error(ask: Ask) -> None:
    """Say 200, and an error."""
    if ask.stream:
        await ask.say(SSE_HEAD, *map(chunk, ask.tongue.breakdown), LAST_CHUNK)
    else:
        await ask.say(whole(json.dumps(ask.tongue.failed).encode()))


# Amid the answer -----------------------------------------------------------------------------------------------------


async def stalls(ask: Ask) -> None:
    """Begin, and fall silent."""
    await ask.begin()
    await ask.silence()


def cut_at_random(seed: int = 0, *, is_reset: bool = False) -> Behaviour:
    """Close the connection after some byte of the answer's body; where, differs from request to request."""
    chance = random.Random(seed)

    async def behave(ask: Ask) -> None:
        tongue = ask.tongue
        said = b"".join(map(chunk, tongue.events_of(TOKENS)[:-2])) if ask.stream else tongue.answer_of(TEXT)
        head = SSE_HEAD if ask.stream else whole(said)[: -len(said)]
        earliest = sum(len(chunk(one)) for one in tongue.beginning(1)) if ask.stream else 200
        await ask.say(head + said[: chance.randrange(earliest, len(said))])
        if is_reset:
            await asyncio.sleep(0.02)  # what was sent would be lost with it
        raise LeaveError(resets=is_reset)

    return behave


async def truncates_its_json(ask: Ask) -> None:
    """End properly, as HTTP has it, amid a JSON value."""
    if not ask.stream:
        await ask.say(whole(ask.tongue.answer_of(TEXT)[:-60]))
        return
    await ask.begin()
    await ask.say(chunk(ask.tongue.rest(4)[0][:-20]), LAST_CHUNK)


async def speaks_nonsense(ask: Ask) -> None:
    """Say what is no event, or no JSON, amid the answer, and go on."""
    if not ask.stream:
        key = f'"{ask.tongue.key}"'.encode()
        await ask.say(whole(ask.tongue.answer_of(TEXT).replace(key + b":", key + b"=")))
        return
    await ask.begin()
    junk = chunk(b"event\nid 17\ndata: {not JSON at all\n\n\x00\xff\n")
    await ask.say(junk, *map(chunk, ask.tongue.rest(4)), LAST_CHUNK)


async def breaks_one_event(ask: Ask) -> None:
    """Send one event whose JSON is cut short, and then go on as if nothing had been."""
    broken, *rest = ask.tongue.rest(4)
    events = [*ask.tongue.beginning(4), broken[:-12] + b"\n\n", *rest]
    await ask.say(SSE_HEAD, *map(chunk, events), LAST_CHUNK)


async def ends_early(ask: Ask) -> None:
    """End properly, as HTTP has it, without an end of the answer."""
    await ask.begin()
    await ask.say(LAST_CHUNK)


async def reports_an_error(ask: Ask) -> None:
    """Begin, then report an error, a chat's as vLLM does."""
    await ask.begin()
    await ask.say(*map(chunk, ask.tongue.breakdown), LAST_CHUNK)


# The list ------------------------------------------------------------------------------------------------------------


def faults(unit_s: float) -> Iterator[Fault]:
    """All of them.

    Args:
        unit_s: The gateway waits two units for a first byte and amid an answer; what is slow takes three.
    """
    limited = refusal("429 Too Many Requests")
    yield Fault(
        "429 with Retry-After", once(says(refusal("429 Too Many Requests", more="retry-after: 1\r\n"))), heals=True
    )
    yield Fault("429", says(limited))
    yield Fault("500", says(refusal("500 Internal Server Error")))
    yield Fault("500 once", once(says(refusal("500 Internal Server Error"))), engines=ALONE, heals=True)
    yield Fault("503", says(refusal("503 Service Unavailable")))
    yield Fault("connection refused", says(), refuses=True)
    yield Fault("connection reset", resets)
    yield Fault("black hole", is_silent)
    yield Fault("slow headers", answers_late(3 * unit_s))
    yield Fault("slow first token", begins_and_is_silent, streams=STREAM)
    yield Fault("stall amid the answer", stalls)
    yield Fault("cut at a random byte", cut_at_random())
    yield Fault("reset at a random byte", cut_at_random(is_reset=True), streams=STREAM)
    yield Fault("truncated JSON", truncates_its_json)
    yield Fault("malformed events, malformed JSON", speaks_nonsense)
    yield Fault("one broken event", breaks_one_event, streams=STREAM)
    yield Fault("clean end, no finish reason", ends_early, streams=STREAM)
    yield Fault("error event amid the stream", reports_an_error, streams=STREAM)
    yield Fault("web page under 200", says(whole(PAGE, kind="text/html")))
    yield Fault("nothing under 200", says(whole(b"")))
    yield Fault("error under 200", answers_with_an_error)
    yield Fault("garbage", says(b"SSH-2.0-nothing-you-know\r\n"))
    yield Fault("500 that names its address", names_its_address("500 Internal Server Error"), engines=ALONE)
    yield Fault("400 that names its address", names_its_address("400 Bad Request"), engines=ALONE, statuses=(400,))
    yield Fault("outage and recovery", says(), refuses=True, is_outage=True)


def cases(unit_s: float) -> list[Case]:
    """The whole wall."""
    return [
        Case(fault, stream, engines)
        for fault in faults(unit_s)
        for stream in fault.streams
        for engines in fault.engines
    ]
