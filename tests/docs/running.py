"""Runs the examples of a Markdown page as a reader would: top to bottom, in a folder of the page's own.

What a fenced block is decides what is done with it:

===========  ===========================================================================================================
``console``  Each line after ``$`` is run by bash; the lines below it are what it must print.
``python``   Run as a program; a first line ``# NAME.py`` makes it a file of that name instead.
``yaml``     A first line ``# NAME.yaml`` writes it to that file. A whole fleet file (one with ``models:``) is validated;
             sections alone are validated over the page's last fleet file without a ``pipeline:``.
``json``     Parsed, as is ``toml``; both may name a file in a first comment.
``text``     Read, not run.
===========  ===========================================================================================================

A comment ``<!-- test: WORDS -->`` on the line before a block says more:

================  ======================================================================================================
``background``    A server: started, and ended with the page, or when the next one takes its place. It is on port 8000
                  unless a number follows.
``status N``      The exit status of the last command.
``output``        A text block: what the Python block before it prints.
``plain``         YAML that is no fleet, or not a good one.
``skip REASON``   It is not run.
================  ======================================================================================================

In what a command must print, ``…`` stands for anything, and a line of it alone for any lines. Identifiers, dates and
durations are never the same twice, so any stands for any, as either of two equal replicas does for the
other; and the width of a column does not count.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import attrs
import ruamel.yaml

from kvfleet.config.loader import check_config
from kvfleet.pipeline.build import check
from kvfleet.plugin.manager import ComponentTable
from tests.docs.pages import ROOT, Block, ExampleError, commands_of, matches

__all__ = ["Page", "free_ports"]

LANGUAGES = ("console", "json", "python", "text", "toml", "yaml")
DIRECTIVES = ("background", "output", "plain", "skip", "status")

_PORTS = (8000, 4318, 9001, 5557, 5558)
_PORT = r"(?P<before>127\.0\.0\.1:|127\.0\.0\.1\", |localhost:|0\.0\.0\.0:|\{host\}:|-port |port: )%s\b"
_INSTALLS = re.compile(
    r"python3 -m venv \.venv && \.venv/bin/pip install [^&]+ && |(?:\.venv/bin/)?pip install -e (\S+)$"
)
_READS = ("kvfleet trace ", "kvfleet fleet ", "sort ")  # commands that may be asked again: what they read comes later
_START_S = 30.0
_PATIENCE_S = 8.0
_COMMAND_S = 60.0


_GIVEN: set[int] = set()
_GIVING = threading.Lock()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that are free, and that no other page was given: several run at a time."""
    with _GIVING, contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port not in _GIVEN:
                found.append(port)
                _GIVEN.add(port)
        return found


