"""Runs what stands on the feature page as it is printed: Python, sections of fleet files, and shell commands.

Only addresses are replaced, because the page's machines are not here: `at` says what stands for what.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import ruamel.yaml

from kvfleet.config.loader import check_text, dump_yaml
from kvfleet.config.schema import FleetConfig
from kvfleet.pipeline.build import check
from kvfleet.plugin.manager import discover

__all__ = ["TABLE", "Answered", "Ran", "curl", "findings", "fleet", "run", "run_apart", "shell", "upto"]

TABLE = discover(environ={})
Addresses = Mapping[str, str]


@attrs.frozen
class Ran:
    """What an example left behind: its names, and what it printed."""

    names: Mapping[str, Any]
    printed: str

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    @property
    def lines(self) -> list[str]:
        """What it printed, line by line."""
        return self.printed.splitlines()


async def run(code: str, *, at: Addresses | None = None, **given: Any) -> Ran:
    """Run Python of the page; `await` may stand outside a function, as it does there.

    Args:
        code: As printed.
        at: Addresses that stand for the page's.
        given: Names that the page takes for granted.
    """
    names = {"__name__": "page", **given}
    made = compile(_here(code, at), "<the page>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        waiting = eval(made, names)  # noqa: S307 - the page is our own
        if inspect.iscoroutine(waiting):
            await waiting
    return Ran(names, out.getvalue())


def upto(code: str, beginning: str) -> str:
    """An example up to the end of the paragraph that has a line beginning so, to see what is there at that point."""
    before, found, after = code.partition(f"\n{beginning}")
    assert found, f"no line begins with {beginning!r}"
    return before + found + after.partition("\n\n")[0] + "\n"


async def run_apart(code: str, *, at: Addresses | None = None, **given: Any) -> Ran:
    """The same in a thread of its own, for code that brings its own event loop, or has none."""

    def run_here() -> Ran:
        names = {"__name__": "page", **given}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(_here(code, at), "<the page>", "exec", dont_inherit=True), names)  # noqa: S102 - the same
        return Ran(names, out.getvalue())

    return await asyncio.to_thread(run_here)


def _here(text: str, at: Addresses | None) -> str:
    for shown, real in (at or {}).items():
        assert shown in text, f"the page does not speak of {shown}"
        text = text.replace(shown, real)
    return text


# Fleet files ---------------------------------------------------------------------------------------------------------


def fleet(*texts: str, at: Addresses | None = None) -> FleetConfig:
    """The fleet that some pieces of the page describe together; models of one name are one model.

    Raises:
        AssertionError: with the findings, if there are any.
    """
    config, found = _read(*texts, at=at)
    assert found == []
    assert config is not None
    return config


def findings(*texts: str) -> list[str]:
    """What is wrong with some pieces together."""
    return _read(*texts)[1]


def _read(*texts: str, at: Addresses | None = None) -> tuple[FleetConfig | None, list[str]]:
    whole: dict[str, Any] = {}
    for text in texts:
        _merge(whole, ruamel.yaml.YAML(typ="safe", pure=True).load(_here(text, at)))
    config, found = check_text(dump_yaml(whole), file="page.yaml", environ={})
    everything = found if config is None else (*found, *check(config, TABLE))
    return config, list(dict.fromkeys(map(str, everything)))


def _merge(whole: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        known = whole.get(key)
        if key == "models" and known:
            for model in value:
                named = [one for one in known if one["name"] == model["name"]]
                _merge(named[0], model) if named else known.append(dict(model))
        elif isinstance(value, dict) and isinstance(known, dict):
            _merge(known, value)
        else:
            whole[key] = value


# Commands ------------------------------------------------------------------------------------------------------------


@attrs.frozen
class Answered:
    """What `curl` printed of an answer."""

    status: int
    headers: Mapping[str, str]
    body: str


async def curl(command: str, url: str, *more: str) -> Answered:
    """Run a `curl` of the page against a gateway, which stands for `http://localhost:8000`."""
    here = _here(command.strip(), {"http://localhost:8000": url})
    printed = await shell(f"{here} --silent --show-error --include {' '.join(more)}")
    head, _, body = printed.replace("\r\n", "\n").partition("\n\n")
    first, *lines = head.splitlines()
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    found = re.match(r"HTTP/1.1 (\d+)", first)
    assert found, printed
    return Answered(int(found[1]), headers, body)


async def shell(command: str, *, folder: Path | None = None, environ: Mapping[str, str] | None = None) -> str:
    """Run a command of the page with bash; gives what it printed.

    Raises:
        AssertionError: if it failed.
    """
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        command,
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NO_PROXY": "*",
            "KVFLEET_CONFIG": "",
            "COLUMNS": "120",
            **(environ or {}),
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, complaints = await process.communicate()
    assert process.returncode == 0, printed.decode() + complaints.decode()
    return printed.decode()
