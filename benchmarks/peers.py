"""kvfleet beside other gateways, over HTTP, in front of the same mock engines: latency, cache, balance and CPU.

Run ``python benchmarks/peers.py --peers-dir DIR --install --trace mooncake_conversation.jsonl``. One process of
``kvfleet mock-engine`` is eight engines; the client (``peers_load.py``) is another; gateways (``peers_gateways.py``)
run one at a time and take turns, each fresh and with empty caches for each workload; ``--warm-up`` first lets it serve
requests of the same kind that share nothing with those that count. Four workloads:

- ``mooncake-1``, ``mooncake-2``: whole conversations out of Mooncake's trace, those that begin in the first half of its
  hour and those that begin in the second, each squeezed into the run; sent at their times;
- ``agents``: sessions of agents in a closed loop, named by the header X-Session-ID;
- ``bursts``: one system prompt for everybody, a trickle of questions, and 24 at once every six seconds.

Lengths are an eighth of the real ones, and engines slow enough (170 ms for 256 tokens of a prompt, 40 ms for a token of
an answer) that what client and gateway cost does not decide. Read the ratios, in parentheses: each is to the best in
the same column of those that are not kvfleet and answered everything. Cached shares and requests of each engine are the
engines' own counts. CPU is that of the gateway's whole tree of processes, which includes what it does beside requests
while the load lasts. The last row is what no gateway could be below (`kvfleet.replay.least`): every prompt begun at
once on an idle engine that holds all that was asked before.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from gateway import free_ports, pinned
from peers_gateways import GATEWAYS, KVFLEET, Gateway, NotHereError, Place, install, version_of
from peers_load import MODEL, MOONCAKE_RATE_PER_S, WORKLOADS, body, scaled, words, workload

from kvfleet.config.simulation import EngineOptions
from kvfleet.replay.fleet import spec_of
from kvfleet.replay.least import least_ttft_s

ENGINES = 8
ENGINE_OPTIONS = {
    "prefill-tokens-per-s": 1500,
    "decode-ms-per-token": 40,
    "token-budget": 256,
    "cache-tokens": 16_384,
    "context-tokens": 32_768,
    "answer-tokens": 24,
    "max-queue": 1000,
}
_TICKS = os.sysconf("SC_CLK_TCK")
_WARM_UP = 4
_UNLIKE = 1 << 40  # a text that no workload has
_START_S = 120.0
_COUNTS = {
    "requests": "vllm:request_success_total",
    "read": "vllm:prompt_tokens_total",
    "cached": "vllm:prompt_tokens_cached_total",
}


# Processes -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(command: Sequence[str], folder: Path, core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its children, for the length of a block; its words go to a file."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*pinned(core), *command], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        finally:
            for kind in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, kind)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)


@contextlib.contextmanager
def client(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The client, which gets its requests ready and then waits for a word; ended at the end of the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def warm_up(sender: subprocess.Popen[str]) -> None:
    """Let the client warm the gateway up, and wait for that."""
    if sender.stdin and sender.stdout:
        sender.stdin.write("warm up\n")
        sender.stdin.flush()
        sender.stdout.readline()


def tree_cpu_s(root: int) -> float:
    """CPU seconds of a process and of all below it, those that have ended included."""
    children: dict[int, list[int]] = {}
    spent: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
                spent[int(entry.name)] = sum(map(int, fields[11:15])) / _TICKS
    found, waiting = 0.0, [root]
    while waiting:
        pid = waiting.pop()
        found += spent.get(pid, 0.0)
        waiting += children.get(pid, [])
    return found


# Engines -------------------------------------------------------------------------------------------------------------


def post(url: str, payload: bytes) -> bool:
    """Whether a request is answered with 200."""
    request = urllib.request.Request(url, payload, {"content-type": "application/json"})  # noqa: S310 - loopback
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - loopback
            answer.read()
            return bool(answer.status == 200)
    except OSError:
        return False


def counts(engines: Sequence[str]) -> list[dict[str, float]]:
    """What each engine has counted."""
    found = []
    for url in engines:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:  # noqa: S310 - loopback
            lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if line[:1] != "#"]
        found.append(
            {
                key: sum(float(value) for name, _, value in lines if name.partition("{")[0] == metric)
                for key, metric in _COUNTS.items()
            }
        )
    return found


def wait_until(answers: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for a process to serve.

    Raises:
        NotHereError: if it ends, or never does.
    """
    until = time.monotonic() + _START_S
    while not answers():
        if process.poll() is not None:
            raise NotHereError(f"ended with {process.returncode} at its start")
        if time.monotonic() > until:
            raise NotHereError(f"gave no answer within {_START_S:.0f} s")
        time.sleep(0.3)


# The measurement -----------------------------------------------------------------------------------------------------


