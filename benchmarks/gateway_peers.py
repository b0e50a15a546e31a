"""What a request costs in each gateway: CPU of the process tree for each request, side by side in one run.

Run ``python benchmarks/gateway_peers.py --peers DIR --bench-dir DIR [--install]``. The peers' environments lie in the
one folder (see ``peers_gateways.py``), the C programs ``mock`` and ``loadgen`` in the other. Every gateway runs all the
time in front of the same four mock engines, and in each round each gets every load in turn, so that whatever else the
machine does hits all of them. Engines and load run on one core, the gateways on another.

The table's figures are medians over the rounds, in **CPU microseconds of the gateway's process tree**: for each
request, or for each chunk of a stream, which includes the chunk's share of its request: a 50th or a 400th.
`KB a stream` is the memory (PSS) by which a gateway grows for each of some hundred open streams. Wall times are left
out: on a shared machine they say more of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
from gateway import ENGINES, MODEL, Bench, Scenario, free_ports, pinned, started
from peers import post, running, tree_cpu_s, wait_until
from peers_gateways import GATEWAYS, KVFLEET, Gateway, NotHereError, Place, install, version_of

SCENARIOS = (
    Scenario("2 KB c1", connections=1),
    Scenario("2 KB c16", connections=16),
    Scenario("2 KB c64", connections=64),
    Scenario("2 KB c256", connections=256),
    Scenario("32 KB c16", body_bytes=32_768, connections=16),
    Scenario("SSE chunk c64, of 50", connections=64, chunks=50, gap_ms=5),
    Scenario("of 400", connections=64, chunks=400, gap_ms=5),
)
STREAMS = 200


def _ours(strategy: str, **more: object) -> Callable[[Place], Sequence[str]]:
    """`kvfleet run` with policy, affinity, scores, the trace store and metrics on; or with what `more` says."""

    def command(place: Place) -> Sequence[str]:
        first, *others = place.engines
        rule = {"name": "secret-stays-here", "condition": "data_class == restricted", "action": "require_private"}
        fleet = {
            "models": [{"name": MODEL, "provider": "vllm", "endpoint": first, "replicas": others}],
            "strategy": strategy,
            "policy": {"enabled": True, "rules": [rule]},
            "telemetry": {"trace_store": {"path": str(place.folder / "traces.db")}},
            **more,
        }
        path = place.file("fleet.yaml", json.dumps(fleet))  # JSON is YAML
        return [KVFLEET, "run", path, "-p", str(place.port), "--log-level", "error"]

    return command


_PLAIN = ["classify.prompt", "select.round_robin", "execute.fallback", "observe.metrics"]


def _before(place: Place) -> Sequence[str]:
    """The kvfleet that came before, as PyPI has it."""
    models = [
        {"name": MODEL if not i else f"{MODEL}-{i}", "provider": "vllm", "endpoint": url}
        for i, url in enumerate(place.engines)
    ]
    path = place.file("fleet.yaml", json.dumps({"models": models, "strategy": "hybrid_score"}))
    return [place.program("kvfleet-0.11", "kvfleet"), "serve", path, "-h", "127.0.0.1", "-p", str(place.port)]


def _peer(name: str, policy: str) -> Gateway:
    """A peer of ``peers_gateways.py`` with another policy."""
    base = next(gateway for gateway in GATEWAYS if gateway.name == f"{name} cache_aware")

    def command(place: Place) -> Sequence[str]:
        return [policy if word == "cache_aware" else word for word in base.command(place)]

    return Gateway(f"{name} {policy}", command)


_OTHERS = [gateway for gateway in GATEWAYS if not gateway.is_ours and "consistent" not in gateway.name]
COMPARED = (
    Gateway("kvfleet, default pipeline", _ours("expected_latency"), is_ours=True),
    Gateway("kvfleet, plain round robin", _ours("round_robin", policy={}, pipeline=_PLAIN), is_ours=True),
    *_OTHERS,
    _peer("sglang-router", "round_robin"),
    _peer("smg", "round_robin"),
    Gateway("kvfleet 0.11", _before),
)


@attrs.define(eq=False)
class Runner:
    """A gateway that runs, and what was measured of it, by scenario: one figure for each round."""

    gateway: Gateway
    place: Place
    process: subprocess.Popen[bytes]
    found: dict[str, list[float]] = attrs.field(factory=dict)

    def take(self, bench: Bench, scenario: Scenario) -> None:
        """One round of one load."""
        before_s = tree_cpu_s(self.process.pid)
        try:
            done = bench.load(self.place.port, scenario)
        except (RuntimeError, subprocess.CalledProcessError, ValueError) as error:
            print(f"{self.gateway.name}, {scenario.name}: {str(error)[:90]}", file=sys.stderr)
            return
        spent_us = (tree_cpu_s(self.process.pid) - before_s) * 1e6
        figure = spent_us / done["ok"] / (scenario.chunks or 1)
        self.found.setdefault(scenario.name, []).append(figure)

    def hold(self, bench: Bench) -> None:
        """Memory for each open stream."""
        before = _pss_kb(self.process.pid)
        command = [f"{bench.folder}/loadgen", "--port", str(self.place.port), "--dur", "4", "--warm", "0"]
        command += ["--conns", str(STREAMS), "--body", "2048", "--model", MODEL, "--mode", "sse"]
        command += ["--tokens", "200", "--gap", "25"]
        with subprocess.Popen([*pinned(0), *command], stdout=subprocess.DEVNULL) as running:
            time.sleep(2.5)
            held = _pss_kb(self.process.pid)
            running.terminate()
        self.found["KB a stream"] = [(held - before) / STREAMS]


def _pss_kb(root: int) -> float:
    """The memory of a process and its children, shared pages divided among their owners."""
    total = 0.0
    for pid in (root, *_children(root)):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(float(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_children(int(child))]
    return found


def run(options: argparse.Namespace) -> list[Runner]:
    """Start all, load all in turn, and stop all."""
    bench = Bench(options.bench_dir, options.seconds)
    ports = free_ports(ENGINES + 2 * len(COMPARED))
    engines, rest = ports[:ENGINES], ports[ENGINES:]
    urls = tuple(f"http://127.0.0.1:{port}" for port in engines)
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}).encode()
    runners: list[Runner] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(started(bench.engines(engines), engines[0]))
        for index, gateway in enumerate(COMPARED):
            if not any(word in gateway.name for word in options.only):
                continue
            place = Place(options.peers, folder / str(index), rest[2 * index], rest[2 * index + 1], urls, MODEL)
            place.folder.mkdir()
            try:
                process = stack.enter_context(running(gateway.command(place), place.folder, 1))
                url = f"http://127.0.0.1:{place.port}/v1/chat/completions"
                wait_until(lambda url=url: post(url, body), process)  # type: ignore[misc]
            except NotHereError as error:
                print(f"{gateway.name}: {error}", file=sys.stderr)
                continue
            runners.append(Runner(gateway, place, process))
        for number in range(options.rounds + 1):
            for scenario in SCENARIOS:
                for runner in runners:
                    runner.take(bench, scenario)
            if not number:  # the first round warms caches and pools
                for runner in runners:
                    runner.found.clear()
        for runner in runners:
            runner.hold(bench)
    return runners


def report(runners: Sequence[Runner], peers: Path) -> None:
    """Print the table, and our figures as multiples of the peers'."""
    columns = [*(scenario.name for scenario in SCENARIOS), "KB a stream"]
    print("| gateway | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for runner in runners:
        name = " ".join(filter(None, (runner.gateway.name, version_of(peers, runner.gateway.name))))
        cells = [f"{statistics.median(runner.found[c]):.0f}" if c in runner.found else "-" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder of the peers' virtual environments")
    parser.add_argument("--install", action="store_true", help="install the peers that are not there")
    parser.add_argument("--bench-dir", type=Path, required=True, help="folder with the C programs mock and loadgen")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--only", action="append", help="gateways whose name has this in it; again for more")
    options = parser.parse_args()
    options.only = options.only or [""]
    if options.install:
        install(options.peers)
    report(run(options), options.peers)


if __name__ == "__main__":
    main()
