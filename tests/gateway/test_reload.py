"""Reloading: built beside, put in place at once, and nothing lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import yaml
from click.testing import CliRunner

from kvfleet.cli.main import cli
from kvfleet.cli.serve import checked_fleet
from kvfleet.config.loader import load_config
from kvfleet.gateway.file_watch import files_of, watch
from kvfleet.gateway.reload import FleetFile, needs_restart
from kvfleet.gateway.server import Serving, running
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.telemetry.loop_lag import LOOP_LAG

TABLE = discover()
ASK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
FAST = {"decode_ms_per_token": 1, "reply": "one two three four five six"}


def mocks(*names: str, **more: object) -> list[dict[str, object]]:
    """Mock models."""
    return [{"name": name, "provider": "mock", "endpoint": f"mock://{name}", "options": FAST, **more} for name in names]


def fleet(*names: str, **more: object) -> dict[str, object]:
    """A fleet of them."""
    return {"fleet_name": "-".join(names), "models": mocks(*names), **more}


@attrs.define
class Reloaded:
    """A gateway with a fleet file, and a client of it."""

    path: Path
    serving: Serving
    client: httpx.AsyncClient

    def write(self, data: dict[str, object] | str) -> None:
        """Change the file."""
        self.path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))

    async def reload(self, data: dict[str, object] | str | None = None) -> httpx.Response:
        """Change it, if so, and have it read."""
        if data is not None:
            self.write(data)
        return await self.client.post("/-/reload")

    async def metrics(self, name: str) -> list[float]:
        """The samples of a metric, or one of them."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        return [float(line.split()[-1]) for line in lines if line.startswith((name + " ", name + "{"))]


@contextlib.asynccontextmanager
async def reloadable(folder: Path, data: dict[str, object]) -> AsyncIterator[Reloaded]:
    """Serve a fleet file."""
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(data))
    file = FleetFile(path, lambda: checked_fleet(path, TABLE))
    async with (
        running(file.read(), file=file) as serving,
        httpx.AsyncClient(base_url=serving.url, timeout=20) as client,
    ):
        yield Reloaded(path, serving, client)


async def ask(client: httpx.AsyncClient, model: str = "auto") -> str:
    """Stream one answer, and give who served it; an answer that is not whole is an error."""
    body = {**ASK, "model": model, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        text = "".join([part async for part in answer.aiter_text()])
        assert answer.status_code == 200, text
        assert text.rstrip().endswith("data: [DONE]"), text
        return answer.headers["x-kvfleet-model"]


def accounts(one: Reloaded) -> list[dict[str, Any]]:
    """What each budget came to."""
    found: list[dict[str, Any]] = one.serving.router.state()["stages"]["admit.budget"]["accounts"]
    return found


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)


async def test_a_hundred_reloads_under_load_fail_no_request(tmp_path: Path) -> None:
    """Whole and streamed answers, on kept and on new connections, while the fleet changes a hundred times."""
    served: list[str] = []
    async with reloadable(tmp_path, fleet("stays", "first")) as one:
        is_over = asyncio.Event()

        async def load() -> None:
            while not is_over.is_set():
                served.append(await ask(one.client))
                whole = await one.client.post("/v1/chat/completions", json=ASK)
                assert whole.status_code == 200, whole.text
                served.append(whole.headers["x-kvfleet-model"])

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(load())
            for number in range(100):
                answer = await one.reload(fleet("stays", "first" if number % 2 else "second"))
                assert answer.status_code == 200, answer.text
            is_over.set()
        (reloads,) = await one.metrics('kvfleet_config_reload_total{result="ok"}')
        routed = sum(await one.metrics("kvfleet_route_requests_total"))
        state = one.serving.router.state()
    assert reloads == 100
    assert routed == len(served) >= 100  # the counts go on over every reload
    assert set(served) <= {"stays", "first", "second"}
    assert state["fleet"] == "stays-first"
    assert all(replica["in_flight"] == 0 for replica in state["replicas"])


