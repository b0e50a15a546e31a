"""Real engines on a GPU: what each strategy is worth, what is known of the engines, and one that dies amid streams.

    python -m benchmarks.gpu_engines FOLDER OUT --vllm python --share 0.2 --kv-gb 7 --engines 4

starts so many vLLMs on one GPU, each with its part of the memory, and kvfleet in front of them. FOLDER holds a model as
on the Hugging Face Hub, with a chat template; without weights vLLM makes some up. `--mock` puts `kvfleet mock-engine`
there instead, to try this out. What is measured is written to OUT as it comes: one line of JSON for each mode and for
each step of what happens, logs in OUT/logs.

Each engine should have a GPU of its own; where one GPU serves all, NVIDIA's MPS can part it: start its daemon, and say
`--percent 25` for a quarter of it for each engine. Without it they take turns, so one engine's load slows the others.

Modes: see `MODES`. `expected_latency` without a cache in mind, with what was routed (approximate), and with what
engines tell (exact); vllm-router if `--router` says where its Python is. Rounds go on until the time is up. At the end,
in exact mode, one engine is killed amid long streams and started again, and the load goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from benchmarks.gpu_load import MODEL, WORDS, Asked, Load, again, ask, rows, sentence, summary
from benchmarks.gpu_loss import Loss, of_folder
from kvfleet.errors import TraceError
from kvfleet.trace import names
from kvfleet.trace.reader import TraceReader
from tests.real import engines as processes
from tests.real import environments
from tests.real.engines import Engine, free_port
from tests.real.environments import EngineError

BLOCK = 16
KVFLEET = str(Path(sys.executable).with_name("kvfleet"))
MODES: Mapping[str, Mapping[str, Any]] = {
    "round_robin": {"strategy": "round_robin"},
    "expected_latency, exact": {"strategy": "expected_latency", "is_told": True},
    "prefix_threshold": {"strategy": "prefix_threshold"},
    "expected_latency, approximate": {"strategy": "expected_latency"},
    "vllm-router, cache_aware": {"router": "cache_aware"},
    "expected_latency, load only": {"strategy": "expected_latency", "cache_affinity": {"enabled": False}},
    "least_requests": {"strategy": "least_requests"},
}
QUIET = {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""The last, because that sampler is compiled when it is first used."""


