"""What keeps the gateway's event loop busy for long: the CPU time of its longest turn, case by case, and where it went.

    python benchmarks/loop_lag.py [--only pii,metrics] [--rounds 7] [--where] [--json]

A gateway with trace store, metrics, budgets and personal data's rules runs on uvloop in this thread; clients and
engines are other threads. On every turn of the loop a callback reads this thread's CPU time, so that a turn is what all
callbacks of it took together, and what else the machine does meanwhile does not count (but for what it does to caches:
so each case is done some times, and the median of their longest turns is told beside the longest of all). With
``--where`` a thread looks at the stack each half millisecond while a turn is under way, and of turns beyond the limit
(5 ms) the lines it saw most often are told; the looking itself costs the loop some.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gc
import http.client
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import orjson
import yaml

from kvfleet.config.loader import load_config
from kvfleet.gateway.memory import calm_memory
from kvfleet.gateway.reload import FleetFile
from kvfleet.gateway.server import loop_factory, running
from kvfleet.runtime import Router
from kvfleet.trace.store import TraceStore

LIMIT_S = 0.005
LOOK_S = 0.0005
PATH, MESSAGES = "/v1/chat/completions", "/v1/messages"
MODELS, TENANTS = 200, 3000
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


# The watch -----------------------------------------------------------------------------------------------------------


@attrs.define
class Watch:
    """The turns of an event loop: the longest, how many were beyond the limit, and where those were."""

    longest_s: float = 0.0
    turns: int = 0
    long: int = 0
    places: Counter[str] = attrs.field(factory=Counter)
    pauses_s: list[float] = attrs.field(factory=list)
    _began_s: float = 0.0
    _seen: list[str] = attrs.field(factory=list)
    _is_over: bool = False
    _collecting_s: float = 0.0

    async def run(self, work: Callable[[], Any], *, looks: bool) -> None:
        """Watch while a thread does some work, and look where the loop is, if that is wanted."""
        loop = asyncio.get_running_loop()
        main, clock = threading.get_ident(), time.pthread_getcpuclockid(threading.get_ident())
        looking = threading.Thread(target=self._look if looks else lambda *_: None, args=(main, clock))
        gc.callbacks.append(self._on_collection)
        self._began_s = time.thread_time()
        loop.call_soon(self._turn, loop)
        looking.start()
        try:
            await asyncio.to_thread(work)
        finally:
            self._is_over = True
            gc.callbacks.remove(self._on_collection)
            await asyncio.to_thread(looking.join)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = time.thread_time()
        took_s, seen = now_s - self._began_s, self._seen
        self.turns += 1
        self.longest_s = max(self.longest_s, took_s)
        if took_s > LIMIT_S:
            self.long += 1
            self.places.update(seen)
        if seen:
            self._seen = []
        self._began_s = now_s
        if not self._is_over:
            # a pause, for a loop that spins would look busy; its time is no CPU time
            loop.call_later(0.0002, self._turn, loop)

    def _look(self, main: int, clock: int) -> None:
        while not self._is_over:
            time.sleep(LOOK_S)
            if time.clock_gettime(clock) - self._began_s > LIMIT_S / 2:
                self._seen.append(_place(main))

    def _on_collection(self, phase: str, info: Mapping[str, int]) -> None:
        del info
        if threading.current_thread() is not threading.main_thread():
            return
        if phase == "start":
            self._collecting_s = time.thread_time()
        else:
            self.pauses_s.append(time.thread_time() - self._collecting_s)


@attrs.frozen
class Found:
    """What was seen of a case, round by round."""

    rounds: Sequence[Watch]

    @property
    def median_s(self) -> float:
        """The median of the rounds' longest turns."""
        return statistics.median(one.longest_s for one in self.rounds)

    @property
    def longest_s(self) -> float:
        """The longest of all."""
        return max(one.longest_s for one in self.rounds)

    @property
    def pause_s(self) -> float:
        """The longest that was spent looking for cycles."""
        return max((pause for one in self.rounds for pause in one.pauses_s), default=0.0)

    @property
    def places(self) -> Counter[str]:
        """Where the long turns were."""
        return sum((one.places for one in self.rounds), Counter())


