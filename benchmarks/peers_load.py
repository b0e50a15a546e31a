"""The load of ``peers.py``: workloads made of traces, and a client that sends them and times the answers.

A process of its own (``python benchmarks/peers_load.py --url … --workload …``), so that its CPU is nobody else's. A
line on its standard input lets it warm the gateway up, with requests of the same kind that share nothing with those
that count, and it answers with a line; the next one lets it begin, and it prints one JSON object.

Prompts are texts: each block of a trace becomes the same words wherever it stands, so what is shared in the trace is
shared in the text. A token is four bytes, as the mock engines count. All lengths are divided by `SCALE`, which keeps
bytes and chunks few enough for a small machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
import xxhash

from kvfleet.replay.generate import AgentSessions, Bursts
from kvfleet.replay.readers import read_trace
from kvfleet.replay.traces import RequestTrace, TracedRequest

MODEL = "mock"
SCALE = 8
LONGEST_TOKENS = 32_000
"""Longer prompts of Mooncake's trace are left out: one of them would hold an engine for most of a short run."""
MOST_ANSWER_TOKENS = 24
WORKLOADS = ("mooncake-1", "mooncake-2", "agents", "bursts")
MOONCAKE_RATE_PER_S = 6.0
_PATIENCE_S = 120.0
_UNLIKE = 1 << 48
"""Added to a block's number, makes it one that no workload has."""
_SYLLABLES = [a + b + c + " " for a in "bdfghklmnprstvwz" for b in "aeio" for c in "lnrs"]


# What is sent --------------------------------------------------------------------------------------------------------


def workload(
    name: str, seconds: float, seed: int, trace: Path | None, rate_per_s: float = MOONCAKE_RATE_PER_S
) -> RequestTrace:
    """The requests of a workload, for about so long; the rate is that of the trace's."""
    if name == "agents":
        sessions = AgentSessions(
            sessions=max(1, round(2 * seconds)), session_rate_per_s=2.0, turns=6, agents=3, tool_s=0.5, think_s=2.0
        )
        return sessions.generate(seed)
    if name == "bursts":
        return Bursts(requests=max(1, round(7 * seconds)), rate_per_s=3.0, burst=24, every_s=6.0).generate(seed)
    if trace is None:
        raise SystemExit(f"the workload {name} needs --trace FILE")
    return mooncake(name, read_trace(trace), seconds, seed, rate_per_s)


def mooncake(name: str, whole: RequestTrace, seconds: float, seed: int, rate_per_s: float) -> RequestTrace:
    """Some conversations that begin in one half of an hour, each of them whole, and squeezed into so many seconds.

    Every prompt begins with the same block; the second one tells conversations apart.
    """
    fitting = [one for one in whole.requests if len(one.blocks) > 1 and one.prompt_tokens <= LONGEST_TOKENS]
    since_s = {one.blocks[1]: one.at_s for one in reversed(fitting)}
    halfway_s, is_first = fitting[-1].at_s / 2, name.endswith("1")
    fitting = [one for one in fitting if (since_s[one.blocks[1]] < halfway_s) == is_first]
    stride = max(1, round(len(fitting) / (rate_per_s * seconds)))
    chosen = [one for one in fitting if one.blocks[1] % stride == seed % stride]
    shrink = seconds / max(chosen[-1].at_s - chosen[0].at_s, 1e-9)
    return RequestTrace.of(name, whole.block_tokens, [attrs.evolve(one, at_s=one.at_s * shrink) for one in chosen])


def unlike(trace: RequestTrace, seconds: float) -> RequestTrace:
    """Its first requests, as many as come in so many seconds, with other words."""
    chosen = [one for one in trace.requests if one.at_s < seconds]
    other = [attrs.evolve(one, blocks=tuple(block + _UNLIKE for block in one.blocks)) for one in chosen]
    return RequestTrace.of(trace.name, trace.block_tokens, other)


def scaled(trace: RequestTrace) -> RequestTrace:
    """The lengths that its prompts have as texts, in tokens."""
    size = trace.block_tokens // SCALE
    sized = [attrs.evolve(one, prompt_tokens=len(one.blocks) * size + own_tokens(trace, one)) for one in trace.requests]
    return RequestTrace(name=trace.name, block_tokens=size, requests=tuple(sized))