@attrs.define
class Row:
    """What a gateway did with a workload, over all rounds."""

    workload: str
    gateway: Gateway
    version: str
    failure: str = ""
    answers: list[Mapping[str, Any]] = attrs.field(factory=list)
    cpu_s: float = 0.0
    read: float = 0.0
    cached: float = 0.0
    imbalances: list[float] = attrs.field(factory=list)

    def figures(self) -> dict[str, float]:
        """The table's figures by name; without an answer there are none."""
        good = [one for one in self.answers if one["status"] == 200 and one["first_s"] is not None]
        if not good:
            return {}
        first = [one["first_s"] * 1000 for one in good]
        end = [one["end_s"] * 1000 for one in good]
        gaps = [(e - f) / (one["chunks"] - 1) for f, e, one in zip(first, end, good, strict=True) if one["chunks"] > 1]
        return {
            "requests": len(self.answers),
            "failed": len(self.answers) - len(good),
            "ttft_mean_ms": statistics.fmean(first),
            "ttft_p50_ms": statistics.median(first),
            "ttft_p90_ms": _percentile(first, 0.9),
            "ttft_p99_ms": _percentile(first, 0.99),
            "tpot_mean_ms": statistics.fmean(gaps) if gaps else 0.0,
            "end_mean_ms": statistics.fmean(end),
            "end_p90_ms": _percentile(end, 0.9),
            "cached_pct": 100 * self.cached / self.read if self.read else 0.0,
            "imbalance": statistics.fmean(self.imbalances),
            "cpu_ms": 1000 * self.cpu_s / len(self.answers),
        }


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def run_one(row: Row, place: Place, load: Sequence[str]) -> None:
    """Start a gateway, send a workload through it, and add what happened to its row."""
    url = f"http://127.0.0.1:{place.port}/v1/chat/completions"
    with running(row.gateway.command(place), place.folder, 1) as process, client([*load, "--url", url]) as sender:
        wait_until(lambda: post(url, body(words(_UNLIKE, 64), 2)), process)
        for number in range(_WARM_UP):
            post(url, body(words(_UNLIKE + number, 64), 2))
        warm_up(sender)
        for engine in place.engines:
            post(f"{engine}/reset_prefix_cache", b"")
        before, cpu_s = counts(place.engines), tree_cpu_s(process.pid)
        told, complaint = sender.communicate("go\n")
        cpu_s = tree_cpu_s(process.pid) - cpu_s
    if sender.returncode:
        raise RuntimeError(complaint[-2000:])
    _add(row, json.loads(told)["answers"], cpu_s, before, counts(place.engines))


def _add(
    row: Row,
    answers: Sequence[Mapping[str, Any]],
    cpu_s: float,
    before: Sequence[Mapping[str, float]],
    after: Sequence[Mapping[str, float]],
) -> None:
    rose = [{key: b[key] - a[key] for key in a} for a, b in zip(before, after, strict=True)]
    row.answers += answers
    row.cpu_s += cpu_s
    row.read += sum(one["read"] for one in rose)
    row.cached += sum(one["cached"] for one in rose)
    served = [one["requests"] for one in rose]
    row.imbalances.append(max(served) / max(statistics.fmean(served), 1e-9))


def least(options: argparse.Namespace, name: str) -> dict[str, float]:
    """The figures of a workload that no gateway could be below."""
    engine = EngineOptions(
        prefill_tokens_per_s=ENGINE_OPTIONS["prefill-tokens-per-s"],
        step_ms=ENGINE_OPTIONS["decode-ms-per-token"],
        token_budget=ENGINE_OPTIONS["token-budget"],
        max_running=1,
    )
    found: list[float] = []
    for round_ in range(options.rounds):
        trace = scaled(workload(name, options.seconds, options.seed + round_, options.trace, options.rate))
        found += least_ttft_s(trace, [spec_of(engine, trace.block_tokens)], waits=trace.has_sessions)
    first = [seconds * 1000 for seconds in found]
    return {
        "ttft_mean_ms": statistics.fmean(first),
        "ttft_p90_ms": _percentile(first, 0.9),
        "ttft_p99_ms": _percentile(first, 0.99),
    }


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each workload and gateway; gateways take turns, in another order each round."""
    chosen = [one for one in GATEWAYS if any(word in one.name for word in options.only.split(","))]
    rows = {
        (name, one.name): Row(name, one, version_of(options.peers_dir, one.name))
        for name in options.workloads.split(",")
        for one in chosen
    }
    ports = free_ports(ENGINES + 2)
    engines = tuple(f"http://127.0.0.1:{port}" for port in ports[:ENGINES])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        words_ = [f"--{name}={value}" for name, value in ENGINE_OPTIONS.items()]
        command = [KVFLEET, "mock-engine", "-n", str(ENGINES), "-m", MODEL, *words_]
        process = stack.enter_context(running([*command, "-p", str(ports[0])], Path(folder), 0))
        wait_until(lambda: all(post(f"{url}/reset_prefix_cache", b"") for url in engines), process)
        for round_, name in itertools.product(range(options.rounds), options.workloads.split(",")):
            turn = round_ * 4 % len(chosen)
            for one in [*chosen[turn:], *chosen[:turn]]:
                own = Path(tempfile.mkdtemp(dir=folder))
                place = Place(options.peers_dir, own, ports[-2], ports[-1], engines)
                attempt(rows[name, one.name], place, load_command(options, name, round_))
    return list(rows.values())


def load_command(options: argparse.Namespace, name: str, round_: int) -> list[str]:
    """The client's command; each round has its own seed."""
    command = [*pinned(0), sys.executable, str(Path(__file__).parent / "peers_load.py"), "--workload", name]
    command += ["--seconds", str(options.seconds), "--warm-up", str(options.warm_up), "--rate", str(options.rate)]
    command += ["--seed", str(options.seed + round_)]
    return [*command, "--trace", str(options.trace)] if options.trace else command


