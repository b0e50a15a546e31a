"""Does the gateway stay as it is: memory, files and latency of a running gateway over minutes of mixed load.

    python benchmarks/soak.py [--seconds 600] [--rate 50] [--json]

A mock engine (`kvfleet mock-engine`), the gateway (`kvfleet run`) and this load are processes of their own. Of a
hundred requests, 55 are whole answers, 30 streams read to their end, 10 streams that are given up after the first
event, and 5 are wrong (no such model). Prompts come from 400 conversations, so that what the gateway may learn of them
is learned in the first third, which is the warm-up. Then a line is fitted to the gateway's resident memory; the run
fails if that grows by more than 2 % in ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import httpx

CONVERSATIONS = 400
SAMPLE_S = 10.0
MOST_GROWTH = 0.02
"""Share of its memory by which a gateway may grow in ten minutes."""
FLEET = """\
fleet_name: soak
models:
  - name: llama
    provider: vllm
    endpoint: {engine}
    cost_per_1k_input_tokens: 0.001
    cost_per_1k_output_tokens: 0.002
strategy: expected_latency
budget: {{enabled: true, monthly_budget_usd: 1000000, per_request_max_usd: null}}
overload: {{max_in_flight_per_replica: 64, max_queue: 64}}
gateway: {{port: {port}}}
"""


@attrs.frozen
class Sample:
    """The gateway at one moment."""

    at_s: float
    rss_mb: float
    files: int
    threads: int
    served: int


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def process(*command: str, env: dict[str, str]) -> Iterator[int]:
    """A process that ends with the block; its identifier."""
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
        try:
            yield one.pid
        finally:
            one.send_signal(signal.SIGINT)
            try:
                one.wait(15)
            except subprocess.TimeoutExpired:
                one.kill()


def look(pid: int, since_s: float, served: int) -> Sample:
    """Read a process's figures."""
    root = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (root / "status").read_text().splitlines() if ":" in line)
    rss_mb = int(status["VmRSS"].split()[0]) / 1024
    files = sum(1 for _ in (root / "fd").iterdir())
    return Sample(time.monotonic() - since_s, rss_mb, files, int(status["Threads"]), served)


def prompt_of(conversation: int, turn: int) -> list[dict[str, str]]:
    """The messages of a conversation's turn: the same beginning each time."""
    chance = random.Random(conversation)
    system = " ".join(f"w{chance.randrange(5000)}" for _ in range(150))
    return [{"role": "system", "content": system}, {"role": "user", "content": f"Question {turn % 5}?"}]


async def one_request(client: httpx.AsyncClient, chance: random.Random, ended: Counter[str], number: int) -> None:
    """One request of the mix."""
    kind = chance.choices(("whole", "stream", "left", "wrong"), (55, 30, 10, 5))[0]
    body: dict[str, Any] = {"messages": prompt_of(chance.randrange(CONVERSATIONS), number), "max_tokens": 16}
    if kind == "wrong":
        body["model"] = "nobody"
    try:
        if kind in ("whole", "wrong"):
            answer = await client.post("/v1/chat/completions", json=body)
            ended[f"{kind} {answer.status_code}"] += 1
            return
        async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
            last = ""
            async for line in stream.aiter_lines():
                last = line or last
                if kind == "left":
                    break
        ended[f"{kind} {stream.status_code}{' whole' if last == 'data: [DONE]' else ''}"] += 1
    except httpx.HTTPError as error:
        ended[f"{kind} {type(error).__name__}"] += 1


async def load(url: str, pid: int, rate: float, seconds: float) -> tuple[list[Sample], Counter[str]]:
    """Send requests at a rate, and look at the gateway now and then."""
    chance, ended, samples = random.Random(1), Counter[str](), list[Sample]()
    tasks: set[asyncio.Task[None]] = set()
    began_s = at_s = next_s = time.monotonic()
    number = 0
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=128)) as client:
        while at_s < began_s + seconds:
            await asyncio.sleep(max(at_s - time.monotonic(), 0))
            number += 1
            task = asyncio.create_task(one_request(client, chance, ended, number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            at_s += 1 / rate
            if time.monotonic() >= next_s:
                samples.append(look(pid, began_s, ended.total()))
                next_s += SAMPLE_S
        await asyncio.gather(*tasks)
    await asyncio.sleep(2)
    samples.append(look(pid, began_s, ended.total()))
    return samples, ended


def growth_mb_per_10_min(samples: Sequence[Sample], seconds: float) -> float:
    """The slope of a line through the memory after the warm-up."""
    settled = [one for one in samples if one.at_s > seconds / 3]
    slope, _ = statistics.linear_regression([one.at_s for one in settled], [one.rss_mb for one in settled])
    return slope * 600


async def wait_for(url: str, path: str) -> None:
    """Wait until something answers there."""
    async with asyncio.timeout(60), httpx.AsyncClient() as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(url + path)).status_code == 200:
                    return
            await asyncio.sleep(0.2)


async def run(rate: float, seconds: float, place: Path) -> tuple[list[Sample], Counter[str]]:
    """Start everything, and load it."""
    engine_port, port = free_port(), free_port()
    engine, url = f"http://127.0.0.1:{engine_port}", f"http://127.0.0.1:{port}"
    file = place / "fleet.yaml"
    file.write_text(FLEET.format(engine=engine, port=port))
    env = {**os.environ, "XDG_STATE_HOME": str(place), "XDG_DATA_HOME": str(place)}
    kvfleet = (sys.executable, "-c", "from kvfleet.cli.main import main; main()")
    with process(*kvfleet, "mock-engine", "--port", str(engine_port), "--model", "llama", "--speed", "20", env=env):
        await wait_for(engine, "/health")
        with process(*kvfleet, "run", str(file), env=env) as pid:
            await wait_for(url, "/readyz")
            return await load(url, pid, rate, seconds)


def main() -> None:
    """Soak, and print what became of it; exit status 1 if the gateway grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        samples, ended = asyncio.run(run(options.rate, options.seconds, Path(place)))
    growth = growth_mb_per_10_min(samples, options.seconds)
    settled = [one for one in samples if one.at_s > options.seconds / 3]
    base = settled[0]
    if options.json:
        found = [attrs.asdict(one) for one in samples]
        print(json.dumps({"samples": found, "growth_mb_per_10_min": growth, "ended": dict(ended)}, indent=1))
    else:
        for one in samples:
            figures = f"{one.rss_mb:7.1f} MB  {one.files:4d} files  {one.threads} threads  {one.served} served"
            print(f"{one.at_s:6.0f} s  {figures}")
        print(f"after the warm-up: {growth:+.2f} MB in ten minutes, from {base.rss_mb:.1f} MB")
        print("  ".join(f"{what}: {count}" for what, count in sorted(ended.items())))
    if growth > MOST_GROWTH * base.rss_mb:
        sys.exit(1)


if __name__ == "__main__":
    main()
