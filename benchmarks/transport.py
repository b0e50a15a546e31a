"""What a backend call costs on each client stack, in CPU time of the calling process.

Run ``python benchmarks/transport.py``. A loopback engine runs in a process of its own; each round runs the stacks one
after the other, and the table shows medians over the rounds. Read the ratios: wall times and absolute figures depend on
the machine, and on what else runs there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any

import httpx

from kvfleet.adapters.call import Call, Operation
from kvfleet.adapters.connections import Connections
from kvfleet.adapters.openai_compat import OpenAICompatAdapter
from kvfleet.adapters.transport import Payload, PooledTransport

REQUEST = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "word " * 400}], "max_tokens": 16, "stream": False}
).encode()
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "word " * 150}, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 400, "completion_tokens": 150, "total_tokens": 550},
    }
).encode()
CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    b'"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
LAST = CHUNK.replace(b'"finish_reason":null', b'"finish_reason":"stop"') + b"data: [DONE]\n\n"
EVENTS = 64

One = Callable[[], Awaitable[int]]


class Engine(asyncio.Protocol):
    """Answers every POST: with one JSON body, or (``/stream``) with chunked events, one write each."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self.transport: Any = transport
        self.held = b""

    def data_received(self, data: bytes) -> None:
        """Answer once head and body are there."""
        self.held += data
        head, mark, body = self.held.partition(b"\r\n\r\n")
        lowered = head.lower()
        at = lowered.find(b"content-length: ")
        if not mark or len(body) < int(lowered[at + 16 :].split(b"\r\n", 1)[0]):
            return
        self.held = b""
        if b" /stream" in head or b'"stream":true' in body:
            self.write_events(0)
        else:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"date: Mon, 01 Jan 2029 00:00:00 GMT\r\nserver: engine\r\nx-request-id: 1\r\n\r\n%b"
                % (len(ANSWER), ANSWER)
            )

    def write_events(self, index: int) -> None:
        """One event each time the loop comes round, so that the caller reads them one by one."""
        if self.transport.is_closing():
            return
        if index == 0:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
        event = CHUNK if index < EVENTS else LAST
        end = b"" if index < EVENTS else b"0\r\n\r\n"
        self.transport.write(b"%x\r\n%b\r\n%b" % (len(event), event, end))
        if index < EVENTS:
            asyncio.get_running_loop().call_later(0.001, self.write_events, index + 1)


def serve(pipe: Pipe) -> None:
    """The engine's process."""

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    try:
        import uvloop  # noqa: PLC0415

        uvloop.run(main())
    except (KeyboardInterrupt, EOFError):
        pass


async def drain(response: httpx.Response) -> int:
    """Read a response to its end without a client's help."""
    size = 0
    async for piece in response.stream:  # type: ignore[union-attr]
        size += len(piece)
    await response.aclose()
    return size


def stacks(url: str, *, is_stream: bool) -> dict[str, tuple[One, Callable[[], Awaitable[None]]]]:
    """The stacks under test: each one call, and how to close it."""
    path = "/stream" if is_stream else "/v1/chat/completions"
    target = httpx.URL(url + path)
    headers = [(b"host", target.netloc), (b"content-type", b"application/json"), (b"authorization", b"Bearer key")]
    pooled = PooledTransport()
    httpcore = httpx.AsyncHTTPTransport()
    client = httpx.AsyncClient()
    adapter = OpenAICompatAdapter(endpoint=url, model_id="m", api_key="key", connections=Connections())
    raw = REQUEST.replace(b'"stream": false', b'"stream":true') if is_stream else REQUEST
    call = Call(operation=Operation.CHAT, body=json.loads(raw), raw=raw, stream=is_stream)

    def request() -> httpx.Request:
        sent = [*headers, (b"content-length", b"%d" % len(REQUEST))]
        return httpx.Request("POST", target, headers=sent, stream=Payload(REQUEST))

    async def on_pooled() -> int:
        return await drain(await pooled.handle_async_request(request()))

    async def on_httpcore() -> int:
        return await drain(await httpcore.handle_async_request(request()))

    async def on_client() -> int:
        async with client.stream("POST", target, content=REQUEST, headers=headers) as response:
            return sum([len(piece) async for piece in response.aiter_raw()])

    async def on_adapter() -> int:
        reply = await adapter.send(call)
        if reply.events is None:
            return len(reply.body)
        return sum([len(piece) async for piece in reply.events])

    return {
        "PooledTransport": (on_pooled, pooled.aclose),
        "openai_compat adapter on it": (on_adapter, adapter.connections.aclose),
        "httpx.AsyncHTTPTransport": (on_httpcore, httpcore.aclose),
        "httpx.AsyncClient": (on_client, client.aclose),
    }


async def cost_us(one: One, *, calls: int, concurrency: int) -> float:
    """CPU microseconds of this process for one call."""

    async def worker(count: int) -> None:
        for _ in range(count):
            await one()

    await asyncio.gather(*(worker(3) for _ in range(concurrency)))
    began = time.process_time()
    await asyncio.gather(*(worker(calls // concurrency) for _ in range(concurrency)))
    return (time.process_time() - began) * 1e6 / (calls // concurrency * concurrency)


async def measure(url: str, args: argparse.Namespace, *, is_stream: bool) -> dict[str, list[float]]:
    """All rounds of all stacks."""
    found: dict[str, list[float]] = {}
    calls = args.calls // 8 if is_stream else args.calls
    for _ in range(args.rounds):
        for name, (one, close) in stacks(url, is_stream=is_stream).items():
            found.setdefault(name, []).append(await cost_us(one, calls=calls, concurrency=args.concurrency))
            await close()
    return found


def show(title: str, found: dict[str, list[float]], per: int = 1) -> None:
    """One table."""
    print(f"\n{title}")
    medians = {name: statistics.median(values) / per for name, values in found.items()}
    base = medians["PooledTransport"]
    for name, value in medians.items():
        print(f"  {name:30} {value:8.1f} µs   x{value / base:.1f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    here, there = multiprocessing.Pipe()
    engine = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    engine.start()
    import uvloop  # noqa: PLC0415

    try:
        url = f"http://127.0.0.1:{here.recv()}"
        show("2 KB request, 1 KB answer, per call", uvloop.run(measure(url, args, is_stream=False)))
        found = uvloop.run(measure(url, args, is_stream=True))
        show(f"a stream of {EVENTS} events, per event", found, per=EVENTS)
    finally:
        engine.terminate()
        engine.join()


if __name__ == "__main__":
    main()