def own_tokens(trace: RequestTrace, one: TracedRequest) -> int:
    """How long the end of a prompt is that is its own."""
    return max(4, (one.prompt_tokens - len(one.blocks) * trace.block_tokens) // SCALE)


def words(seed: int, tokens: int) -> str:
    """So many tokens of text, the same for the same seed."""
    digests = (xxhash.xxh3_128_digest(part.to_bytes(4, "little"), seed=seed) for part in range(-(-tokens // 16)))
    return "".join(_SYLLABLES[byte] for byte in b"".join(digests)[:tokens])


def prompt(trace: RequestTrace, number: int) -> str:
    """The text of a request: its blocks, and an end that is its own."""
    one, size = trace.requests[number], trace.block_tokens // SCALE
    return "".join(words(block, size) for block in one.blocks) + words(number + 1, own_tokens(trace, one))


def body(text: str, answer_tokens: int) -> bytes:
    """A streaming chat request."""
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": answer_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(request).encode()


def bodies_of(trace: RequestTrace) -> list[bytes]:
    """All of a trace's requests."""
    return [body(prompt(trace, number), answer_tokens(one)) for number, one in enumerate(trace.requests)]


def answer_tokens(one: TracedRequest) -> int:
    """How long its answer is to be."""
    return min(MOST_ANSWER_TOKENS, max(2, one.output_tokens // SCALE))


# The client ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Answer:
    """What one request took; the times are seconds since it was sent.

    Attributes:
        status: The HTTP status; 0 if the connection broke or nothing came in time.
        first_s, end_s: When its first words came, and its last ones.
        chunks: How many pieces of text it had.
        prompt_tokens, cached_tokens: What the gateway passed on of the engine's usage; None if it did not.
    """

    status: int = 0
    first_s: float | None = None
    end_s: float | None = None
    chunks: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


async def ask(url: str, payload: bytes, session: str = "") -> Answer:
    """Send one request over a connection of its own, and time its answer."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await _ask(url, payload, session)
    except (OSError, EOFError, ValueError):
        return Answer()


async def _ask(url: str, payload: bytes, session: str) -> Answer:
    where = urlsplit(url)
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 20)
    try:
        lines = [f"POST {where.path} HTTP/1.1", f"host: {where.netloc}", "content-type: application/json"]
        lines += [f"content-length: {len(payload)}", "connection: close"]
        lines += [f"x-session-id: {session}"] if session else []
        writer.write("\r\n".join([*lines, "", ""]).encode() + payload)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(b" ", 2)[1])
        found: dict[str, Any] = {"status": status, "chunks": 0}
        async for event in _events(reader, is_chunked=b"transfer-encoding: chunked" in head):
            _note(found, event, time.perf_counter() - started)
        return Answer(**found)
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    """The data of a stream's events, as they come."""
    kept = b""
    async for piece in _pieces(reader, is_chunked=is_chunked):
        *whole, kept = (kept + piece.replace(b"\r\n", b"\n")).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                yield event[5:].strip()


async def _pieces(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    while is_chunked and (size := int((await reader.readline()).split(b";")[0], 16)):
        yield (await reader.readexactly(size + 2))[:-2]
    while not is_chunked and (piece := await reader.read(65_536)):
        yield piece


def _note(found: dict[str, Any], event: bytes, at_s: float) -> None:
    """Add an event to what is known of an answer."""
    if event == b"[DONE]":
        return
    chunk = json.loads(event)
    if any(choice.get("delta", {}).get("content") for choice in chunk.get("choices", ())):
        found.setdefault("first_s", at_s)
        found["end_s"] = at_s
        found["chunks"] += 1
    if usage := chunk.get("usage"):
        details = usage.get("prompt_tokens_details") or {}
        found |= {"prompt_tokens": usage.get("prompt_tokens"), "cached_tokens": details.get("cached_tokens")}


async def send_all(url: str, trace: RequestTrace, bodies: Sequence[bytes], seconds: float) -> list[Answer]:
    """Send a trace's requests; a session's later requests wait for the answer before, and for its thinking time.

    Nothing new is sent after so many seconds.
    """
    chains: dict[str, list[int]] = {}
    for number, one in enumerate(trace.requests):
        chains.setdefault(one.session or f"alone-{number}", []).append(number)
    answers: list[Answer] = []
    started = time.monotonic()

    async def chain(numbers: Sequence[int]) -> None:
        for number in numbers:
            one, now_s = trace.requests[number], time.monotonic() - started
            at_s = one.at_s if one.think_s is None else now_s + one.think_s
            if at_s > seconds:
                return
            await asyncio.sleep(at_s - now_s)
            answers.append(await ask(url, bodies[number], one.session))

    await asyncio.gather(*map(chain, chains.values()))
    return answers


def main() -> None:
    """Send a workload, and print what came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of chat completions")
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=MOONCAKE_RATE_PER_S, help="requests a second of the trace's")
    parser.add_argument("--warm-up", type=float, default=0.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="Mooncake's conversation trace")
    options = parser.parse_args()
    made = partial(workload, options.workload, options.seconds, trace=options.trace, rate_per_s=options.rate)
    trace, before = made(options.seed), unlike(made(options.seed + 1), options.warm_up)
    ready, warming = bodies_of(trace), bodies_of(before)
    sys.stdin.readline()
    asyncio.run(send_all(options.url, before, warming, options.warm_up))
    print(len(warming), flush=True)
    sys.stdin.readline()
    used_s = time.process_time()
    answers = asyncio.run(send_all(options.url, trace, ready, options.seconds))
    told: Mapping[str, Any] = {"answers": [attrs.asdict(one) for one in answers], "cpu_s": time.process_time() - used_s}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
