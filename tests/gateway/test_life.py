"""A gateway in a process of its own, under load: SIGTERM drops nothing, SIGHUP and a changed file reload."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import httpx
import yaml

ASK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12}


def fleet(*names: str, **more: Any) -> dict[str, Any]:
    """Mock models whose answers take a moment."""
    options = {"decode_ms_per_token": 10, "reply": "word " * 12}
    models = [{"name": name, "provider": "mock", "endpoint": f"mock://{name}", "options": options} for name in names]
    return {"models": models, "telemetry": {"structured_logs": True, "trace_store": {"enabled": False}}, **more}


@attrs.define
class Process:
    """``kvfleet run`` as a user starts it."""

    path: Path
    process: asyncio.subprocess.Process
    url: str
    events: list[str] = attrs.field(factory=list)

    async def read(self) -> None:
        """Keep the log's events."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            with contextlib.suppress(ValueError, KeyError):
                self.events.append(json.loads(line)["event"])

    async def logged(self, event: str, *, times: int = 1) -> str:
        """Wait for an event of the log, or for the last of so many."""
        async with asyncio.timeout(60):
            while True:
                found = [one for one in self.events if one.startswith(event)]
                if len(found) >= times:
                    return found[times - 1]
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def started(folder: Path, data: dict[str, Any], *options: str) -> AsyncIterator[Process]:
    """Start a gateway of a fleet file."""
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(data))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from kvfleet.cli.main import main; main()", "run", str(path), "--port", "0", *options),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={"HOME": str(folder), "PATH": ""},
    )
    one = Process(path, process, "")
    reading = asyncio.create_task(one.read())
    try:
        one.url = (await one.logged("gateway listening")).split()[2].removeprefix("url=")
        yield one
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


def is_refusal(error: BaseException | None) -> bool:
    """True if nobody listened, and not, say, if a connection was made and reset."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


@attrs.define
class Load:
    """A client that asks one after the other, whole and streamed, on a connection that it keeps, or on one for each."""

    url: str
    keeps: bool = True
    served: list[str] = attrs.field(factory=list)
    refused: int = 0
    broken: list[str] = attrs.field(factory=list)
    is_over: bool = False

    async def run(self) -> None:
        """Ask until told to stop, or nobody listens any more."""
        limits = httpx.Limits(max_keepalive_connections=None if self.keeps else 0)
        async with httpx.AsyncClient(base_url=self.url, timeout=30, limits=limits) as client:
            while not self.is_over and await self._ask(client, is_stream=len(self.served) % 2 == 0):
                pass

    async def _ask(self, client: httpx.AsyncClient, *, is_stream: bool) -> bool:
        try:
            answer = await client.post("/v1/chat/completions", json={**ASK, "stream": is_stream})
        except httpx.ConnectError as error:
            if not is_refusal(error):
                self.broken.append(repr(error))
            self.refused += 1
            return False
        except httpx.HTTPError as error:
            self.broken.append(repr(error))
            return False
        if answer.status_code != 200 or (is_stream and "[DONE]" not in answer.text):
            self.broken.append(answer.text)
        self.served.append(answer.headers.get("x-kvfleet-model", ""))
        return True


async def answered(loads: Sequence[Load], count: int) -> None:
    """Wait until clients have had so many answers."""
    async with asyncio.timeout(60):
        while sum(len(load.served) for load in loads) < count:  # noqa: ASYNC110 - it is another process that answers
            await asyncio.sleep(0.02)


async def test_sigterm_under_load_drops_nothing(tmp_path: Path) -> None:
    """Every request on a connection that was made is answered whole, others are refused; the process ends with 0."""
    async with started(tmp_path, fleet("a", "b"), "--drain-timeout", "20") as one:
        loads = [Load(one.url, keeps=number % 2 == 0) for number in range(24)]
        async with asyncio.TaskGroup() as group:
            for load in loads:
                group.create_task(load.run())
            await answered(loads, 72)
            one.process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(one.process.wait(), 60)
    assert [load.broken for load in loads] == [[]] * 24
    assert [load.refused for load in loads] == [1] * 24
    assert code == 0


async def test_sighup_reloads_and_a_bad_file_is_refused(tmp_path: Path) -> None:
    """Under load: the new fleet serves, then a bad file changes nothing and is in the log; no request fails."""
    async with started(tmp_path, fleet("old")) as one:
        load = Load(one.url)
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(load.run())
            await asyncio.sleep(0.3)
            one.path.write_text(yaml.safe_dump(fleet("new")))
            one.process.send_signal(signal.SIGHUP)
            await one.logged("configuration reloaded why=signal")
            one.path.write_text("models: {}")
            one.process.send_signal(signal.SIGHUP)
            refused = await one.logged("configuration refused why=signal")
            load.served.clear()
            await asyncio.sleep(0.5)
            load.is_over = True
        one.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(one.process.wait(), 60) == 0
    assert load.broken == []
    assert "fleet.yaml:1:" in refused
    assert set(load.served[8:]) == {"new"}


async def test_a_changed_file_reloads_by_itself(tmp_path: Path) -> None:
    """With ``--watch``, and only then."""
    async with started(tmp_path, fleet("old"), "--watch") as one:
        await asyncio.sleep(1.2)
        one.path.write_text(yaml.safe_dump(fleet("new")))
        await one.logged("configuration reloaded why=file changed")
        async with httpx.AsyncClient(base_url=one.url, timeout=20) as client:
            assert (await client.post("/v1/chat/completions", json=ASK)).headers["x-kvfleet-model"] == "new"
