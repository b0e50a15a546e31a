"""`kvfleet plugins new`: what it writes works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvfleet.cli.main import cli
from kvfleet.cli.skeleton import KINDS, PluginName


@pytest.mark.parametrize("text", ["least-busy", "kvfleet-least-busy", "least_busy", "kvfleet_least_busy"])
def test_a_name_is_read_in_every_spelling(text: str) -> None:
    """Distribution, module, component and class are made from one name."""
    name = PluginName.of(text)
    assert (name.distribution, name.module, name.component, name.cls) == (
        "kvfleet-least-busy",
        "kvfleet_least_busy",
        "least_busy",
        "LeastBusy",
    )


@pytest.mark.parametrize("text", ["", "Least", "9lives", "a b", "-a", "a--b", "class", "kvfleet", "../x", "kvfleet-"])
def test_what_cannot_be_a_name_is_refused(text: str) -> None:
    """A name that would give a broken package is a usage error."""
    with pytest.raises(ValueError, match=r"must be|cannot be"):
        PluginName.of(text)


def install(project: Path, name: PluginName) -> str:
    """Make the project's source importable with its entry point, as an installation would; gives the path to add."""
    info = project / "src" / f"{name.module}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.distribution}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[kvfleet]\n{name.component} = {name.module}\n")
    return str(project / "src")


def test_the_skeletons_own_tests_pass(tmp_path: Path) -> None:
    """Tests of a fresh skeleton of every kind are green, those in its pipeline included."""
    sources, tests = [], []
    for kind in KINDS:
        name = PluginName.of(f"demo-{kind}")
        result = CliRunner().invoke(cli, ["plugins", "new", f"demo-{kind}", "--kind", kind, "--path", str(tmp_path)])
        assert result.exit_code == 0, result.output
        project = tmp_path / name.distribution
        sources.append(install(project, name))
        tests += [str(project / "tests"), str(project / "pipeline.yaml")]
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "error",
            "--import-mode=importlib",
            *tests,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sources), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 4 * len(KINDS)


def test_what_is_written_is_said(tmp_path: Path) -> None:
    """The files and the next steps, or the same as JSON."""
    args = ["plugins", "new", "demo", "--path", str(tmp_path), "--json"]
    written = json.loads(CliRunner().invoke(cli, args).output)
    project = tmp_path / "kvfleet-demo"
    assert written["path"] == str(project)
    assert sorted(written["files"]) == sorted(str(p) for p in project.rglob("*") if p.is_file())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A directory with something in it is left alone."""
    mine = tmp_path / "kvfleet-demo" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    result = CliRunner().invoke(cli, ["plugins", "new", "demo", "--path", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output == f"Error: {mine.parent}: there is something already; choose another name or --path\n"
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    """A skeleton that would clash with an installed component is not written."""
    args = ["plugins", "new", "fallback", "--kind", "strategy", "--path", str(tmp_path)]
    assert CliRunner().invoke(cli, args).exit_code == 0
    args = ["plugins", "new", "cost-first", "--kind", "strategy", "--path", str(tmp_path)]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert "select.cost_first is already brought by kvfleet" in result.output