@attrs.define
class Page:
    """A page's examples being run; a context manager that ends what they started.

    Attributes:
        folder: Where they run.
        table: The components, for validation.
    """

    folder: Path
    table: ComponentTable
    ports: Mapping[int, int] = attrs.field(init=False)
    _servers: dict[int, subprocess.Popen[str]] = attrs.field(init=False, factory=dict)
    _fleet: dict[str, object] = attrs.field(init=False, factory=dict)
    _printed: str = attrs.field(init=False, default="")

    @ports.default
    def _own_ports(self) -> Mapping[int, int]:
        return dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))

    def __enter__(self) -> Self:
        shutil.copytree(ROOT / "pipelines", self.folder / "pipelines")
        (self.folder / "home").mkdir()
        (self.folder / "site").mkdir()
        (self.folder / ".venv").symlink_to(sys.prefix)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            _end(server)

    # One block -------------------------------------------------------------------------------------------------------

    def run(self, block: Block) -> None:
        """Do with a block what is to be done with it.

        Raises:
            ExampleError: if it is not as the page says.
        """
        if block.language not in LANGUAGES:
            raise block.wrong(f"the language must be one of {', '.join(LANGUAGES)}, not {block.language!r}")
        if block.directive and block.word not in DIRECTIVES:
            raise block.wrong(f"no directive is called {block.word!r}")
        if block.word == "skip":
            return
        if block.file and block.language in ("python", "yaml", "toml"):
            self._write(block)
        {
            "console": self._console,
            "json": self._json,
            "python": self._python,
            "text": self._text,
            "toml": self._toml,
            "yaml": self._yaml,
        }[block.language](block)

    def _write(self, block: Block) -> None:
        path = self.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._here(block.text))

    def _json(self, block: Block) -> None:
        try:
            json.loads(block.text)
        except ValueError as error:
            raise block.wrong(f"no JSON: {error}") from error

    def _toml(self, block: Block) -> None:
        try:
            tomllib.loads(block.text)
        except ValueError as error:
            raise block.wrong(f"no TOML: {error}") from error

    def _text(self, block: Block) -> None:
        if block.word == "output":
            self._compare(block, block.text.splitlines(), self._printed, "the program")

    def _python(self, block: Block) -> None:
        if block.file:
            return
        done = self._start(block, [sys.executable, "-c", self._here(block.text)])
        self._printed = done.stdout
        if done.returncode:
            raise block.wrong(f"the program failed:\n{done.stdout}")

    def _yaml(self, block: Block) -> None:
        try:
            data = ruamel.yaml.YAML(typ="safe", pure=True).load(self._here(block.text))
        except ruamel.yaml.error.YAMLError as error:
            raise block.wrong(f"no YAML: {error}") from error
        if block.word == "plain":
            return
        if not isinstance(data, dict):
            raise block.wrong("a YAML example is a fleet file, or sections of one")
        if isinstance(data.get("pipeline"), str):  # tests in a file of their own, which `kvfleet test` reads
            return
        whole = {**({} if "models" in data else self._fleet), **data}
        if "models" in data and "pipeline" not in data:
            self._fleet = whole
        stream = io.StringIO()
        ruamel.yaml.YAML().dump(whole, stream)
        self._validate(block, stream.getvalue())

    def _validate(self, block: Block, text: str) -> None:
        """Check a fleet file; its secrets are taken to be there."""
        path = self.folder / "home" / "checked.yaml"
        path.write_text(re.sub(r"\b(?:env|file):[\w/.-]+", "env:STAND_IN", text))
        config, found = check_config(path, environ={"STAND_IN": "a stand-in"})
        everything = found if config is None else (*found, *check(config, self.table))
        if everything:
            raise block.wrong("the fleet file has findings:\n" + "\n".join(map(str, everything)))

    # Commands --------------------------------------------------------------------------------------------------------

    def _console(self, block: Block) -> None:
        commands = list(commands_of(block.text))
        if not commands:
            raise block.wrong("no line begins with `$ `")
        if block.word == "background":
            self._serve(block, *commands[0])
            return
        for at, (command, shown) in enumerate(commands):
            is_last = at == len(commands) - 1
            self._command(block, command, shown, int(block.rest) if block.word == "status" and is_last else 0)

    def _command(self, block: Block, command: str, shown: Sequence[str], status: int) -> None:
        """Run one command and compare; one that reads what the gateway writes later is asked again for a while."""
        by_s = time.monotonic() + _PATIENCE_S
        reads = command.removeprefix(".venv/bin/").startswith(_READS)
        while True:
            done = self._start(block, ["bash", "-c", _WITH_MEMORY, "bash", self._here(self._installed(command))])
            try:
                if done.returncode != status:
                    raise block.wrong(f"`{command}` ended with {done.returncode}, not {status}:\n{done.stdout}")
                if shown:
                    self._compare(block, shown, done.stdout, f"`{command}`")
            except ExampleError:
                if not reads or time.monotonic() > by_s:
                    raise
                time.sleep(0.2)  # another process writes; there is nothing to wait for
            else:
                return

    def _start(self, block: Block, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(  # noqa: S603 - the pages are our own
                command,
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_COMMAND_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise block.wrong(f"no end within {_COMMAND_S:.0f} s") from error

    def _serve(self, block: Block, command: str, shown: Sequence[str]) -> None:
        """Start a server, and wait until it listens and has said what it says."""
        port = int(block.rest or _PORTS[0])
        if (before := self._servers.pop(port, None)) is not None:
            _end(before)
        said = self.folder / "home" / f"server-{port}.log"
        with said.open("w") as out:
            server = subprocess.Popen(  # noqa: S603 - the pages are our own
                ["bash", "-c", _SERVER, "bash", self._here(self._installed(command))],  # noqa: S607
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._servers[port] = server
        by_s = time.monotonic() + _START_S
        while not self.listens(port):
            if server.poll() is not None or time.monotonic() > by_s:
                raise block.wrong(f"`{command}` does not listen:\n{said.read_text()}")
            time.sleep(0.05)  # a process of its own cannot be waited for in another way
        while shown:
            try:
                self._compare(block, [*shown, "…"], said.read_text(), f"`{command}`")
            except ExampleError:
                if time.monotonic() > by_s:
                    raise
                time.sleep(0.05)
            else:
                return

    def listens(self, port: int) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.ports[port])) == 0

    def _environment(self) -> dict[str, str]:
        home = self.folder / "home"
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "PYTHONPATH": str(self.folder / "site"),
            "LANG": "C.UTF-8",
            "TZ": "UTC",
            "NO_PROXY": "127.0.0.1,localhost",
            "KVFLEET__GATEWAY__PORT": str(self.ports[8000]),
        }

    # What is different here ------------------------------------------------------------------------------------------

    def _installed(self, command: str) -> str:
        """A command without what installs: kvfleet is, and a plugin is put where Python looks for it."""

        def instead(match: re.Match[str]) -> str:
            if match[1]:
                _install(self.folder / match[1], self.folder / "site")
            return "true" if match[1] else ""

        return _INSTALLS.sub(instead, command)

    def _here(self, text: str) -> str:
        """A text of the page with the ports that are free here."""
        for shown, real in self.ports.items():
            text = re.sub(_PORT % shown, rf"\g<before>{real}", text)
        return text

    def _compare(self, block: Block, shown: Sequence[str], printed: str, who: str) -> None:
        __tracebackhide__ = True
        for port, real in self.ports.items():
            printed = re.sub(_PORT % real, rf"\g<before>{port}", printed)
        if not matches(shown, printed.rstrip().splitlines()):
            told = "\n".join(shown)
            raise block.wrong(f"{who} printed\n\n{printed}\nwhere the page has\n\n{told}")


