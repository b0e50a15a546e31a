"""Ways to run commands: within this process, or in one of their own with more plugins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from kvfleet.cli.main import cli


def run(*args: str | Path, **environ: str) -> tuple[int, str, str]:
    """A command's exit status, standard output and standard error; an exception that is none of click's is raised."""
    result = CliRunner(env={"KVFLEET_CONFIG": "", **environ}).invoke(cli, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def python(code: str, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run some Python in a process of its own."""
    return subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environ},
    )


def kvfleet(installed: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with what is installed in a folder."""
    code = "from kvfleet.cli.main import main; main()"
    return python(code, *args, PYTHONPATH=str(installed), **environ)


def install(folder: Path, distribution: str, code: str) -> None:
    """Make a plugin importable from a folder, as an installation would; its entry point is called like its module."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvfleet]\n{module} = {module}\n")
