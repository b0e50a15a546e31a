"""Several workers behind one port: started again, told to stop and to reload, and as one to whoever looks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import attrs
import httpx
import yaml

from tests.gateway.test_life import ASK, Load, Process, answered, fleet, started
from tests.gateway.upstream import whole


async def listening(one: Process, count: int) -> list[int]:
    """The processes of the workers, once so many have begun to listen."""
    async with asyncio.timeout(60):
        while True:
            found = [re.search(r"worker=(\d+) pid=(\d+)", event) for event in one.events if "listening" in event]
            if len(found) >= count:
                return [int(match[2]) for match in found if match]
            await asyncio.sleep(0.05)


async def asked(one: Process, path: str, **options: Any) -> httpx.Response:
    """One request on a connection of its own, which any worker may get."""
    async with httpx.AsyncClient(base_url=one.url, timeout=20) as client:
        return await client.request(options.pop("method", "GET"), path, **options)


def total(text: str, name: str) -> float:
    """The sum of a metric's samples."""
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


async def scraped(one: Process, **wanted: float) -> None:
    """What a scrape says these metrics add up to; the workers' own news may come a moment later."""
    async with asyncio.timeout(30):
        while True:
            text = (await asked(one, "/metrics")).text
            if {name: total(text, name) for name in wanted} == wanted:
                return


async def test_kill_9_of_one_loses_only_what_it_was_answering(tmp_path: Path) -> None:
    """Under load, one of three workers is killed: the port answers on, what breaks is its own, and it is replaced."""
    async with started(tmp_path, fleet("a"), "--workers", "3") as one:
        pids = await listening(one, 3)
        loads = [Load(one.url) for _ in range(24)]
        async with asyncio.TaskGroup() as group:
            for load in loads:
                group.create_task(load.run())
            await asyncio.sleep(1.0)
            os.kill(pids[0], signal.SIGKILL)
            for _ in range(20):
                assert (await asked(one, "/livez")).status_code == 200
            again = await listening(one, 4)
            await asyncio.sleep(0.5)
            for load in loads:
                load.is_over = True
        ended = await one.logged("worker ended")
        one.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(one.process.wait(), 60) == 0
    broken = sum(len(load.broken) for load in loads)
    # Each client has one request in flight, and a third of them have it at the worker that was killed.
    assert broken <= 16, [load.broken for load in loads]
    assert sum(len(load.served) for load in loads) > 48
    assert all(load.refused == 0 for load in loads)
    assert f"pid={pids[0]} status=-9" in ended
    assert len(set(again)) == 4


async def test_sigterm_drains_all_workers(tmp_path: Path) -> None:
    """What was accepted is answered by whichever worker has it, and the door is closed by the last one."""
    async with started(tmp_path, fleet("a"), "--workers", "2", "--drain-timeout", "20") as one:
        await listening(one, 2)
        loads = [Load(one.url, keeps=number % 2 == 0) for number in range(16)]
        async with asyncio.TaskGroup() as group:
            for load in loads:
                group.create_task(load.run())
            await answered(loads, 48)
            one.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(one.process.wait(), 60) == 0
    assert [load.broken for load in loads] == [[]] * 16
    assert all(load.refused == 1 for load in loads)


async def test_one_that_stops_alone_is_stood_in_for(tmp_path: Path) -> None:
    """While one of two workers ends what it has, whoever connects is served by the other, on whichever socket."""
    slow = fleet("a")
    slow["models"][0]["options"] = {"decode_ms_per_token": 300, "reply": "word " * 12}
    async with started(tmp_path, slow, "--workers", "2", "--drain-timeout", "60") as one:
        pids = await listening(one, 2)
        held = [asyncio.create_task(asked(one, "/v1/chat/completions", method="POST", json=ASK)) for _ in range(12)]
        while True:
            health = (await asked(one, "/health")).json()
            if sum(endpoint.get("in_flight", 0) for endpoint in health["endpoints"].values()) == 12:
                break
        os.kill(pids[0], signal.SIGTERM)
        await one.logged("gateway stopping")
        for _ in range(30):
            async with httpx.AsyncClient(base_url=one.url, timeout=httpx.Timeout(20, connect=3)) as client:
                assert (await client.get("/livez")).status_code == 200
        assert {answer.status_code for answer in await asyncio.gather(*held)} == {200}
        assert len(set(await listening(one, 3))) == 3


