"""Headless Chromium over its DevTools protocol, by a pipe: no driver, no socket, nothing to install beside it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import attrs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--force-color-profile=srgb", "--remote-debugging-pipe", "--lang=en",
)  # fmt: skip
_MOST_BYTES = 64 * 1024 * 1024


@attrs.define
class Tab:
    """One page.

    Attributes:
        errors: What the page's script threw, and what its console and its security policy complained about.
        urls: Every address that was asked for.
    """

    browser: Browser
    session: str
    errors: list[str] = attrs.field(factory=list)
    urls: list[str] = attrs.field(factory=list)

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        return await self.browser.send(method, params, self.session)

    async def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Be a screen of that size and with those colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def go(self, url: str) -> None:
        """Open an address."""
        await self.send("Page.navigate", url=url)

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true; looked at whenever the page draws, and at most 20 seconds."""
        script = f"""new Promise((resolve, reject) => {{
            const late = setTimeout(() => reject(new Error("never: " + {json.dumps(condition)})), 20000);
            const look = () => {{
                if (document.readyState === "complete" && ({condition})) {{ clearTimeout(late); resolve(true); }}
                else setTimeout(look, 20);
            }};
            look();
        }})"""
        assert await self.run(script) is True

    async def press(self, key: str) -> None:
        """Press and release a key."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27}[key]
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": "\r"} if key == "Enter" else {})}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **facts)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **facts)

    async def type(self, text: str) -> None:
        """Type into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def picture(self, path: Path) -> bytes:
        """Keep a screenshot."""
        answer = await self.send("Page.captureScreenshot", format="png")
        data = base64.b64decode(answer["data"])
        await asyncio.to_thread(path.write_bytes, data)
        return data

    def hear(self, method: str, params: Mapping[str, Any]) -> None:
        """Note an event."""
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["source"] != "network":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])


@attrs.define
class Browser:
    """A running Chromium."""

    reader: asyncio.StreamReader
    writer: asyncio.WriteTransport
    waiting: dict[int, asyncio.Future[dict[str, Any]]] = attrs.field(factory=dict)
    tabs: dict[str, Tab] = attrs.field(factory=dict)
    count: int = 0

    async def send(self, method: str, params: Mapping[str, Any], session: str = "") -> dict[str, Any]:
        """Call a method of the protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self.waiting[self.count] = answer = asyncio.get_running_loop().create_future()
        self.writer.write(json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(30):
            return await answer

    async def listen(self) -> None:
        """Sort what Chromium says until it ends."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self.reader.readuntil(b"\0"))[:-1])
                answer = self.waiting.pop(message.get("id", 0), None)
                if answer is not None and "error" in message:
                    answer.set_exception(RuntimeError(message["error"]["message"]))
                elif answer is not None:
                    answer.set_result(message["result"])
                elif tab := self.tabs.get(message.get("sessionId", "")):
                    tab.hear(message["method"], message["params"])

    async def tab(self) -> Tab:
        """Open a tab."""
        target = await self.send("Target.createTarget", {"url": "about:blank"})
        attached = await self.send("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        tab = self.tabs[attached["sessionId"]] = Tab(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.send(f"{domain}.enable")
        return tab


def _pipe() -> tuple[int, int]:
    """A pipe whose ends' numbers are beyond those Chromium wants."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return high[0], high[1]


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A fresh Chromium, with a profile of its own, until the block ends."""
    loop = asyncio.get_running_loop()
    (their_in, our_out), (our_in, their_out) = _pipe(), _pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = shlex.join([CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"])
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", f"exec {command} 3<&{their_in} 4>&{their_out}",
            pass_fds=(their_in, their_out), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        os.close(their_in)
        os.close(their_out)
        reader = asyncio.StreamReader(limit=_MOST_BYTES)
        source, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(our_in, "rb", 0)
        )
        writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(our_out, "wb", 0))
        browser = Browser(reader, writer)
        listening = asyncio.create_task(browser.listen())
        try:
            yield browser
        finally:
            with contextlib.suppress(Exception):
                await browser.send("Browser.close", {})
            writer.close()
            source.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            listening.cancel()
