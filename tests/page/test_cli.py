"""CLI Commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.cli.running import run
from tests.page.fleets import QUICKSTART

COMMANDS = {
    "kvfleet init": "Generate a sample fleet.yaml",
    "kvfleet validate <config>": "Validate config syntax",
    "kvfleet fleet <config>": "Show fleet status table",
    "kvfleet simulate <config>": "Simulate routing without backends",
    "kvfleet explain <config>": "Detailed routing explanation",
    "kvfleet health <config>": "Health check all endpoints",
    "kvfleet serve <config>": "Start OpenAI-compatible gateway",
}
"""The page's table."""

LOCAL = "models: [{name: mocked, provider: mock}]\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A fleet file."""
    path = tmp_path / "fleet.yaml"
    path.write_text(QUICKSTART)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_there(command: str) -> None:
    """Each command of the table has a help that names what it takes."""
    _, name, *arguments = shlex.split(command)
    status, out, _ = run(name, "--help")
    assert status == 0
    assert ("[FILE" in out) == bool(arguments)


def test_what_they_print(file: Path) -> None:
    """Those that look at a file and ask nobody."""
    assert run("validate", file)[0] == 0
    assert "llama-3-70b" in run("fleet", file)[1]
    assert run("simulate", file)[1].startswith("Strategy: hybrid_score\nSelected: llama-3-8b\n")
    assert run("simulate", file, "--data-class", "public", "-p", "Hi")[0] == 0
    assert "select.hybrid_score" in run("explain", file)[1]
    assert json.loads(run("explain", file, "--json")[1])["strategy"] == "hybrid_score"


def test_health_tells_who_is_down(file: Path, tmp_path: Path) -> None:
    """0 if everybody is up, 1 if somebody is not."""
    sound = tmp_path / "sound.yaml"
    sound.write_text(LOCAL)
    assert run("health", sound)[0] == 0
    away = tmp_path / "away.yaml"
    away.write_text('models: [{name: gone, endpoint: "http://127.0.0.1:9", provider: vllm}]\n')
    status, out, _ = run("health", away)
    assert status == 1
    assert "gone" in out


def test_a_file_that_is_not_there_is_told_without_a_traceback(tmp_path: Path) -> None:
    """By every command that takes one: exit status 1."""
    for command in ("validate", "fleet", "simulate", "explain", "health", "serve"):
        status, out, err = run(command, tmp_path / "missing.yaml")
        assert (status, "missing.yaml" in out + err, "Traceback" in out + err) == (1, True, False), command