async def test_a_reload_is_for_all_workers(tmp_path: Path) -> None:
    """Asked of one, by HTTP or SIGHUP, it is done by all; a bad file by none, and who is started again reads the file."""
    async with started(tmp_path, fleet("old"), "--workers", "2") as one:
        pids = await listening(one, 2)
        one.path.write_text(yaml.safe_dump(fleet("new")))
        answer = (await asked(one, "/-/reload", method="POST")).json()
        assert (answer["workers"], answer["reloaded"]) == (2, 2)
        served = {
            (await asked(one, "/v1/chat/completions", method="POST", json=ASK)).headers["x-kvfleet-model"]
            for _ in range(12)
        }
        assert served == {"new"}
        one.path.write_text("models: {}")
        refused = await asked(one, "/-/reload", method="POST")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_configuration")
        one.path.write_text(yaml.safe_dump(fleet("third")))
        one.process.send_signal(signal.SIGHUP)
        await one.logged("configuration reloaded why=signal")
        await one.logged("configuration reloaded why=told by another worker", times=2)
        os.kill(pids[1], signal.SIGKILL)
        await listening(one, 3)
        served = {
            (await asked(one, "/v1/chat/completions", method="POST", json=ASK)).headers["x-kvfleet-model"]
            for _ in range(12)
        }
        assert served == {"third"}


async def test_whoever_is_asked_answers_for_all(tmp_path: Path) -> None:
    """One scrape has the sum, from any worker; so have the dashboard, its decisions, and the health report."""
    async with started(tmp_path, fleet("a", "b"), "--workers", "2") as one:
        await listening(one, 2)
        for _ in range(20):
            assert (await asked(one, "/v1/chat/completions", method="POST", json=ASK)).status_code == 200
        for _ in range(8):
            await scraped(one, kvfleet_route_requests_total=20, kvfleet_time_to_first_byte_seconds_count=20)
        shown = [(await asked(one, "/dashboard/api/state")).json() for _ in range(6)]
        assert {state["counters"]["total_requests"] for state in shown} == {20}
        assert {len(state["recent_routes"]) for state in shown} == {20}
        ids = [row["id"] for row in shown[0]["recent_routes"]]
        assert len(set(ids)) == 20
        assert {name.partition("-")[0] for name in ids} <= {"0", "1"}
        for name in ids[:6]:
            assert (await asked(one, f"/dashboard/api/route/{name}")).status_code == 200

        async def ask_on() -> None:
            while True:
                await asked(one, "/v1/chat/completions", method="POST", json={**ASK, "max_tokens": 640})

        asking = [asyncio.create_task(ask_on()) for _ in range(8)]
        in_flight = 0
        async with asyncio.timeout(60):
            while not in_flight:
                health = (await asked(one, "/health")).json()
                in_flight = sum(endpoint.get("in_flight", 0) for endpoint in health["endpoints"].values())
        assert in_flight <= 8
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def test_a_gateway_that_cannot_start_says_so_once(tmp_path: Path) -> None:
    """A worker that cannot begin ends the whole, with its reason, and is not tried for ever."""
    data = fleet("a", pipeline=[{"use": "select.ucb1", "with": {"state_path": str(tmp_path)}}, "execute"])
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(data))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from kvfleet.cli.main import main; main()", "run", str(path), "-p", "0", "-w", "2"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={"HOME": str(tmp_path), "PATH": ""},
    )
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b"cannot be used" in errors


async def test_a_budget_is_one_for_all_workers(tmp_path: Path) -> None:
    """Of forty requests at once on forty connections as many get in as the budget says, whoever is asked."""
    limited = fleet("a", budget={"enabled": True, "requests_per_minute": 10, "unknown_price": "allow"})
    async with started(tmp_path, limited, "--workers", "3") as one:
        await listening(one, 3)
        answers = await asyncio.gather(
            *(asked(one, "/v1/chat/completions", method="POST", json=ASK) for _ in range(40))
        )
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [429] * 30


@attrs.define
class Broken:
    """An engine that is well when it is asked for its health, and fails whatever else it is asked."""

    calls: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                await reader.readexactly(int(length[1]) if length else 0)
                self.calls += head.startswith(b"POST")
                writer.write(whole(b"{}", b"500 Internal Server Error" if head.startswith(b"POST") else b"200 OK"))
        writer.close()


async def share_of(one: Process, model: str) -> float:
    """The greatest share that any worker gives a model's replica."""
    text = (await asked(one, "/metrics")).text
    (share,) = re.findall(rf'^kvfleet_replica_share{{[^}}]*model="{model}"[^}}]*}} (.*)$', text, re.MULTILINE)
    return float(share)


async def test_a_breaker_that_opens_at_one_worker_is_open_at_all(tmp_path: Path) -> None:
    """One request meets the engine that fails, and of those after it none, whichever worker they come to."""
    engine = Broken()
    async with await asyncio.start_server(engine.serve, "127.0.0.1", 0) as server:
        data = fleet("good", strategy="quality_first", health={"failure_threshold": 1})
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        data["models"].append({"name": "bad", "provider": "openai_compat", "endpoint": url, "quality_score": 1.0})
        async with started(tmp_path, data, "--workers", "2") as one:
            await listening(one, 2)
            assert (await asked(one, "/v1/chat/completions", method="POST", json=ASK)).status_code == 200
            async with asyncio.timeout(30):
                while await share_of(one, "bad"):  # none is left when the last worker knows
                    pass
            answers = [await asked(one, "/v1/chat/completions", method="POST", json=ASK) for _ in range(20)]
    assert engine.calls == 1
    assert {answer.headers["x-kvfleet-model"] for answer in answers} == {"good"}
