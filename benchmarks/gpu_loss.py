"""The part of ``gpu_engines.py`` in which an engine dies: amid long streams, under load, and it comes back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import httpx

from benchmarks.gpu_load import Asked, Load, ask, rows, sentence, summary
from tests.real.engines import Engine

STREAMS, ANSWER = 12, 600
KILLED_S = 6.0
BACK_S = 12.0
_MOST_LOADS = 20


@attrs.define(kw_only=True)
class Loss:
    """Long streams and conversations through a gateway, while one engine is killed and started again.

    Attributes:
        url: The gateway.
        victim: The engine.
        load: Conversations; begun again until the engine has been back for a while.
        extra: What every request says beside them.
        say: Told what was found.
        noted: Looks up what the gateway's traces say of requests.
        left_s: How much time there is.
    """

    url: str
    victim: Engine
    load: Load
    extra: Mapping[str, Any]
    say: Callable[..., None]
    noted: Callable[[Sequence[Asked]], None]
    left_s: Callable[[], float]
    again: Engine | None = None
    _began_s: float = attrs.field(factory=time.perf_counter)
    _moments: dict[str, float] = attrs.field(factory=dict)
    _seen: list[dict[str, Any]] = attrs.field(factory=list)

    async def run(self) -> None:
        """All of it."""
        streams = [Asked(0, 0.0) for _ in range(STREAMS)]
        watching, crashing = asyncio.create_task(self._watch()), asyncio.create_task(self._crash())
        streaming = [asyncio.create_task(self._stream(number, one)) for number, one in enumerate(streams)]
        asked = await self._asked(crashing)
        await asyncio.gather(*streaming, return_exceptions=True)
        watching.cancel()
        crashing.cancel()
        _, trouble = await asyncio.gather(watching, crashing, return_exceptions=True)
        await asyncio.sleep(1.0)  # the store writes a moment later
        self.noted(asked)
        self._tell(asked, streams, "" if trouble is None else repr(trouble))

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s

    async def _asked(self, crashing: asyncio.Task[None]) -> list[Asked]:
        """One load after the other, until the engine has been back for a while."""
        found: list[Asked] = []
        for number in range(_MOST_LOADS):
            began_s = self._now_s()
            part = await self.load.run(self.url, 500 + number, f"lost {number}", self.extra)
            for one in part:
                one.at_s += began_s
            found += part
            is_over = "back" in self._moments and self._now_s() > self._moments["back"] + BACK_S
            if is_over or (crashing.done() and crashing.exception()) or self.left_s() < 15:
                break
        return found

    async def _watch(self) -> None:
        """How the gateway knows each engine's cache, whenever that changes."""
        async with httpx.AsyncClient(trust_env=False, timeout=3) as client:
            while True:
                with suppress(httpx.HTTPError):
                    said = (await client.get(f"{self.url}/health")).json()["endpoints"]
                    known = {name: f"{one.get('cache_mode')} {one.get('cache_why', '')}" for name, one in said.items()}
                    if not self._seen or self._seen[-1]["known"] != known:
                        self._seen.append({"at_s": round(self._now_s(), 2), "known": known})
                await asyncio.sleep(0.25)

    async def _crash(self) -> None:
        await asyncio.sleep(KILLED_S)
        self._moments["killed"] = self._now_s()
        await asyncio.to_thread(crashed, self.victim)
        self._moments["gone"] = self._now_s()
        self.again = attrs.evolve(self.victim, process=None)
        await asyncio.to_thread(self.again.start)
        self._moments["back"] = self._now_s()

    async def _stream(self, number: int, asked: Asked) -> None:
        await asyncio.sleep(KILLED_S - 2.0 + 0.05 * number)
        message = {"role": "user", "content": f"{number} {sentence(random.Random(number), 300)}"}
        asked.at_s = self._now_s()
        await ask(self.url, [message], ANSWER, self.extra, asked)

    def _tell(self, asked: Sequence[Asked], streams: Sequence[Asked], trouble: str) -> None:
        killed_s, back_s = self._moments.get("killed", KILLED_S), self._moments.get("back", float("inf"))
        parts = {
            "before": (0.0, killed_s - 2),
            "around": (killed_s - 2, killed_s + 3),
            "away": (killed_s + 3, back_s),
            "back": (back_s, float("inf")),
        }
        for name, (since_s, until_s) in parts.items():
            part = [one for one in asked if since_s <= one.at_s < until_s]
            self.say("lost", part=name, continued=sum(one.continued for one in part), **summary(part), asked=rows(part))
        self.say("lost, moments", moments=self._moments, trouble=trouble)
        self.say(
            "lost, streams",
            continued=sum(one.continued for one in streams),
            tokens=[one.tokens for one in streams],
            reasons=[one.reason for one in streams],
            failed=[one.failed for one in streams if one.failed],
        )
        self.say("lost, known", seen=self._seen)


def crashed(engine: Engine) -> None:
    """The server is gone at once; what computes for it gets the time to leave the GPU in order."""
    process = engine._process  # noqa: SLF001 - it is ours
    if process is None:
        return
    os.kill(process.pid, signal.SIGKILL)
    process.wait(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(4.0)
        os.killpg(process.pid, signal.SIGKILL)


def of_folder(noted: Callable[[Path, Sequence[Asked]], None], folder: Path) -> Callable[[Sequence[Asked]], None]:
    """Looks requests up in the traces in a folder."""
    return lambda asked: noted(folder / "traces.sqlite", asked)
