"""The pytest plugin: pipeline tests as pytest's own items."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.testing.fleet import FLEET


class TestPytestPlugin:
    def _pytest(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
        environ = {**os.environ, "PYTEST_ADDOPTS": "", "NO_COLOR": "1"}
        return subprocess.run(  # noqa: S603 - our own interpreter
            command, cwd=folder, capture_output=True, text=True, check=False, env=environ
        )

    def test_a_named_file_is_collected_and_a_failure_reads_well(self, tmp_path: Path) -> None:
        """The cases are items; a failing one shows the mismatch and the decision, and no Python traceback."""
        cases = (
            "  - {name: holds, request: {prompt: a}, expect: {selected: small}}\n"
            "  - {name: does not, request: {prompt: a}, expect: {selected: cloud}}\n"
        )
        (tmp_path / "fleet.yaml").write_text(FLEET + "tests:\n" + cases)
        done = self._pytest(tmp_path, "fleet.yaml", "-rA")
        assert "PASSED fleet.yaml::holds" in done.stdout
        assert "FAILED fleet.yaml::does not" in done.stdout
        assert "fleet.yaml:23:53: expect.selected: expected cloud, got small" in done.stdout
        assert "Selected: small" in done.stdout
        assert "Traceback" not in done.stdout
        assert done.returncode == 1

    def test_the_ini_option_names_folders(self, tmp_path: Path) -> None:
        """Only what lies under `kvfleet_pipelines` is collected; a wrong file is a collection error with its findings."""
        (tmp_path / "pipelines").mkdir()
        (tmp_path / "pytest.ini").write_text("[pytest]\nkvfleet_pipelines = pipelines\n")
        case = "tests:\n  - {name: holds, request: {prompt: a}, expect: {selected: small}}\n"
        (tmp_path / "pipelines" / "good.yaml").write_text(FLEET + case)
        (tmp_path / "elsewhere.yaml").write_text(FLEET + case)
        done = self._pytest(tmp_path)
        assert "1 passed" in done.stdout
        (tmp_path / "pipelines" / "bad.yaml").write_text(FLEET + case.replace("selected: small", "selected: smal"))
        done = self._pytest(tmp_path)
        assert "unknown model 'smal'; did you mean small?" in done.stdout
        assert done.returncode == 2

    def test_it_costs_nothing_where_it_is_not_used(self) -> None:
        """Loading the plugin imports nothing of kvfleet beyond its own packages."""
        code = (
            "import sys, kvfleet.testing.pytest_plugin;"
            "print(sorted(m for m in sys.modules if m.startswith(('kvfleet', 'httpx', 'opentelemetry', 'ruamel'))))"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own interpreter
        assert done.stdout.strip() == "['kvfleet', 'kvfleet.testing', 'kvfleet.testing.pytest_plugin']"
