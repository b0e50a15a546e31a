"""Real engines: what knowing their caches is worth, with two vLLMs on the CPU.

Run ``python -m benchmarks.real_engines`` in the repository's root, with the test group installed: `tests/real` makes
the engines' environment and a tiny model on the spot (2 GB, some minutes). Each mode gets the same kind of load on the
same engines, with words of its own, so that no mode finds what another has left in the caches: conversations of
several turns that take turns among each other, each turn repeating the whole conversation before it.

Modes: `round_robin`; `expected_latency` that knows nothing of caches (load only), that knows what was routed
(approximate), and that is told by KV events (exact). The table has the time to the first token (TTFT) as a streaming
client sees it, the share of prompt tokens that the engines had cached (they say so themselves), and by how much the
expectations were wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import httpx

from kvfleet.errors import TraceError
from kvfleet.trace import names
from kvfleet.trace.reader import TraceReader
from tests.real import engines
from tests.real.engines import Engine, free_port
from tests.real.environments import model as tiny
from tests.real.gateways import gateway, model

BLOCK = 32
MODES: Mapping[str, Mapping[str, Any]] = {
    "round_robin": {"strategy": "round_robin"},
    "load only": {"strategy": "expected_latency", "cache_affinity": {"enabled": False}},
    "approximate": {"strategy": "expected_latency"},
    "exact": {"strategy": "expected_latency", "is_told": True},
}
WORDS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "hello",
    "from",
    "tiny",
    "model",
)


@attrs.define
class Turn:
    """What one request gave: seconds to the first token, prompt tokens, those cached, and those expected, if known."""

    ttft_s: float
    prompt: int
    cached: int
    expected: float | None = None


@attrs.define
class Load:
    """Conversations that take turns, a few requests at a time."""

    conversations: int
    turns: int
    first_words: int
    more_words: int
    together: int

    def run(self, url: str, store: Path, seed: int) -> list[Turn]:
        """Send it all; each turn of a conversation comes after its last one."""
        rng = random.Random(seed)
        talks: list[list[dict[str, str]]] = [
            [{"role": "user", "content": _words(rng, self.first_words)}] for _ in range(self.conversations)
        ]
        found: list[Turn] = []
        with ThreadPoolExecutor(self.together) as pool, httpx.Client(trust_env=False, timeout=300) as client:
            for number in range(self.turns):
                order = rng.sample(range(self.conversations), self.conversations)
                asked = list(pool.map(lambda i: _ask(client, url, talks[i]), order))
                for i, (_, answer, _) in zip(order, asked, strict=True):
                    talks[i] += [{"role": "assistant", "content": answer}]
                    talks[i] += [{"role": "user", "content": _words(rng, self.more_words)}]
                if number:  # the first turn is new to everybody
                    time.sleep(1.0)  # the store writes a moment later
                    found += [attrs.evolve(turn, expected=_expected(store, request)) for turn, _, request in asked]
        return found


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def _ask(client: httpx.Client, url: str, messages: Sequence[Mapping[str, str]]) -> tuple[Turn, str, str]:
    """One streamed request: the turn, the answer's text, the request's identifier."""
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    began_s, first_s, text, usage = time.perf_counter(), 0.0, "", {}
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for data in _events(answer):
            usage = data.get("usage") or usage
            for choice in data["choices"]:
                piece = choice["delta"].get("content") or ""
                if piece and not first_s:
                    first_s = time.perf_counter() - began_s
                text += piece
        request = answer.headers["x-request-id"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Turn(first_s, usage["prompt_tokens"], cached), text, request


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def _expected(store: Path, request: str) -> float | None:
    """What was expected to be cached where the request was sent."""
    try:
        with TraceReader(store) as reader:
            trace = reader.get(request)
    except TraceError:
        return None
    served = trace.route.attributes.get(names.REPLICA_SERVED)
    for span in trace.stages:
        if span.name == "kvfleet.affinity.prefix":
            ids, values = span.attributes[names.SCORED], span.attributes[names.SCORE_VALUES]
            return float(dict(zip(ids, values, strict=True)).get(served, 0.0))  # type: ignore[arg-type]
    return None


def fleet(first: Engine, others: Sequence[Engine], mode: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's entry, and the rest of the fleet file."""
    rest = {key: value for key, value in mode.items() if key != "is_told"}
    entry = model(first, "vllm", replicas=[engine.url for engine in others])
    if mode.get("is_told"):
        entry["kv_events"] = {
            "endpoint": "tcp://{host}:{port+1000}",
            "replay": "tcp://{host}:{port+2000}",
            "topic": "kv",
        }
        entry["prompt_blocks"] = {"mode": "tokenizer", "tokenizer": str(tiny() / "hf"), "block_tokens": BLOCK}
    return entry, rest


def measure(options: argparse.Namespace) -> dict[str, list[Turn]]:
    """All modes, round by round, on the same engines."""
    load = Load(options.conversations, options.turns, options.first_words, 40, options.together)
    ports = [free_port_with_room() for _ in range(options.engines)]
    running = [engines.vllm(events=(port + 1000, port + 2000), blocks=options.blocks, port=port) for port in ports]
    found: dict[str, list[Turn]] = {name: [] for name in MODES}
    try:
        for engine in running:
            engine.start()
        for number in range(options.rounds):
            for place, (name, mode) in enumerate(MODES.items()):
                entry, rest = fleet(running[0], running[1:], mode)
                with tempfile.TemporaryDirectory() as folder:
                    one = gateway([entry], Path(folder), **rest)
                    one.start()
                    try:
                        time.sleep(2.0)  # the first look at the engines
                        turns = load.run(one.url, Path(folder) / "traces.sqlite", 100 * number + place)
                    finally:
                        one.stop()
                found[name] += turns
                print(f"round {number + 1}, {name}: {_line(turns)}", file=sys.stderr)
    finally:
        for engine in running:
            engine.stop()
    return found


def free_port_with_room() -> int:
    """A free port whose number plus 2000 is one as well."""
    while (port := free_port()) > 60_000:
        pass
    return port


def _line(turns: Sequence[Turn]) -> str:
    times = sorted(turn.ttft_s for turn in turns)
    share = sum(turn.cached for turn in turns) / sum(turn.prompt for turn in turns)
    wrong = [abs(turn.expected - turn.cached) for turn in turns if turn.expected is not None]
    p90 = statistics.quantiles(times, n=10)[-1]
    said = f"{statistics.mean(wrong):.1f}" if wrong else "-"
    return f"| {statistics.mean(times):.3f} | {p90:.3f} | {share:.0%} | {said} |"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=512, help="of 32 tokens, in each engine's KV cache")
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--first-words", type=int, default=700)
    parser.add_argument("--together", type=int, default=2, help="requests at a time")
    parser.add_argument("--rounds", type=int, default=2)
    found = measure(parser.parse_args())
    print("| mode | TTFT mean, s | TTFT p90, s | cached | expectation off by, tokens |\n|---|---|---|---|---|")
    for name, turns in found.items():
        print(f"| {name} {_line(turns)}")


if __name__ == "__main__":
    main()