@attrs.define
class Lab:
    """The engines, and where what is found goes."""

    options: argparse.Namespace
    engines: list[Engine] = attrs.field(factory=list)
    extra: dict[str, Any] = attrs.field(factory=dict)
    rate_s: float = 1e-4
    began_s: float = attrs.field(factory=time.monotonic)

    def left_s(self) -> float:
        """Of the time that there is."""
        return float(self.options.seconds - (time.monotonic() - self.began_s))

    def say(self, what: str, **more: Any) -> None:
        """Write one line of what was found, and show it."""
        line = {"what": what, "at_s": round(time.monotonic() - self.began_s, 2), **more}
        with (self.options.out / "found.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")
        short = {key: value for key, value in line.items() if key != "asked"}
        sys.stderr.write(json.dumps(short)[:600] + "\n")

    # Engines ---------------------------------------------------------------------------------------------------------

    def made(self, number: int) -> Engine:
        """One engine, not started."""
        options, port = self.options, free_port_with_room()
        env = dict(QUIET)
        if options.percent:
            env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(options.percent)
        if options.mock:
            words = [
                KVFLEET,
                "mock-engine",
                "--port",
                port,
                "--model",
                MODEL,
                "--preset",
                "h100-8b",
                "--block-tokens",
                BLOCK,
            ]
            words += ["--kv-events-port", port + 1000, "--kv-replay-port", port + 2000, "--speed", options.speed]
            words += ["--cache-tokens", options.cache_tokens, "--context-tokens", 16384, "--kv-events-topic", "kv"]
            return Engine(name=f"engine-{number}", command=[str(word) for word in words], port=port, start_s=60)
        return Engine(
            name=f"engine-{number}",
            command=vllm(options, port),
            port=port,
            start_s=options.start_s,
            env=env,
            model=MODEL,
        )

    def start(self) -> None:
        """Start all engines at once, and wait until all serve."""
        self.engines = [self.made(number) for number in range(self.options.engines)]
        asyncio.run(self._start())
        self.say("started", engines=[engine.url for engine in self.engines])

    async def _start(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(engine.start) for engine in self.engines))

    def stop(self) -> None:
        """Stop all engines."""
        for engine in self.engines:
            engine.stop()

    def probe(self) -> None:
        """What a prompt's token costs, with all engines at work."""

        async def one(engine: Engine, number: int) -> Asked:
            asked, chance = Asked(0, 0.0), random.Random(f"probe-{number}-{time.time()}")
            message = {"role": "user", "content": f"{number} {sentence(chance, 4000)}"}
            await ask(engine.url, [message], 16, self.extra, asked)
            return asked

        async def rounds() -> list[Asked]:
            found = []
            for number in range(4):
                found = await asyncio.gather(*(one(engine, number) for engine in self.engines))
            return list(found)

        alone = [asyncio.run(one(self.engines[0], number)) for number in (100, 101)][-1]
        found = asyncio.run(rounds())
        self.rate_s = sum(asked.ttft_s / max(1, asked.prompt) for asked in found) / len(found)
        self.say(
            "probe",
            alone_ms=alone.ttft_s * 1000,
            together_ms=[asked.ttft_s * 1000 for asked in found],
            prompt=found[0].prompt,
            failed=[asked.failed for asked in found if asked.failed],
            token_ms=[(asked.end_s - asked.ttft_s) / 15 * 1000 for asked in found],
        )

    def load(self, **more: Any) -> Load:
        """Conversations whose prompts keep the engines busy for a share of the time if nothing is computed twice."""
        load = Load(conversations=self.options.conversations, **more)
        over_s = load.new_tokens * self.rate_s / len(self.engines) / self.options.load
        return attrs.evolve(load, over_s=over_s)

    # Gateways --------------------------------------------------------------------------------------------------------

    @contextmanager
    def gateway(self, mode: Mapping[str, Any], folder: Path) -> Iterator[Engine]:
        """A fresh gateway in front of the engines."""
        port = free_port()
        if policy := mode.get("router"):
            urls = [engine.url for engine in self.engines]
            command = [
                self.options.router,
                "-m",
                "vllm_router.launch_router",
                "--worker-urls",
                *urls,
                "--policy",
                policy,
            ]
            command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
            one = Engine(name="router", command=command, port=port, ready_path="/readiness", start_s=30)
        else:
            path = folder / "fleet.yaml"
            path.write_text(json.dumps(self.fleet(mode, folder), indent=1))  # JSON is YAML
            command = [KVFLEET, "run", str(path), "--host", "127.0.0.1", "--port", str(port)]
            one = Engine(name="gateway", command=command, port=port, ready_path="/readyz", start_s=60)
        one.start()
        try:
            yield one
        finally:
            one.stop()

    def fleet(self, mode: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """The fleet file of a mode."""
        first, *others = [engine.url for engine in self.engines]
        entry: dict[str, Any] = {
            "name": MODEL,
            "provider": "vllm",
            "endpoint": first,
            "replicas": others,
            "step_tokens": self.options.step_tokens,
            "capabilities": {"max_context_window": 16384},
        }
        if mode.get("is_told"):
            told = {"endpoint": "tcp://{host}:{port+1000}", "replay": "tcp://{host}:{port+2000}", "topic": "kv"}
            tokens = {"mode": "tokenizer", "tokenizer": str(self.options.folder)}
            if self.options.mock:
                tokens = {"mode": "engine"}
            entry |= {"kv_events": told, "prompt_blocks": {**tokens, "block_tokens": BLOCK, "deadline_ms": 500}}
        return {
            "fleet_name": "gpu",
            "models": [entry],
            "fallback": {"continue_streams": True},
            "telemetry": {"trace_store": {"path": str(folder / "traces.sqlite")}},
            **{key: value for key, value in mode.items() if key != "is_told"},
        }

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """One for a mode's fleet file and traces, in OUT."""
        path = self.options.out / "modes" / name.replace(" ", "-").replace(",", "")
        path.mkdir(parents=True, exist_ok=True)
        yield path

    def measure(self, name: str, number: int) -> None:
        """One mode, once: some conversations that do not count, then those that do."""
        mode, salt = MODES[name], f"{number} {name}"
        with self.folder(f"{number}-{name}") as folder, self.gateway(mode, Path(folder)) as one:
            time.sleep(1.5)  # its first look at the engines
            warm = Load(conversations=12, turns=2, over_s=2.0, shared=300, first=900, more=200, answer=16, think_s=0.2)
            asyncio.run(warm.run(one.url, 1000 + number, f"warm {salt}", self.extra))
            load = self.load()
            found = asyncio.run(load.run(one.url, number, salt, self.extra))
            if "router" not in mode:
                time.sleep(1.0)  # the store writes a moment later
                note_expected(Path(folder) / "traces.sqlite", found)
            self.say("mode", mode=name, round=number, over_s=load.over_s, **summary(found), asked=rows(found))

    def lose_one(self) -> None:
        """Kill an engine amid long streams, start it again, and go on asking all the while."""
        with self.folder("lost") as folder, self.gateway(MODES["expected_latency, exact"], folder) as one:
            time.sleep(1.5)
            loss = Loss(
                url=one.url,
                victim=self.engines[0],
                load=attrs.evolve(self.load(), over_s=self.load().over_s * 1.5),
                extra=self.extra,
                say=self.say,
                noted=of_folder(note_expected, folder),
                left_s=self.left_s,
            )
            try:
                asyncio.run(loss.run())
            finally:
                self.engines[0] = loss.again or self.engines[0]


def vllm(options: argparse.Namespace, port: int) -> list[str]:
    """The command of one vLLM."""
    told = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv"}
    told |= {"endpoint": f"tcp://*:{port + 1000}", "replay_endpoint": f"tcp://*:{port + 2000}"}
    graphs = {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 48, 64],
    }
    has_weights = any(options.folder.glob("*.safetensors"))
    words = [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", options.folder]
    words += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", port, "--dtype", "bfloat16"]
    words += ["--max-model-len", 16384, "--gpu-memory-utilization", options.share, "--max-num-seqs", 64]
    words += ["--block-size", BLOCK, "--max-num-batched-tokens", options.step_tokens, "--generation-config", "vllm"]
    words += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    words += ["--kv-cache-memory-bytes", int(options.kv_gb * 1e9), "--kv-events-config", json.dumps(told)]
    words += ["--compilation-config", json.dumps(graphs)]  # starts in a third of the time that compiling takes
    words += [] if has_weights else ["--load-format", "dummy"]
    return [str(word) for word in words]


def free_port_with_room() -> int:
    """A free port; those 1000 and 2000 above are there as well."""
    while (port := free_port()) > 60_000:
        pass
    return port


def note_expected(store: Path, asked: Sequence[Asked]) -> None:
    """What the traces say was expected of the replicas that served."""
    with TraceReader(store) as reader:
        for one in asked:
            with suppress(TraceError):
                trace = reader.get(one.request)
                served = str(trace.route.attributes.get(names.REPLICA_SERVED))
                one.served = served
                one.expected = _valued(trace, "kvfleet.affinity.prefix", names.SCORE_VALUES, served)
                one.expected_s = _valued(trace, "kvfleet.select", names.TERM_PREFIX + "first_token_s", served)


def _valued(trace: Any, stage: str, name: str, served: str) -> float | None:
    for span in trace.stages:
        if span.name.startswith(stage) and name in span.attributes:
            found = dict(zip(span.attributes[names.SCORED], span.attributes[name], strict=True)).get(served)
            return None if found is None else float(found)
    return None


def table(path: Path) -> Iterator[str]:
    """The modes as a Markdown table, rounds together."""
    keys = ("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "e2e_mean_s")
    yield "| mode | requests | mean | p50 | p90 | p99 | end | cached | tokens off | TTFT off, mean | median |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for mode in MODES:
        asked = [again(row) for line in lines if line.get("mode") == mode for row in line.get("asked", ())]
        if not asked:
            continue
        found = summary(asked)
        times = " | ".join(f"{found.get(key, 0) * 1000:.0f}" for key in keys)
        off = [found.get("off_tokens"), *(found.get(k, 0) * 1e3 or None for k in ("off_abs_mean_s", "off_abs_p50_s"))]
        said = " | ".join("-" if value is None else f"{value:.1f}" for value in off)
        count = f"{len(asked)} ({found['failed']:.0f} failed)"
        yield f"| {mode} | {count} | {times} | {found.get('cached', 0):.1%} | {said} |"


def answers_of_words(options: argparse.Namespace) -> dict[str, Any]:
    """Keeps a model without weights to words, so that each token is a piece of text."""
    if options.mock:
        return {}
    from tokenizers import Tokenizer  # noqa: PLC0415 - only with real engines

    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    found = [tokenizer.encode(f" {word}", add_special_tokens=False).ids for word in WORDS]
    return {"allowed_token_ids": sorted({ids[0] for ids in found if len(ids) == 1})}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=480.0, help="in all")
    parser.add_argument("--start-s", type=float, default=240.0, help="longest start of an engine")
    parser.add_argument("--vllm", default=sys.executable, help="Python of an environment with vLLM")
    parser.add_argument("--router", default="", help="Python of an environment with vllm-router")
    parser.add_argument("--share", type=float, default=0.2, help="of the GPU's memory, for each engine")
    parser.add_argument("--kv-gb", type=float, default=7.0, help="of each engine's KV cache")
    parser.add_argument("--percent", type=int, default=0, help="of the GPU for each engine, where MPS runs")
    parser.add_argument("--step-tokens", type=int, default=2048)
    parser.add_argument("--conversations", type=int, default=56)
    parser.add_argument("--load", type=float, default=0.35, help="of the engines' time, if nothing is computed twice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--lose-s", type=float, default=90.0, help="what killing an engine and its return take")
    parser.add_argument("--mock", action="store_true")
    parser.add_argument("--speed", type=float, default=1.0, help="of a mock engine")
    parser.add_argument("--cache-tokens", type=int, default=60_000, help="of a mock engine")
    options = parser.parse_args()
    options.folder, options.out = options.folder.absolute(), options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    processes.LOGS = environments.LOGS = options.out / "logs"
    lab = Lab(options, extra=answers_of_words(options))
    try:
        run(lab)
    except EngineError as error:
        lab.say("failed", error=str(error)[-3000:])
        raise SystemExit(str(error)) from error
    finally:
        lab.stop()
        with suppress(OSError):
            sys.stdout.write("\n".join(table(options.out / "found.jsonl")) + "\n")


def run(lab: Lab) -> None:
    """All of it: one round of all modes, the engine that dies, further rounds as long as there is time."""
    lab.start()
    lab.probe()
    modes = [name for name in lab.options.modes if lab.options.router or "router" not in MODES[name]]
    longest_s = 0.0
    for number in range(lab.options.rounds):
        for name in modes:
            began_s = time.monotonic()
            if lab.left_s() < longest_s + (lab.options.lose_s or 5):
                lab.say("no time is left", mode=name, round=number)
                break
            try:
                lab.measure(name, number)
            except (EngineError, TraceError, OSError, ValueError) as error:
                lab.say("failed", mode=name, error=repr(error)[-2000:])
            longest_s = max(longest_s, time.monotonic() - began_s)
    if lab.options.lose_s:
        lab.lose_one()


if __name__ == "__main__":
    main()
