"""What the gateway costs: CPU per request and added latency, beside the same call made directly.

Run ``python benchmarks/gateway.py [--bench-dir DIR]``. A mock engine answers at once with about 1 KB, or streams. It
and
the load generator are processes of their own: the C programs ``mock`` and ``loadgen`` of DIR if it has them, else the
simple ones in this file, whose own cost then dominates the latencies (the CPU figures stay good).

The figure to trust is **CPU microseconds of the gateway's process for each request** (user and system time, from
``/proc``); latencies suffer from whatever else the machine does. Where there are two cores, load runs on one and
the gateway on the other.

``--profile`` prints where the gateway's time goes (cProfile, which makes everything two to three times slower: read
shares, not microseconds).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from kvfleet.config.schema import FleetConfig, GatewayConfig, ModelConfig, TelemetryConfig, TraceStoreConfig

MODEL = "mock-model"
ENGINES = 4
TICKS = os.sysconf("SC_CLK_TCK")


@attrs.frozen
class Scenario:
    """One kind of load: body bytes, connections, for a stream its chunks and the time between them, requests a second.

    Without a rate each connection sends its next request when the last answer has ended: the gateway is then saturated,
    and a latency is mostly the time in its queue. With a rate it is what the gateway adds.
    """

    name: str
    body_bytes: int = 2048
    connections: int = 16
    chunks: int = 0
    gap_ms: int = 0
    rate: float = 0.0


SCENARIOS = (
    Scenario("2 KB, 200 requests/s", connections=64, rate=200),
    Scenario("32 KB, 200 requests/s", body_bytes=32_768, connections=64, rate=200),
    Scenario("2 KB, 1 connection", connections=1),
    Scenario("2 KB, 16 connections", connections=16),
    Scenario("2 KB, 64 connections", connections=64),
    Scenario("32 KB, 1 connection", body_bytes=32_768, connections=1),
    Scenario("32 KB, 16 connections", body_bytes=32_768),
    Scenario("32 KB, 64 connections", body_bytes=32_768, connections=64),
    Scenario("stream of 50, 1 connection", connections=1, chunks=50, gap_ms=5),
    Scenario("stream of 50, 16 connections", chunks=50, gap_ms=5),
    Scenario("stream of 50, 64 connections", connections=64, chunks=50, gap_ms=5),
)


# The parts -----------------------------------------------------------------------------------------------------------


def fleet(port: int, engines: list[int], *, store: str) -> FleetConfig:
    """One model on several replicas, the default pipeline, and what `kvfleet run` has on by default."""
    urls = [f"http://127.0.0.1:{engine}" for engine in engines]
    model = ModelConfig(name=MODEL, endpoint=urls[0], replicas=tuple(urls[1:]), provider="vllm")
    telemetry = TelemetryConfig(trace_store=TraceStoreConfig(enabled=bool(store), path=store))
    return FleetConfig(models=(model,), gateway=GatewayConfig(port=port), telemetry=telemetry)


def serve_gateway(port: int, engines: list[int], *, store: str, profile: bool) -> None:
    """Serve until SIGTERM."""
    from kvfleet.gateway.server import serve  # noqa: PLC0415 - the load generator needs none of this

    run = contextlib.nullcontext() if not profile else profiled()
    with run:
        serve(fleet(port, engines, store=store), log_level="ERROR")


@contextlib.contextmanager
def profiled() -> Iterator[None]:
    """Print the profile of a block."""
    import cProfile  # noqa: PLC0415
    import pstats  # noqa: PLC0415

    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        stats = pstats.Stats(profile, stream=sys.stdout)
        print_parts(stats.stats)  # type: ignore[attr-defined]
        stats.sort_stats("tottime").print_stats(40)


def print_parts(stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]]) -> None:
    """Print which part of the code the time goes to, C functions counted where they are called from."""
    spent: dict[str, float] = {}
    for (place, _, name), (_, _, own_s, _, callers) in stats.items():
        if name in ("run", "<module>"):  # the loop that waits, and imports
            continue
        if place == "~":  # written in C
            for (caller, _, _), (_, _, called_s, _) in callers.items():
                spent[_part(caller)] = spent.get(_part(caller), 0.0) + called_s
        else:
            spent[_part(place)] = spent.get(_part(place), 0.0) + own_s
    whole = sum(spent.values()) or 1.0
    print("| part | share |\n|---|---|")
    for part, part_s in sorted(spent.items(), key=lambda one: -one[1]):
        if part_s > whole / 200:
            print(f"| {part} | {part_s / whole:.0%} |")


def _part(place: str) -> str:
    """The subpackage a file belongs to; `attrs` for methods it made, else the library, or the event loop."""
    _, ours, inner = place.rpartition("/kvfleet/")
    if ours:
        return f"kvfleet.{inner.partition('/')[0].removesuffix('.py')}"
    if place.startswith("<attrs"):
        return "objects made by attrs"
    return Path(place).parent.name if "/" in place else "event loop and the rest"


class MockEngine(asyncio.Protocol):
    """An engine that answers at once, or streams ``max_tokens`` chunks, ``seed`` milliseconds apart."""

    answer = json.dumps(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 800}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 500, "completion_tokens": 200, "total_tokens": 700},
        }
    ).encode()

    def __init__(self) -> None:
        self.buffer = b""
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        if len(rest) < length:
            return
        body, self.buffer = rest[:length], rest[length:]
        self.reply(json.loads(body) if body else {})

    def reply(self, body: dict[str, Any]) -> None:
        if not body.get("stream"):
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            self.transport.write(head % len(self.answer) + self.answer)
            return
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self.chunk(body["max_tokens"], body.get("seed", 0) / 1000)

    def chunk(self, left: int, gap_s: float) -> None:
        if self.transport.is_closing():
            return
        if not left:
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            return
        finish = b'"stop"' if left == 1 else b"null"
        event = b'data: {"id":"c","object":"chat.completion.chunk","created":0,"model":"m","choices":[{"index":0,'
        event += b'"delta":{"content":"token "},"finish_reason":%s}]}\n\n' % finish
        self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))
        asyncio.get_running_loop().call_later(gap_s, self.chunk, left - 1, gap_s)


async def serve_engines(ports: list[int]) -> None:
    """Serve mock engines until killed."""
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(MockEngine, "127.0.0.1", port)
    await asyncio.Event().wait()


async def generate_load(port: int, scenario: Scenario, seconds: float) -> dict[str, Any]:
    """Requests over kept connections, each as soon as the last answer has ended, or at the scenario's rate."""
    body = json.dumps(request_body(scenario)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    until = time.monotonic() + seconds
    latencies: list[float] = []

    async def connection(turn: int) -> None:
        at = time.monotonic() + (turn / scenario.rate if scenario.rate else 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < until:
            if scenario.rate:
                await asyncio.sleep(at - time.monotonic())
                at += scenario.connections / scenario.rate
            started = time.perf_counter()
            writer.write(head + body)
            answered = await reader.readuntil(b"\r\n\r\n")
            if not answered.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answered.decode())
            if b"chunked" in answered:
                await reader.readuntil(b"0\r\n\r\n")
            else:
                lines = answered.lower().split(b"\r\n")
                length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
                await reader.readexactly(length)
            latencies.append((time.perf_counter() - started) * 1e6)
        writer.close()

    await asyncio.gather(*(connection(turn) for turn in range(scenario.connections)))
    return {"ok": len(latencies), "err": 0, "non2xx": 0, "short": 0, "lat_us": {"p50": statistics.median(latencies)}}


def request_body(scenario: Scenario) -> dict[str, Any]:
    """A chat request of the scenario's size."""
    talk = [{"role": "system", "content": "You are an assistant."}, {"role": "user", "content": ""}]
    body: dict[str, Any] = {"model": MODEL, "messages": talk, "max_tokens": scenario.chunks or 50}
    if scenario.chunks:
        body |= {"stream": True, "seed": scenario.gap_ms}
    talk[1]["content"] = "x" * max(0, scenario.body_bytes - len(json.dumps(body)))
    return body


# The measurement -----------------------------------------------------------------------------------------------------


@attrs.frozen
class Bench:
    """How the parts are started: C programs from a folder, or this file; pinned to a core where there are two."""

    folder: Path | None
    seconds: float

    def engines(self, ports: list[int]) -> subprocess.Popen[bytes]:
        if self.folder is not None:
            command = [str(self.folder / "mock"), str(ports[0]), str(len(ports))]
        else:
            command = [sys.executable, __file__, "--serve-engines", ",".join(map(str, ports))]
        return subprocess.Popen([*pinned(0), *command])

    def load(self, port: int, scenario: Scenario) -> dict[str, Any]:
        if self.folder is None:
            command = [sys.executable, __file__, "--load", str(port), json.dumps(attrs.asdict(scenario))]
            command += ["--seconds", str(self.seconds)]
        else:
            command = [str(self.folder / "loadgen"), "--port", str(port), "--dur", str(self.seconds), "--warm", "0"]
            command += ["--conns", str(scenario.connections), "--body", str(scenario.body_bytes), "--model", MODEL]
            command += ["--mode", "sse" if scenario.chunks else "http"]
            if scenario.rate:
                command += ["--rate", str(scenario.rate)]
            if scenario.chunks:
                command += ["--tokens", str(scenario.chunks), "--gap", str(scenario.gap_ms)]
        done = subprocess.run([*pinned(0), *command], capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        if not found["ok"] or found["err"] or found["non2xx"] or found["short"]:
            raise RuntimeError(f"{scenario.name}: {done.stdout[:500]}")
        return found


def pinned(core: int) -> list[str]:
    """The words before a command that keep it on one core; none where that cannot be."""
    with contextlib.suppress(OSError, AttributeError):
        if len(os.sched_getaffinity(0)) > 1:
            subprocess.run(["taskset", "--version"], capture_output=True, check=True)
            return ["taskset", "-c", str(sorted(os.sched_getaffinity(0))[core])]
    return []


def cpu_s(pid: int) -> float:
    """CPU seconds a process has used, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def free_ports(count: int) -> list[int]:
    """Ports in a row that nobody listens on."""
    for first in range(21_000, 60_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(range(first, first + count))
    raise RuntimeError("no free ports")


def wait_for(port: int, process: subprocess.Popen[Any]) -> None:
    """Wait until somebody accepts connections."""
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"process ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"nobody listens on {port}")


@contextlib.contextmanager
def started(process: subprocess.Popen[Any], port: int) -> Iterator[subprocess.Popen[Any]]:
    """A process for the length of a block."""
    try:
        wait_for(port, process)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def measure(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each scenario: medians over rounds, in which direct and gateway take turns."""
    ports = free_ports(ENGINES + 1)
    engines, port = ports[:-1], ports[-1]
    serving = [sys.executable, __file__, "--serve", str(port), "--engines", ",".join(map(str, engines))]
    serving += [*(["--store", options.store] if options.store else []), *(["--profile"] if options.profile else [])]
    rows = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(started(bench.engines(engines), engines[0]))
        gateway = stack.enter_context(started(subprocess.Popen([*pinned(1), *serving]), port))
        bench.load(port, SCENARIOS[0])  # warms caches and pools
        for scenario in SCENARIOS:
            if options.only in scenario.name:
                rounds = [turn(bench, scenario, engines[0], port, gateway.pid) for _ in range(options.rounds)]
                row = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
                rows.append({"scenario": scenario.name, **row})
    return rows


def turn(bench: Bench, scenario: Scenario, direct: int, port: int, pid: int) -> dict[str, float]:
    """One round of one scenario."""
    alone = bench.load(direct, scenario)
    before = cpu_s(pid)
    through = bench.load(port, scenario)
    spent_us = (cpu_s(pid) - before) * 1e6
    row = {
        "requests": through["ok"],
        "cpu_us": spent_us / through["ok"],
        "direct_p50_us": alone["lat_us"]["p50"],
        "gateway_p50_us": through["lat_us"]["p50"],
        "added_us": through["lat_us"]["p50"] - alone["lat_us"]["p50"],
        "chunk_us": spent_us / through["ok"] / scenario.chunks if scenario.chunks else 0.0,
    }
    for key, name in (("ttfb_us", "added_ttfb_us"), ("relay_us", "relay_us")):
        if key in through:
            row[name] = through[key]["p50"] - (alone[key]["p50"] if name == "added_ttfb_us" else 0)
    return row


def main() -> None:
    """Measure and print a table, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench-dir", type=Path, help="folder with the C programs mock and loadgen")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--only", default="", help="scenarios whose name has this in it")
    parser.add_argument("--store", default="", metavar="FILE", help="keep traces there, as `kvfleet run` does")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true")
    for hidden in ("--serve", "--engines", "--serve-engines"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        engines = [int(port) for port in options.engines.split(",")]
        serve_gateway(int(options.serve), engines, store=options.store, profile=options.profile)
    elif options.serve_engines:
        asyncio.run(serve_engines([int(port) for port in options.serve_engines.split(",")]))
    elif options.load:
        scenario = Scenario(**json.loads(options.load[1]))
        print(json.dumps(asyncio.run(generate_load(int(options.load[0]), scenario, options.seconds))))
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    """Measure, and print."""
    folder = options.bench_dir
    has_programs = folder is not None and all((folder / name).exists() for name in ("mock", "loadgen"))
    rows = measure(Bench(folder if has_programs else None, options.seconds), options)
    if options.json:
        print(json.dumps(rows))
        return
    print("| scenario | requests | CPU, µs/request | CPU, µs/chunk | p50 direct, µs | p50 gateway, µs | added, µs |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        chunk = f"{row['chunk_us']:.1f}" if row["chunk_us"] else ""
        print(
            f"| {row['scenario']} | {row['requests']:.0f} | {row['cpu_us']:.0f} | {chunk} | "
            f"{row['direct_p50_us']:.0f} | {row['gateway_p50_us']:.0f} | {row['added_us']:.0f} |"
        )


if __name__ == "__main__":
    main()