_BEGIN = """
page=$PWD
[ -f home/exports ] && . home/exports
cd "$page"; [ -f home/cwd ] && cd "$(cat home/cwd)"
"""
"""Bash that begins where the command before it ended: the same folder, the same exported variables."""

_WITH_MEMORY = f"""{_BEGIN}
eval "$1"; status=$?
pwd > "$page/home/cwd"; declare -px > "$page/home/exports"
exit $status
"""
_SERVER = f"""{_BEGIN}
exec 3<&0
eval "exec env $1" 3<&- < /dev/null & server=$!
( cat <&3 > /dev/null; kill $server ) & watch=$!
trap 'kill $server; wait $server; kill $watch; exit' TERM
wait $server
kill $watch
"""
"""A server that ends on a signal, and when whoever started it is gone without a word, which closes the pipe."""


def _end(server: subprocess.Popen[str]) -> None:
    """End a server and everything it started."""
    assert server.stdin is not None
    try:
        server.terminate()
        server.wait(10.0)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(5.0)
    finally:
        server.stdin.close()


def _install(project: Path, site: Path) -> None:
    """Do what ``pip install -e`` does that matters here: make a distribution known, without a network."""
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    name, version = about["name"], about["version"]
    for package in (project / "src").iterdir():
        (site / package.name).unlink(missing_ok=True)
        (site / package.name).symlink_to(package)
    described = site / f"{name.replace('-', '_')}-{version}.dist-info"
    described.mkdir(exist_ok=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = about["entry-points"]["kvfleet"]
    (described / "entry_points.txt").write_text(
        "[kvfleet]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
    )
