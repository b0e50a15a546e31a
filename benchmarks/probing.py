"""Measures a running engine for `benchmarks/calibration.py`: prompts alone, batches, long contexts, and a mixed load.

Prompts are token numbers, so that their length and what they share are exact. Nothing else should use the engine.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import attrs
import httpx
from numbering import Numbering

VOCABULARY = range(100, 900)


@attrs.define
class Timed:
    """One request: when it was sent, its first token, its last, and what the engine said of it. Times in seconds."""

    sent_s: float
    prompt: list[int] = attrs.field(repr=False)
    output: int
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0
    cached: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time for each further token."""
        return (self.last_s - self.first_s) / max(1, self.tokens - 1)


@attrs.define
class Prober:
    """Asks one engine."""

    client: httpx.AsyncClient
    url: str
    model: str
    chance: random.Random = attrs.field(factory=lambda: random.Random(1))

    def prompt(self, tokens: int) -> list[int]:
        """A prompt that nobody has sent before."""
        return [self.chance.choice(VOCABULARY) for _ in range(tokens)]

    async def ask(self, prompt: list[int], output: int) -> Timed:
        """One request, token by token."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        timed = Timed(time.perf_counter(), prompt, output)
        async with self.client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in _lines(response):
                self._take(timed, line)
        return timed

    def _take(self, timed: Timed, line: str) -> None:
        if not line.startswith("data: {"):
            return
        now_s = time.perf_counter()
        data = json.loads(line[6:])
        usage = data.get("usage")
        if usage:
            timed.tokens = usage["completion_tokens"]
            timed.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if data.get("choices"):
            timed.first_s = timed.first_s or now_s
            timed.last_s = now_s

    async def together(self, prompts: Sequence[list[int]], output: int) -> list[Timed]:
        """Several requests at once."""
        return list(await asyncio.gather(*[self.ask(prompt, output) for prompt in prompts]))


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """A stream's lines. A model may say what is the end of a line elsewhere (U+0085, say), and no end of an event's."""
    kept = b""
    async for piece in response.aiter_bytes():
        *whole, kept = (kept + piece).split(b"\n")
        for line in whole:
            yield line.decode()


async def measure(
    url: str,
    model: str,
    *,
    lengths: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    block_tokens: int,
    mixed: int = 36,
    rate_per_s: float = 2.0,
) -> Any:
    """Everything `calibration.py` needs to know of an engine, as plain data."""
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        prober = Prober(client, url, model)
        await prober.ask(prober.prompt(64), 16)  # it may compile something first
        return {
            "model": model,
            "prefill": await _prefill(prober, lengths, rounds),
            "decode": await _decode(prober, batches, rounds),
            "mixed": await _mixed(prober, max(lengths), Numbering(block_tokens), mixed, rate_per_s),
        }


async def _prefill(prober: Prober, lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Time to the first token of prompts alone, new ones."""
    found = []
    for length in lengths:
        times = [(await prober.ask(prober.prompt(length), 2)).ttft_s for _ in range(rounds)]
        found.append({"tokens": length, "ttft_s": _typical(times)})
        print(f"prompt of {length} tokens: {found[-1]['ttft_s'] * 1000:.1f} ms")
    return found


async def _decode(prober: Prober, batches: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Time of a step with so many requests of such a length, once all their prompts have been read."""
    found = []
    for batch in batches:
        for length in (32, 1024):
            times = []
            for _ in range(rounds):
                answers = await prober.together([prober.prompt(length) for _ in range(batch)], 48)
                last_start = max(timed.first_s for timed in answers)
                first_end = min(timed.last_s for timed in answers)
                shortest = min(answers, key=lambda timed: timed.last_s - timed.first_s)
                if first_end > last_start:
                    times.append(shortest.tpot_s)
            found.append({"batch": batch, "context": length + 24, "tpot_s": _typical(times)})
            print(f"{batch} requests of {length} tokens: {found[-1]['tpot_s'] * 1000:.2f} ms a token")
    return found


async def _mixed(
    prober: Prober, longest: int, numbering: Numbering, requests: int, rate_per_s: float
) -> list[dict[str, Any]]:
    """Conversations that grow, at random moments."""
    chance, started = prober.chance, time.perf_counter()
    sessions = [prober.prompt(chance.randint(64, longest // 4)) for _ in range(6)]
    tasks: list[asyncio.Task[Timed]] = []
    for _ in range(requests):
        await asyncio.sleep(chance.expovariate(rate_per_s))
        session = chance.choice(sessions)
        if len(session) < longest // 2:
            session.extend(prober.prompt(chance.randint(16, 160)))
        tasks.append(asyncio.create_task(prober.ask(list(session), chance.randint(4, 48))))
    answers = await asyncio.gather(*tasks)
    return [
        {
            "at_s": timed.sent_s - started,
            "prompt_tokens": len(timed.prompt),
            "blocks": numbering.blocks(timed.prompt),
            "output": timed.output,
            "cached": timed.cached,
            "ttft_s": timed.ttft_s,
            "tpot_s": timed.tpot_s,
        }
        for timed in answers
    ]


def _typical(times: Sequence[float]) -> float:
    """The lower quartile: on a machine that others use as well, what is slower was waiting for them."""
    if len(times) < 4:
        return min(times)
    return statistics.quantiles(times, n=4)[0]