def attempt(row: Row, place: Place, load: Sequence[str]) -> None:
    """One run, which a peer that is not there does not stop."""
    if row.failure:
        return
    try:
        run_one(row, place, load)
    except NotHereError as error:
        row.failure = str(error)
    figures = row.figures()
    told = f"TTFT mean {figures['ttft_mean_ms']:.0f} ms" if figures else row.failure or "no answer"
    print(f"{time.strftime('%H:%M:%S')} {row.workload}, {row.gateway.name}: {told}", file=sys.stderr, flush=True)


# The report ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "ttft_mean_ms": "TTFT mean, ms",
    "ttft_p90_ms": "p90",
    "ttft_p99_ms": "p99",
    "tpot_mean_ms": "TPOT mean, ms",
    "end_mean_ms": "end mean, ms",
    "end_p90_ms": "end p90, ms",
    "cached_pct": "cached, %",
    "imbalance": "busiest / mean",
    "cpu_ms": "CPU, ms/request",
}
_RATIOS = ("ttft_mean_ms", "ttft_p90_ms", "ttft_p99_ms", "tpot_mean_ms", "end_mean_ms", "end_p90_ms", "cpu_ms")


def table(rows: Sequence[Row], bound: Mapping[str, float]) -> Iterator[str]:
    """The lines of one workload's table; ratios in parentheses are to the best peer of each column.

    Args:
        rows: What the gateways did.
        bound: What no gateway could be below.
    """
    figures = [row.figures() for row in rows]
    peers = [one for row, one in zip(rows, figures, strict=True) if one and not row.gateway.is_ours]
    best = {key: min((one[key] for one in peers if not one["failed"]), default=0.0) for key in _RATIOS}
    yield "| gateway | answers | " + " | ".join(COLUMNS.values()) + " |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for row, one in zip(rows, figures, strict=True):
        name = f"{row.gateway.name} {row.version}".strip()
        if not one:
            yield f"| {name} | {row.failure or 'none'} |" + " |" * len(COLUMNS)
            continue
        cells = [_cell(key, one[key], best[key] if key in _RATIOS else 0.0) for key in COLUMNS]
        yield f"| {name} | {one['requests'] - one['failed']:.0f} of {one['requests']:.0f} | " + " | ".join(cells) + " |"
    cells = [_cell(key, bound[key], best[key]) if key in bound else "" for key in COLUMNS]
    yield "| *no queue, one endless cache* | | " + " | ".join(cells) + " |"


def _cell(key: str, value: float, best: float) -> str:
    digits = 0 if key in _RATIOS and key != "cpu_ms" else 1
    text = f"{value:.2f}" if key == "imbalance" else f"{value:.{digits}f}"
    return f"{text} ({value / best:.2f})" if best else text


def main() -> None:
    """Measure, and print a table for each workload, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-dir", type=Path, required=True, help="folder of the peers' virtual environments")
    parser.add_argument("--install", action="store_true", help="install those that are not there yet")
    parser.add_argument(
        "--trace", type=Path, help="Mooncake's conversation trace; without it that workload is left out"
    )
    parser.add_argument("--workloads", default="", help="of " + ", ".join(WORKLOADS) + "; all if not given")
    parser.add_argument("--only", default="", help="gateways whose name has one of these words, by commas")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--rate", type=float, default=MOONCAKE_RATE_PER_S, help="requests a second of the trace's")
    parser.add_argument("--warm-up", type=float, default=0.0, help="seconds of other requests before each run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.workloads = options.workloads or ",".join(WORKLOADS if options.trace else WORKLOADS[2:])
    if options.install:
        install(options.peers_dir)
    bounds = {name: least(options, name) for name in options.workloads.split(",")}
    report(measure(options), bounds, as_json=options.json)


def report(rows: Sequence[Row], bounds: Mapping[str, Mapping[str, float]], *, as_json: bool) -> None:
    """Print what was measured, and what no gateway could be below."""
    if as_json:
        told = [
            {
                "workload": row.workload,
                "gateway": row.gateway.name,
                "version": row.version,
                "failure": row.failure,
                **row.figures(),
            }
            for row in rows
        ]
        print(json.dumps({"gateways": told, "bounds": bounds}))
        return
    for name, group in itertools.groupby(
        sorted(rows, key=lambda row: WORKLOADS.index(row.workload)), key=lambda row: row.workload
    ):
        print(f"\n{name}\n")
        print("\n".join(table(list(group), bounds[name])))


if __name__ == "__main__":
    main()