async def test_what_was_before_is_closed_and_gone(tmp_path: Path) -> None:
    """A hundred generations are not kept: once its last answer has ended, a router is closed and forgotten."""
    async with reloadable(tmp_path, fleet("a")) as one:
        routers: list[weakref.ref[Router]] = []
        for _ in range(5):
            routers.append(weakref.ref(one.serving.router))
            assert (await one.reload()).status_code == 200
        for _ in range(100):
            gc.collect()
            if not any(router() for router in routers[1:]):
                break
            await asyncio.sleep(0.01)
        assert [router() for router in routers[1:]] == [None] * 4


async def test_what_a_reload_replaces_is_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    """Which would look for long through a large fleet: its components and its file's data go by themselves."""
    budget = {"enabled": True, "monthly_budget_usd": 5, "unknown_price": "allow"}
    data = fleet("a", "b", tenants={"t": {"budget": budget}}, policy={"enabled": True, "pii_detection": True})
    async with reloadable(tmp_path, data) as one:
        await one.reload()
        before = one.serving.router
        parts = [weakref.ref(part) for part in (before.config, *before.pipeline.components)]
        assert len(parts) > 10
        del before
        gc.disable()
        try:
            assert (await one.reload()).status_code == 200
            await until(lambda: not any(part() for part in parts))
        finally:
            gc.enable()