def _place(thread: int) -> str:
    """Where a thread is, in our own code."""
    frame = sys._current_frames().get(thread)  # noqa: SLF001 - there is no other way to see another thread's stack
    inner = frame
    while frame is not None:
        name = frame.f_code.co_filename
        if "/kvfleet/" in name:
            return f"{name.rpartition('/kvfleet/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside" if inner is None else f"{inner.f_code.co_filename.rpartition('/')[2]}:{inner.f_lineno}"


# The engine ----------------------------------------------------------------------------------------------------------


def _event(content: str) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    return b"data: " + orjson.dumps({"id": "c", "model": "m", "choices": [choice]}) + b"\n\n"


def _engine(sock: socket.socket) -> None:
    """Answers whole or, if asked to, with ten events as long as the seed says."""
    sock.listen(64)
    with contextlib.suppress(OSError):
        while True:
            one, _ = sock.accept()
            threading.Thread(target=_serve, args=(one,), daemon=True).start()


def _serve(one: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError), one, one.makefile("rb") as reader:
        while line := reader.readline():
            size = 0
            while (field := reader.readline()) not in (b"\r\n", b""):
                if field.lower().startswith(b"content-length:"):
                    size = int(field[15:])
            body = orjson.loads(reader.read(size)) if size else {}
            one.sendall(_streamed(body) if body.get("stream") else _answer(line))


def _answer(line: bytes) -> bytes:
    """As an engine that has Anthropic's API and not OpenAI's Responses, which are chats to it."""
    path = line.split()[1].partition(b"/v1/")[2]
    body = orjson.dumps(_ANSWERS.get(path, {"object": "list", "data": []}))
    status = b"404 Not Found" if path == b"responses" else b"200 OK"
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


_USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
_ANSWERS: Mapping[bytes, Any] = {
    b"chat/completions": {
        "id": "c",
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
        "usage": _USAGE,
    },
    b"completions": {"id": "c", "choices": [{"index": 0, "text": "Yes.", "finish_reason": "stop"}], "usage": _USAGE},
    b"messages": {
        "id": "c",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "Yes."}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 5, "output_tokens": 2},
    },
}


def _streamed(body: Mapping[str, Any]) -> bytes:
    length = int(body.get("seed") or 10)
    end = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    events = [_event("x" * length)] * 10 + [end]
    return SSE + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in events) + b"0\r\n\r\n"


# The cases -----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Place:
    """A gateway to be asked, and its fleet file."""

    connection: http.client.HTTPConnection
    file: Path

    def ask(self, messages: Sequence[Mapping[str, Any]], *, times: int = 1, path: str = PATH, **more: Any) -> None:
        """Ask some times."""
        body = orjson.dumps({"model": "auto", "messages": messages, **more})
        for _ in range(times):
            self._exchange("POST", path, body)

    def say(self, path: str, **body: Any) -> None:
        """Ask in the words of another path."""
        self._exchange("POST", path, orjson.dumps({"model": "auto", **body}))

    def get(self, path: str) -> bytes:
        """Look."""
        return self._exchange("GET", path)

    def post(self, path: str) -> None:
        """Have something done."""
        self._exchange("POST", path)

    def _exchange(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"content-type": "application/json", "x-tenant": "tenant-1"}
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        said = answer.read()
        if answer.status != 200:
            raise RuntimeError(said[:500])
        return said


