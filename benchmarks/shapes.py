"""Odd clients by the thousand: what they cost the gateway, and whether everybody else is served meanwhile.

    python benchmarks/shapes.py [--only loris,idle,readers,flood] [--json]

`loris`: 1000 clients send a head or a body byte by byte. `idle`: 10,000 connections stay open after one request.
`readers`: 1000 clients ask for a long stream and do not read it. `flood`: 5000 clients connect at once where 1000 may.
The gateway is a process of its own (`kvfleet run`), its engine is one here that streams as fast as it is read, and an
ordinary client asks on all the while. Memory is the gateway's resident one; loop lag is the gateway's own metric. A
shape that needs more open files than the system allows is skipped, and that is said.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import yaml

PATH = "/v1/chat/completions"
ASK = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}).encode()
STREAM = ASK[:-1] + b',"stream":true}'
EVENT = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % (b"x" * 4000)
ANSWER = json.dumps(
    {"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}]}
).encode()
STREAM_BYTES = 16_000_000
FILES = 1000
"""Those that are open besides the clients'."""


# Around it -----------------------------------------------------------------------------------------------------------


@attrs.define
class Engine:
    """Streams as fast as it is read, and counts what it got rid of."""

    begun: int = 0
    sent: int = 0
    left: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1]) if length else 0)
                if b'"stream":true' in body:
                    await self._stream(writer)
                else:
                    kind = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                    writer.write(kind % (len(ANSWER), ANSWER))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            self.left += 1
        writer.close()

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        self.begun += 1
        # as an engine on another machine, whose buffers are not this system's
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(STREAM_BYTES // len(EVENT)):
            writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
            await writer.drain()
            self.sent += len(EVENT)
        end = b'data: {"id":"1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end))


@attrs.frozen
class Site:
    """A gateway, and its engine."""

    pid: int
    port: int
    engine: Engine

    @property
    def rss_mb(self) -> float:
        """The gateway's memory."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]  # Linux has it

    async def connect(self, buffer: int = 0) -> socket.socket:
        """A connection, with a small buffer if that is wanted."""
        sock = socket.socket()
        sock.setblocking(False)
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return sock

    async def get(self, path: str) -> bytes:
        """What is at a path."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET %b HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n" % path.encode())
        said = await reader.read()
        writer.close()
        return said

    async def lags(self) -> Counter[float]:
        """How often the gateway's loop was late, by the bounds of its histogram."""
        said = (await self.get("/metrics")).decode()
        found = re.findall(r'kvfleet_event_loop_lag_seconds_bucket\{[^}]*le="([^"]+)"[^}]*\} (\S+)', said)
        return Counter({float(bound): int(float(count)) for bound, count in found})


@contextlib.asynccontextmanager
async def site(limits: Mapping[str, Any]) -> AsyncIterator[Site]:
    """A gateway with such limits on its clients."""
    engine = Engine()
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0, limit=2**20, backlog=8192)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        data = {
            "models": [{"name": "m", "provider": "openai_compat", "endpoint": url}],
            "gateway": {"port": port, "limits": dict(limits)},
        }
        path = Path(folder) / "fleet.yaml"
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        command = [sys.executable, "-c", "from kvfleet.cli.main import main; main()", "run", str(path)]
        nothing, env = asyncio.subprocess.DEVNULL, {**os.environ, "HOME": folder}
        process = await asyncio.create_subprocess_exec(*command, env=env, stdout=nothing, stderr=nothing)
        one = Site(process.pid, port, engine)
        try:
            await _ready(one)
            yield one
        finally:
            process.kill()
            await process.wait()
    server.close()


async def _ready(one: Site) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(ConnectionError):
                if b" 200 " in (await one.get("/readyz"))[:20]:
                    return
            await asyncio.sleep(0.1)