async def test_a_reload_leaves_no_rings_behind(tmp_path: Path) -> None:
    """The garbage collector passes over what lives as long as a fleet, its background work too: rings of it are lost.

    Whatever one is found after reloads, it is of other making than ours: a client's, say.
    """
    async with reloadable(tmp_path, fleet("a", "b")) as one:
        assert (await one.reload()).status_code == 200
        gone = weakref.ref(one.serving.router.pipeline)
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                assert (await one.reload()).status_code == 200
            last = weakref.ref(one.serving.router.pipeline)
            assert (await one.reload()).status_code == 200
            await until(lambda: gone() is None and last() is None)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            found = {f"{type(part).__module__}.{type(part).__qualname__}" for part in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    ours = ("kvfleet.", "ruamel.", "builtins.frame", "_asyncio.Task", "importlib.")
    assert [kind for kind in sorted(found) if kind.startswith(ours)] == []


async def test_what_holds_itself_is_left_to_the_garbage_collector(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a plugin whose objects form a ring would take more memory with each reload, for good."""
    async with reloadable(tmp_path, fleet("a")) as one:
        held = one.serving.router.pipeline.components[0]
        gone = weakref.ref(one.serving.router.pipeline)
        assert (await one.reload()).status_code == 200
        await until(lambda: gone() is None)
        with caplog.at_level("INFO"):
            for _ in range(2):
                assert (await one.reload()).status_code == 200
    said = [record.getMessage() for record in caplog.records if "garbage collector" in record.getMessage()]
    assert said == [f"components of before a reload are left to the garbage collector held={type(held).__name__}"]


async def test_a_request_is_answered_to_its_end_by_the_fleet_it_came_to(tmp_path: Path) -> None:
    """A stream of a model that a reload removes goes on to its end, and its replica is known until then."""
    slow = fleet("old")
    slow["models"][0]["options"] = {"decode_ms_per_token": 20, "reply": "word " * 150}  # type: ignore[index]
    async with reloadable(tmp_path, slow) as one:
        asked = asyncio.create_task(ask(one.client, "old"))
        before, load = one.serving.router, one.serving.router.services.load
        await until(lambda: load.in_flight("old@mock://old") == 1)
        assert (await one.reload(fleet("new"))).status_code == 200
        assert one.serving.router is not before
        assert load.in_flight("old@mock://old") == 1
        gone = await one.client.post("/v1/chat/completions", json={**ASK, "model": "old"})
        assert gone.status_code == 404
        assert await asked == "old"
        await until(lambda: load.of("old@mock://old") is None)


class TestRefusal:
    async def test_findings_are_those_of_validate(self, tmp_path: Path) -> None:
        """A file with findings changes nothing; the answer has them in the words of `kvfleet validate`."""
        async with reloadable(tmp_path, fleet("a")) as one:
            before = one.serving.router
            bad = {**fleet("a"), "strategy": "fastest", "budgets": {}, "pipeline": [{"use": "filter.nothing"}]}
            answer = await one.reload(bad)
            printed = CliRunner().invoke(cli, ["validate", str(one.path), "--json"]).output
            (refused,) = await one.metrics('kvfleet_config_reload_total{result="refused"}')
            assert await ask(one.client) == "a"
            assert one.serving.router is before
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], refused) == (400, "invalid_configuration", 1)
        findings = yaml.safe_load(printed)["files"][0]["findings"]
        assert [{k: v for k, v in one.items() if k != "text"} for one in error["kvfleet"]["findings"]] == findings
        assert len(findings) >= 2

    async def test_a_file_that_is_no_yaml_or_is_gone(self, tmp_path: Path) -> None:
        """Both are said, and the next good file is taken."""
        async with reloadable(tmp_path, fleet("a")) as one:
            torn = await one.reload("models: [")
            one.path.unlink()
            gone = await one.reload()
            good = await one.reload(fleet("b"))
            assert await ask(one.client) == "b"
        assert [torn.status_code, gone.status_code, good.status_code] == [400, 400, 200]
        assert "no such file" in gone.json()["error"]["message"]

    async def test_a_component_that_cannot_be_opened(self, tmp_path: Path) -> None:
        """What shows only when it is opened refuses too, and leaves nothing behind."""
        (tmp_path / "arms.sqlite").write_text("this is no database, and long enough to be read as one" * 20)
        strategy = {"use": "select.ucb1", "with": {"state_path": str(tmp_path / "arms.sqlite")}}
        async with reloadable(tmp_path, fleet("a")) as one:
            answer = await one.reload({**fleet("a"), "pipeline": [strategy, "execute"]})
            assert await ask(one.client) == "a"
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_configuration")

    async def test_without_a_file_there_is_nothing_to_reload(self) -> None:
        """A gateway of a library's user says so."""
        async with running(load_config(None, fleet("a"), environ={})) as serving, httpx.AsyncClient() as client:
            answer = await client.post(f"{serving.url}/-/reload")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "nothing_to_reload")

    async def test_only_an_admin_may(self, tmp_path: Path) -> None:
        """A client's key reloads nothing."""
        keys = {"keys": {"app": {"key": "client-key"}, "ops": {"key": "admin-key", "role": "admin"}}}
        async with reloadable(tmp_path, fleet("a", gateway=keys)) as one:
            statuses = [
                (await one.client.post("/-/reload", headers=headers)).status_code
                for headers in ({}, {"authorization": "Bearer client-key"}, {"authorization": "Bearer admin-key"})
            ]
        assert statuses == [401, 403, 200]


async def test_the_loop_is_watched_on_over_reloads(tmp_path: Path) -> None:
    """By one watch, which also sees what the change itself takes; by none once the gateway has ended."""
    async with reloadable(tmp_path, fleet("a")) as one:
        watch = one.serving.router.lag
        assert watch is not None
        for _ in range(3):
            assert (await one.reload()).status_code == 200
        assert one.serving.router.lag is watch
        (before,) = await one.metrics("kvfleet_event_loop_lag_seconds_count")
        await until(lambda: sum(watch.metrics.histogram(LOOP_LAG, "0").counts) > before)
        (held,) = await one.metrics("kvfleet_event_loop_held_seconds_count")
        assert held > before
    ended = sum(watch.metrics.histogram(LOOP_LAG, "0").counts)
    await asyncio.sleep(0.2)
    assert sum(watch.metrics.histogram(LOOP_LAG, "0").counts) == ended


async def test_no_booking_is_lost_while_accounts_move(tmp_path: Path) -> None:
    """Tenants' requests come and end during reloads of a file with many of them: each is booked once, nothing stays held."""
    budget = {"enabled": True, "monthly_budget_usd": 1000}
    tenants = {f"t{number}": {"budget": budget} for number in range(300)}
    priced = mocks("a", cost_per_1k_input_tokens=0.01, cost_per_1k_output_tokens=0.01)
    data = fleet("a", models=priced, budget=budget, tenants=tenants, gateway={"tenant_header": "X-Tenant"})
    served = 0
    async with reloadable(tmp_path, data) as one:
        is_over = asyncio.Event()

        async def load(tenant: str) -> None:
            nonlocal served
            while not is_over.is_set():
                answer = await one.client.post("/v1/chat/completions", json=ASK, headers={"X-Tenant": tenant})
                assert answer.status_code == 200, answer.text
                served += 1

        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(load(f"t{number}"))
            for number in range(4):
                answer = await one.reload({**data, "tenants": {**tenants, f"new{number}": {"budget": budget}}})
                assert answer.status_code == 200, answer.text
            is_over.set()
        await until(lambda: not any(account["reserved_usd"] for account in accounts(one)))
        found = accounts(one)
    booked = {account["account"]: account["requests"] for account in found if account["requests"]}
    assert set(booked) == {"fleet", "tenant/t0", "tenant/t1", "tenant/t2", "tenant/t3"}
    assert booked["fleet"] == served == sum(booked.values()) - served


async def test_reloads_wait_for_each_other(tmp_path: Path) -> None:
    """Many at once are done one after the other; the last one's file serves."""
    async with reloadable(tmp_path, fleet("a")) as one:
        one.write(fleet("b"))
        answers = await asyncio.gather(*(one.reload() for _ in range(8)))
        assert await ask(one.client) == "b"
    assert {answer.status_code for answer in answers} == {200}


async def test_keys_change_with_the_file(tmp_path: Path) -> None:
    """A key that is taken out opens nothing any more, and a new one does."""
    old, new = ({"keys": {"app": {"key": key, "role": "admin"}}} for key in ("old-key", "new-key"))
    async with reloadable(tmp_path, fleet("a", gateway=old)) as one:
        one.write(fleet("a", gateway=new))
        await one.client.post("/-/reload", headers={"authorization": "Bearer old-key"})
        found = [
            (await one.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code
            for key in ("old-key", "new-key")
        ]
    assert found == [401, 200]


async def test_what_needs_a_restart_is_said(tmp_path: Path) -> None:
    """Listeners and the trace store are opened once; the rest of the file is taken."""
    async with reloadable(tmp_path, fleet("a")) as one:
        changed = {**fleet("b"), "gateway": {"port": 9}, "telemetry": {"trace_store": {"max_age_days": 1}}}
        answer = await one.reload(changed)
        assert await ask(one.client) == "b"
    assert answer.json()["needs_restart"] == ["gateway.port", "telemetry.trace_store"]
    assert needs_restart(load_config(None, fleet("a"), environ={}), load_config(None, fleet("b"), environ={})) == []


async def test_operators_keep_the_door_they_have(tmp_path: Path) -> None:
    """A listener that a file asks for is not there before a restart: until then its paths stay where they are."""
    async with reloadable(tmp_path, fleet("a")) as one:
        answer = await one.reload(fleet("a", gateway={"admin": {"port": 0}}))
        assert answer.json()["needs_restart"] == ["gateway.admin"]
        assert (await one.client.get("/metrics")).status_code == 200
        assert (await one.reload()).status_code == 200


async def test_the_dashboard_and_its_decisions_go_on(tmp_path: Path) -> None:
    """What was decided before a reload is shown after it, once, beside what came since."""
    async with reloadable(tmp_path, fleet("a")) as one:
        await ask(one.client)
        await one.reload(fleet("a", "b"))
        await ask(one.client)
        state = (await one.client.get("/dashboard/api/state")).json()
    assert len(state["recent_routes"]) == 2
    assert state["counters"]["total_requests"] == 2
    assert state["fleet"]["name"] == "a-b"


class TestWatching:
    async def test_a_change_is_noticed_once_it_is_whole(self, tmp_path: Path) -> None:
        """A change is told once, after two looks that agree; the same file tells nothing."""
        path, told = tmp_path / "fleet.yaml", []
        path.write_text("a")

        async def changed() -> None:
            told.append(path.read_text())

        task = asyncio.create_task(watch(lambda: (path,), changed, every_s=0.03))
        await asyncio.sleep(0.1)
        assert told == []
        path.write_text("bb")
        await until(lambda: told == ["bb"])
        other = tmp_path / "next"
        other.write_text("cc")
        other.replace(path)  # as editors and Kubernetes do it
        await until(lambda: told == ["bb", "cc"])
        task.cancel()

    def test_files_of_secrets_are_watched_too(self, tmp_path: Path) -> None:
        """A key that is read from a file changes with it."""
        secret, path = tmp_path / "key", tmp_path / "fleet.yaml"
        secret.write_text("s3cret")
        path.write_text(yaml.safe_dump(fleet("a", gateway={"api_key": f"file:{secret}"})))
        assert files_of(path, load_config(path)) == (path, secret)