def words(size: int, *, seed: str = "the quick brown fox said: over the lazy dog, ") -> str:
    """Text of so many bytes."""
    return (seed * (size // len(seed) + 1))[:size]


def says(text: str) -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def shows(size: int) -> list[dict[str, Any]]:
    """A question about a picture of so many bytes, as it is written."""
    url = "data:image/png;base64," + base64.b64encode(random.Random(1).randbytes(size * 3 // 4)).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, *parts("What is it?")]}]


def parts(text: str) -> list[dict[str, Any]]:
    """Text as a list of parts."""
    return [{"type": "text", "text": text}]


def talk(count: int, size: int) -> list[dict[str, Any]]:
    """A conversation of many messages."""
    return [{"role": ("user", "assistant")[i % 2], "content": f"{i} " + words(size)} for i in range(count | 1)]


def works(count: int, size: int) -> list[dict[str, Any]]:
    """An agent's conversation in Anthropic's words: calls of tools, and what they gave."""
    said: list[dict[str, Any]] = [{"role": "user", "content": "Go on."}]
    for i in range(count // 2):
        call = {"type": "tool_use", "id": f"t{i}", "name": "read", "input": {"path": f"a/{i}", "lines": [1, 2]}}
        result = {"type": "tool_result", "tool_use_id": f"t{i}", "content": parts(words(size))}
        said += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    return said


def items(count: int, size: int) -> list[dict[str, Any]]:
    """The same in the words of OpenAI's Responses."""
    said: list[dict[str, Any]] = [{"role": "user", "content": "Go on."}]
    for i in range(count // 2):
        said.append({"type": "function_call", "call_id": f"t{i}", "name": "read", "arguments": "{}"})
        said.append({"type": "function_call_output", "call_id": f"t{i}", "output": words(size)})
    return said


def tools(count: int, size: int) -> list[dict[str, Any]]:
    """The same in the words of a chat."""
    said: list[dict[str, Any]] = [{"role": "user", "content": "Go on."}]
    for i in range(count // 2):
        call = {"id": f"t{i}", "type": "function", "function": {"name": "read", "arguments": "{}"}}
        said.append({"role": "assistant", "content": None, "tool_calls": [call]})
        said.append({"role": "tool", "tool_call_id": f"t{i}", "content": parts(words(size))})
    return said


def reload_it(place: Place) -> None:
    """Reload twice, with clients that go on meanwhile."""
    for _ in range(2):
        place.post("/-/reload")
        place.ask(says("Hello"), times=20)


def look(place: Place) -> None:
    """Look at the dashboard, a second after anybody else has."""
    time.sleep(1.0)
    place.get("/dashboard/api/state")


def look_into(place: Place) -> None:
    """Look at a decision, with all its candidates."""
    place.ask(says("Hello"))
    rows = orjson.loads(place.get("/dashboard/api/state"))["recent_routes"]
    place.get(f"/dashboard/api/route/{rows[0]['id']}")


CASES: Mapping[str, Callable[[Place], object]] = {
    "100 plain requests and their traces": lambda p: p.ask(says("Hello"), times=100),
    "prompt of 32 KB": lambda p: p.ask(says(words(32_000)), times=20),
    "of 256 KB": lambda p: p.ask(says(words(256_000))),
    "of 1 MB in one message": lambda p: p.ask(says(words(1_000_000))),
    "of 1 MB in 500 messages": lambda p: p.ask(talk(500, 2000)),
    "of 1 MB full of personal data": lambda p: p.ask(says(words(1_000_000, seed="write to ada@example.com or "))),
    "of 1 MB of digits": lambda p: p.ask(says(words(1_000_000, seed="4111 1111 1111 1112 "))),
    "of 4 MB in one message": lambda p: p.ask(says(words(4_000_000))),
    "of 4 MB of Chinese": lambda p: p.ask(says(words(1_300_000, seed="快速的棕色狐狸跳过了懒狗"))),
    "of 4 MB in 2000 messages": lambda p: p.ask(talk(2000, 2000)),
    "of 4 MB in 2000 calls of tools": lambda p: p.ask(tools(2000, 4000)),
    "of 16 MB in 8000 calls of tools": lambda p: p.ask(tools(8000, 4000)),
    "of a picture of 4 MB": lambda p: p.ask(shows(4_000_000)),
    "/v1/messages, 4 MB in one message": lambda p: p.ask(says(words(4_000_000)), path=MESSAGES, max_tokens=9),
    "/v1/messages, 4 MB in 2000 messages": lambda p: p.ask(talk(2000, 2000), path=MESSAGES, max_tokens=9),
    "/v1/messages, 4 MB in 2000 calls": lambda p: p.ask(works(2000, 4000), path=MESSAGES, max_tokens=9),
    "/v1/responses, 4 MB in one text": lambda p: p.say("/v1/responses", input=words(4_000_000)),
    "/v1/responses, 4 MB in 2000 items": lambda p: p.say("/v1/responses", input=items(2000, 4000)),
    "/v1/completions, 4 MB": lambda p: p.say("/v1/completions", prompt=words(4_000_000)),
    "/v1/completions, 4 MB of token ids": lambda p: p.say("/v1/completions", prompt=list(range(600_000))),
    "/v1/embeddings, 4 MB in 2000 texts": lambda p: p.say("/v1/embeddings", input=[words(2000)] * 2000),
    "stream with events of 1 KB": lambda p: p.ask(says("Hello"), stream=True, seed=1000),
    "stream with events of 1 MB": lambda p: p.ask(says("Hello"), stream=True, seed=1_000_000),
    "/v1/models": lambda p: p.get("/v1/models"),
    "/metrics": lambda p: p.get("/metrics"),
    "/health": lambda p: p.get("/health"),
    "/v1/tenants, by an operator": lambda p: p.get("/v1/tenants"),
    "dashboard": look,
    "dashboard, a decision": look_into,
    "reload": reload_it,
}


def fleet(engine: str, folder: Path) -> Path:
    """A fleet file with much in it."""
    models = [
        {
            "name": f"m{i}",
            "provider": "vllm",
            "capabilities": {"supports_vision": True},
            "endpoint": f"{engine}/{i}",
            "cost_per_1k_input_tokens": 0.0001,
            "cost_per_1k_output_tokens": 0.0002,
        }
        for i in range(MODELS)
    ]
    embedder = {"name": "embedder", "provider": "vllm", "endpoint": f"{engine}/e"}
    free = {"cost_per_1k_input_tokens": 0.0, "cost_per_1k_output_tokens": 0.0}
    data = {
        "models": [*models, {**embedder, "capabilities": {"model_type": "embedding"}, **free}],
        "policy": {"enabled": True, "pii_detection": True},
        "budget": {"enabled": True, "monthly_budget_usd": 1e9, "per_request_max_usd": None},
        "tenants": {f"tenant-{i}": {"budget": {"enabled": True, "monthly_budget_usd": 1000}} for i in range(TENANTS)},
        "gateway": {"max_body_bytes": 50_000_000, "tenant_header": "X-Tenant"},
        "telemetry": {"trace_store": {"path": str(folder / "traces.db")}},
    }
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


async def measure(wanted: Callable[[str], bool], folder: Path, *, rounds: int, looks: bool) -> dict[str, Found]:
    """Every case that is wanted."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    threading.Thread(target=_engine, args=(sock,), daemon=True).start()
    path = fleet("http://{}:{}".format(*sock.getsockname()), folder)
    config = load_config(path)
    store = TraceStore.from_config(config.telemetry.trace_store, {})
    store.open()
    router = Router(config, polls=False, sinks=[store], state_dir=folder)
    found: dict[str, Found] = {}
    async with running(config, router=router, file=FleetFile(path, lambda: load_config(path))) as serving:
        # not httpx: what it leaves behind would be a good part of what the garbage collector finds
        place = Place(http.client.HTTPConnection(serving.url.removeprefix("http://"), timeout=120), path)
        calm_memory()
        for name, case in CASES.items():
            if wanted(name):
                found[name] = Found([await _measured(place, case, looks=looks) for _ in range(rounds)])
    await store.aclose()
    sock.close()
    return found


async def _measured(place: Place, case: Callable[[Place], object], *, looks: bool) -> Watch:
    await asyncio.to_thread(place.ask, says("Hello"))  # what is done once, is done
    watch = Watch()
    await watch.run(lambda: case(place), looks=looks)
    return watch


def report(found: Mapping[str, Found]) -> Iterator[str]:
    """A table, and where the long turns were."""
    yield f"{'case':36} {'longest turn, median':>21} {'worst':>9} {'longest GC':>11}  where"
    for name, one in found.items():
        where = "; ".join(f"{place} ({count})" for place, count in one.places.most_common(4))
        times = f"{one.median_s * 1e3:>18.1f} ms {one.longest_s * 1e3:>6.1f} ms {one.pause_s * 1e3:>8.1f} ms"
        yield f"{name:36} {times}  {where}"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has one of these words, by commas")
    parser.add_argument("--rounds", type=int, default=7, help="how often each case is done")
    parser.add_argument("--where", action="store_true", help="Look where the long turns are.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args()
    asked = options.only.split(",")
    if options.where:
        sys.setswitchinterval(LOOK_S)  # else whoever looks waits for up to 5 ms until he may
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=loop_factory()) as runner:
        case = measure(
            lambda name: any(word in name for word in asked),
            Path(folder),
            rounds=options.rounds,
            looks=options.where,
        )
        found = runner.run(case)
    if options.json:
        told = {n: {"median_s": f.median_s, "longest_s": f.longest_s, "gc_s": f.pause_s} for n, f in found.items()}
        print(json.dumps(told, indent=1))
        return
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