@attrs.define
class Ordinary:
    """A client that asks on, on one connection: how long each answer took, and how many were none."""

    took_s: list[float] = attrs.field(factory=list)
    failed: Counter[str] = attrs.field(factory=Counter)

    async def run(self, one: Site) -> None:
        """Ask until cancelled."""
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        while True:
            began_s = time.perf_counter()
            writer.write(_post(ASK))
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            said = await reader.readexactly(int(length[1]))  # type: ignore[index]  # an answer has one
            self.took_s.append(time.perf_counter() - began_s)
            if b" 200 " not in head[:20]:
                self.failed[str(json.loads(said)["error"]["code"])] += 1
            await asyncio.sleep(0.02)

    @property
    def told(self) -> dict[str, Any]:
        """In figures."""
        return {
            "asked": len(self.took_s),
            "failed": dict(self.failed),
            "median_ms": round(statistics.median(self.took_s) * 1e3, 1),
            "p99_ms": round(sorted(self.took_s)[int(len(self.took_s) * 0.99)] * 1e3, 1),
        }


def _post(body: bytes) -> bytes:
    head = b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (PATH.encode(), len(body)) + body


@contextlib.asynccontextmanager
async def ordinarily(one: Site, told: dict[str, Any]) -> AsyncIterator[None]:
    """An ordinary client asks meanwhile; what it saw, and how late the loop was, is told."""
    client, before = Ordinary(), await one.lags()
    task = asyncio.create_task(client.run(one))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    late = await one.lags()
    late.subtract(before)
    told["ordinary client"] = client.told
    told["loop looks late by more than"] = {
        f"{bound * 1e3:g} ms": late[float("inf")] - late[bound] for bound in sorted(late) if bound < 1
    }


# The shapes ----------------------------------------------------------------------------------------------------------


async def loris(count: int = 1000) -> dict[str, Any]:
    """Heads and bodies byte by byte; a head has 10 s for all of it, a body 30 s for each next piece."""
    told: dict[str, Any] = {"clients": count}
    head = b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\n" % PATH.encode()
    loop = asyncio.get_running_loop()
    async with site({"header_timeout_seconds": 5, "body_timeout_seconds": 5}) as one:
        before_mb = one.rss_mb
        slow = [await one.connect() for _ in range(count)]
        async with ordinarily(one, told):
            for number, sock in enumerate(slow):
                await loop.sock_sendall(sock, head if number % 2 else head + b"content-length: 100000\r\n\r\n{")
            for _ in range(40):
                for sock in slow:
                    with contextlib.suppress(OSError):
                        await loop.sock_sendall(sock, b"x")
                await asyncio.sleep(0.2)
            told["KB a client"] = round((one.rss_mb - before_mb) * 1024 / count, 1)
            ended = await asyncio.gather(*map(_said, slow))
        told["heads answered 408 and closed"] = sum(said.startswith(b"HTTP/1.1 408") for said in ended[1::2])
        told["bodies still let in, one byte each 0.2 s"] = sum(said == b"open" for said in ended[::2])
        _close(slow)
    return told


