"""The load of ``gpu_engines.py``: conversations that begin with the same system prompt, and a client that times them.

What a mode is asked is made of a seed alone, so that every mode gets the same conversations at the same moments. Only
the first words differ, so that none finds what another has left in the engines' caches.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import attrs
import orjson

MODEL = "model"
PATIENCE_S = 120.0
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand"
    " part place case week company system program question work government number night point home water room mother"
    " area money story fact month lot right study book eye job word business issue side kind head house service friend"
    " father power hour game line end member law car city community name president team minute idea body"
)
WORDS = tuple(_TEXT.split())


@attrs.define
class Asked:
    """One request and what came of it; times in seconds, `at_s` since the load began.

    Attributes:
        request: The gateway's identifier of it.
        turn: Which of its conversation.
        ttft_s, end_s: From its sending to the first and the last piece of text.
        words, tokens: Pieces of text that came; tokens of the answer, as the engine says.
        reason: Why its answer ended; empty if it did not end as it should.
        failed: What went wrong, in a few words.
        continued: Whether another replica went on with its stream.
        cached, expected, expected_s: Tokens that the engine had cached; those that were expected, and the seconds to
            the first token, as the gateway's trace says.
    """

    turn: int
    at_s: float
    request: str = ""
    ttft_s: float = 0.0
    end_s: float = 0.0
    words: int = 0
    tokens: int = 0
    prompt: int = 0
    cached: int = 0
    reason: str = ""
    failed: str = ""
    continued: bool = False
    expected: float | None = None
    expected_s: float | None = None
    served: str = ""


@attrs.frozen(kw_only=True)
class Load:
    """Conversations that begin at random moments; each turn repeats all before it.

    Attributes:
        conversations: How many.
        turns: Of each.
        over_s: All have begun by then, unless `until_s` ends it before.
        shared, first, more: Words of the system prompt; of a first question, on average, and of each further one.
        answer: Tokens of an answer.
        think_s: Between an answer and the next question, on average.
    """

    conversations: int = 48
    turns: int = 4
    over_s: float = 15.0
    shared: int = 1000
    first: int = 2500
    more: int = 350
    answer: int = 48
    think_s: float = 1.0

    @property
    def new_tokens(self) -> int:
        """Those that have to be computed at least once, about."""
        return self.shared + self.conversations * (self.first + (self.turns - 1) * (self.more + self.answer))

    async def run(self, url: str, seed: int, salt: str, extra: Mapping[str, Any], until_s: float = 1e9) -> list[Asked]:
        """Send it all, or what begins within `until_s`."""
        began_s, found = time.perf_counter(), list[Asked]()

        async def converse(number: int) -> None:
            chance = random.Random(f"{seed}-{number}")
            start_s = chance.uniform(0, self.over_s)
            messages = [{"role": "system", "content": f"{salt} {sentence(random.Random(seed), self.shared)}"}]
            await asyncio.sleep(start_s)
            for turn in range(self.turns):
                now_s = time.perf_counter() - began_s
                if now_s > until_s:
                    return
                length = self.more if turn else self.first
                messages.append({"role": "user", "content": sentence(chance, round(length * chance.uniform(0.5, 1.5)))})
                asked = Asked(turn, now_s)
                found.append(asked)
                await ask(url, messages, self.answer, extra, asked)
                messages.append({"role": "assistant", "content": sentence(chance, self.answer)})
                await asyncio.sleep(chance.expovariate(1 / self.think_s))

        await asyncio.gather(*(converse(number) for number in range(self.conversations)))
        return found


def sentence(chance: random.Random, words: int) -> str:
    """So many words, most of which are one token."""
    return " ".join(chance.choices(WORDS, k=words))


async def ask(
    url: str, messages: Sequence[Mapping[str, str]], answer: int, extra: Mapping[str, Any], asked: Asked
) -> None:
    """Send one chat, and note in `asked` what comes."""
    body = {"model": MODEL, "messages": messages, "max_tokens": answer, "temperature": 0, "ignore_eos": True, **extra}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with asyncio.timeout(PATIENCE_S):
            await _ask(f"{url}/v1/chat/completions", orjson.dumps(body), asked)
    except (OSError, EOFError, ValueError, asyncio.IncompleteReadError) as error:
        asked.failed = f"{type(error).__name__}: {error}"[:200]
    if not asked.reason and not asked.failed:
        asked.failed = "no end"


async def _ask(url: str, payload: bytes, asked: Asked) -> None:
    where, sent_s = urlsplit(url), time.perf_counter()
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 20)
    try:
        lines = [f"POST {where.path} HTTP/1.1", f"host: {where.netloc}", "content-type: application/json"]
        lines += [f"content-length: {len(payload)}", "connection: close", "", ""]
        writer.write("\r\n".join(lines).encode() + payload)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        asked.request = headers.get("x-request-id", "")
        if (status := int(head.split(" ", 2)[1])) != 200:
            asked.failed = f"{status}"
            return
        async for event in _events(reader, is_chunked=headers.get("transfer-encoding") == "chunked"):
            _note(asked, event, time.perf_counter() - sent_s)
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    kept = b""
    async for piece in _pieces(reader, is_chunked=is_chunked):
        *whole, kept = (kept + piece.replace(b"\r\n", b"\n")).split(b"\n\n")
        for event in whole:
            yield event.strip()


async def _pieces(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    while is_chunked and (size := int((await reader.readline()).split(b";")[0], 16)):
        yield (await reader.readexactly(size + 2))[:-2]
    while not is_chunked and (piece := await reader.read(65_536)):
        yield piece


def _note(asked: Asked, event: bytes, at_s: float) -> None:
    for line in event.split(b"\n"):
        if line.startswith(b": kvfleet: gone on"):
            asked.continued = True
        if not line.startswith(b"data:") or line.endswith(b"[DONE]"):
            continue
        chunk = orjson.loads(line[5:])
        if "error" in chunk:
            asked.failed = json.dumps(chunk["error"])[:200]
        for choice in chunk.get("choices", ()):
            if choice.get("delta", {}).get("content"):
                asked.ttft_s = asked.ttft_s or at_s
                asked.end_s = at_s
                asked.words += 1
            asked.reason = choice.get("finish_reason") or asked.reason
        if usage := chunk.get("usage"):
            asked.prompt, asked.tokens = usage["prompt_tokens"], usage["completion_tokens"]
            asked.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


# Figures -------------------------------------------------------------------------------------------------------------


def summary(asked: Sequence[Asked]) -> dict[str, float]:
    """What a mode's requests took: seconds, shares, and by how much the expectations were wrong."""
    good = [one for one in asked if not one.failed and one.ttft_s]
    if len(good) < 2:
        return {"requests": len(asked), "failed": len(asked) - len(good)}
    times = sorted(one.ttft_s for one in good)
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    found = {
        "requests": len(asked),
        "failed": len(asked) - len(good),
        "ttft_mean_s": statistics.fmean(times),
        "ttft_p50_s": cuts[49],
        "ttft_p90_s": cuts[89],
        "ttft_p99_s": cuts[98],
        "e2e_mean_s": statistics.fmean(one.end_s for one in good),
        "cached": sum(one.cached for one in good) / max(1, sum(one.prompt for one in good)),
        "prompt_tokens": statistics.fmean(one.prompt for one in good),
    }
    tokens = [abs(one.expected - one.cached) for one in good if one.expected is not None]
    seconds = [one.expected_s - one.ttft_s for one in good if one.expected_s is not None]
    if tokens:
        found["off_tokens"] = statistics.fmean(tokens)
        found["exactly_right"] = sum(wrong < 1 for wrong in tokens) / len(tokens)
    if seconds:
        found["off_mean_s"] = statistics.fmean(seconds)
        found["off_abs_mean_s"] = statistics.fmean(map(abs, seconds))
        found["off_abs_p50_s"] = statistics.median(map(abs, seconds))
    return found


def rows(asked: Sequence[Asked]) -> list[list[Any]]:
    """Each request as a row, times in milliseconds."""
    return [
        [
            *(
                a.turn,
                round(a.at_s, 2),
                round(a.ttft_s * 1e3, 1),
                round(a.end_s * 1e3, 1),
                a.prompt,
                a.cached,
                a.tokens,
            ),
            *(a.expected, None if a.expected_s is None else round(a.expected_s * 1e3, 1)),
            *(a.served[-5:], a.continued, a.failed),
        ]
        for a in asked
    ]


def again(row: Sequence[Any]) -> Asked:
    """What `rows` made a row of."""
    turn, at_s, ttft_ms, end_ms, prompt, cached, tokens, expected, expected_ms, served, continued, failed = row
    return Asked(
        turn,
        at_s,
        ttft_s=ttft_ms / 1e3,
        end_s=end_ms / 1e3,
        tokens=tokens,
        prompt=prompt,
        cached=cached,
        failed=failed,
        continued=continued,
        expected=expected,
        expected_s=None if expected_ms is None else expected_ms / 1e3,
        served=served,
    )