async def idle(count: int = 10_000) -> dict[str, Any]:
    """Connections that stay open after an answer."""
    told: dict[str, Any] = {"connections": count}
    loop = asyncio.get_running_loop()
    async with site({}) as one:
        before_mb, open_ones = one.rss_mb, []
        for _ in range(count):
            sock = await one.connect()
            await loop.sock_sendall(sock, b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            await loop.sock_recv(sock, 4096)
            open_ones.append(sock)
        told["KB a connection"] = round((one.rss_mb - before_mb) * 1024 / count, 1)
        async with ordinarily(one, told):
            await asyncio.sleep(10)
        _close(open_ones)
    return told


async def readers(count: int = 1000) -> dict[str, Any]:
    """Long streams that nobody reads, and then everybody leaves."""
    told: dict[str, Any] = {"streams": count, "MB a stream would be": STREAM_BYTES / 1e6}
    loop = asyncio.get_running_loop()
    async with site({}) as one:
        before_mb, began_s, before_kernel_mb, open_ones = one.rss_mb, time.perf_counter(), _kernel_mb(), []
        for _ in range(count):  # one by one, for who has connected has 10 s to send a head
            open_ones.append(await one.connect(buffer=4096))
            await loop.sock_sendall(open_ones[-1], _post(STREAM))
            await asyncio.sleep(0.01)  # else the engine here is too busy to accept, and its breaker opens
        sent, by_s = -1, time.perf_counter() + 60
        while time.perf_counter() < by_s and sent != one.engine.sent:
            sent = one.engine.sent
            await asyncio.sleep(2)
        told["engines asked"] = one.engine.begun
        told["seconds until nothing moved"] = round(time.perf_counter() - began_s - 2, 1)
        told["MB that engines got rid of, a stream"] = round(sent / count / 1e6, 2)
        told["KB of the gateway's, a stream"] = round((one.rss_mb - before_mb) * 1024 / count, 1)
        told["KB of the system's for sockets, a stream"] = round((_kernel_mb() - before_kernel_mb) * 1024 / count)
        async with ordinarily(one, told):
            await asyncio.sleep(10)
        told["KB of the gateway's, a stream, 10 s later"] = round((one.rss_mb - before_mb) * 1024 / count, 1)
        told["answers that began"] = dict(Counter([(await _said(sock))[9:12].decode() for sock in open_ones]))
        _close(open_ones)
        began_s = time.perf_counter()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                while one.engine.left < count:  # noqa: ASYNC110 - each of a thousand connections is one of the ends
                    await asyncio.sleep(0.02)
        told["engines left"] = min(one.engine.left, count)
        told["seconds until then"] = round(time.perf_counter() - began_s, 2)
    return told


async def flood(count: int = 5000, most: int = 1000) -> dict[str, Any]:
    """Clients that connect at once, and each ask once, where fewer may."""
    told: dict[str, Any] = {"clients": count, "max_connections": most}
    loop = asyncio.get_running_loop()
    async with site({"max_connections": most}) as one:
        before_mb = one.rss_mb

        async def ask() -> tuple[str, socket.socket | None]:
            try:
                sock = await one.connect()
                await loop.sock_sendall(sock, _post(ASK))
                async with asyncio.timeout(60):
                    return (await loop.sock_recv(sock, 4096))[9:12].decode(), sock
            except (OSError, TimeoutError) as error:
                return type(error).__name__, None

        async with ordinarily(one, told):
            await asyncio.sleep(0.5)
            ends = await asyncio.gather(*(ask() for _ in range(count)))
            told["answered"] = dict(Counter(status for status, _ in ends))
            told["MB more"] = round(one.rss_mb - before_mb, 1)
            _close([sock for _, sock in ends if sock is not None])
    return told


async def _said(sock: socket.socket) -> bytes:
    """What has been said on a connection; ``open`` if nothing has, and it is still open."""
    try:
        async with asyncio.timeout(1):
            return await asyncio.get_running_loop().sock_recv(sock, 4096)
    except TimeoutError:
        return b"open"
    except OSError:
        return b"reset"


def _kernel_mb() -> float:
    """What the system holds in the sockets of all processes, the engine's and the clients' here included."""
    found = re.search(r"TCP:.* mem (\d+)", Path("/proc/net/sockstat").read_text(encoding="ascii"))
    return 0.0 if found is None else int(found[1]) * resource.getpagesize() / 2**20


def _close(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


SHAPES: Mapping[str, tuple[Callable[[], Awaitable[dict[str, Any]]], int]] = {
    "loris": (loris, 1000),
    "idle": (idle, 10_000),
    "readers": (readers, 2000),
    "flood": (flood, 5000),
}
"""The shapes, and how many files each needs in one process."""


def main() -> None:
    """Do them, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of shapes, by commas")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    told: dict[str, Any] = {}
    for name, (shape, files) in SHAPES.items():
        if options.only and name not in options.only.split(","):
            continue
        if hard != resource.RLIM_INFINITY and hard < files + FILES:
            told[name] = f"skipped: it needs {files + FILES} open files, and the system allows {hard} (ulimit -Hn)"
            continue
        told[name] = asyncio.run(shape())
        if not options.json:
            print(name, json.dumps(told[name], indent=1), flush=True)
    if options.json:
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
