"""`kvfleet run`, `serve` and `init`: from nothing to a gateway that answers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import httpx
import pytest

from kvfleet.cli.serve import read_quickstart
from kvfleet.config.loader import load_config
from kvfleet.registry.models import ModelRegistry
from tests.cli.running import run


@contextmanager
def gateway(tmp_path: Path, *args: str | Path) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """A gateway in a process of its own: its URL, what it printed before it was ready to be tried, and the process."""
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "KVFLEET_CONFIG": "", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", "from kvfleet.cli.main import main; main()", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    try:
        assert process.stdout is not None
        shown = ""
        for line in process.stdout:
            shown += line
            if "Ctrl-C" in line:
                break
        url = re.search(r"listening on (\S+),", shown)
        assert url, shown + process.communicate()[1]
        yield url[1], shown, process
    finally:
        process.kill()
        process.communicate()


def test_run_without_a_file_serves_the_quickstart(tmp_path: Path) -> None:
    """One command: it says what it serves, where, by which pipeline and what to try, answers, and stops on SIGTERM."""
    with gateway(tmp_path, "run", "--port", "0") as (url, shown, process):
        assert "three mock engines" in shown
        assert "request\n├ " in shown
        assert f"curl {url}/v1/chat/completions" in shown
        assert "kvfleet trace list" in shown
        body = {"model": "auto", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=10)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0
        assert [line.split()[2] for line in errors.splitlines()] == ["INFO"] * 3, errors


def test_serve_takes_a_key(fleet: Path, tmp_path: Path) -> None:
    """The documented alias, with --api-key: without the key nobody is answered."""
    with gateway(tmp_path, "serve", fleet, "--port", "0", "--api-key", "s3cret") as (url, shown, _):
        assert "Authorization: Bearer YOUR_KEY" in shown
        assert "s3cret" not in shown
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        assert httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code == 200


def test_a_key_may_be_a_reference(fleet: Path) -> None:
    """A variable that is not set is a usage error, and no key at all."""
    status, _, err = run("serve", fleet, "--api-key", "env:KVFLEET_NO_SUCH_KEY", "--host", "nowhere.invalid")
    assert status == 2
    assert "KVFLEET_NO_SUCH_KEY" in err


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ("gateway: {port: 0, admin: {port: %d}}", "gateway.admin.port"),
        ("gateway: {port: 0}\ntelemetry: {prometheus_port: %d}", "telemetry.prometheus_port"),
    ],
)
def test_another_port_that_is_taken_is_told_by_its_setting(tmp_path: Path, section: str, setting: str) -> None:
    """Which address, and what to change: `--port` would not help."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = tmp_path / "fleet.yaml"
        file.write_text("models: [{name: a, provider: mock}]\n" + section % port + "\n")
        status, _, err = run("run", file)
    assert status == 1
    assert err == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use; take another {setting}\n"


def test_a_port_that_is_taken_is_told(fleet: Path) -> None:
    """Exit status 1 and the address; no traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = run("run", fleet, "--port", str(port))
    assert status == 1
    assert err == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use; take another with --port\n"


def test_an_open_gateway_needs_a_key(fleet: Path) -> None:
    """Listening to the whole network without a key is refused, with what to do."""
    status, _, err = run("run", fleet, "--host", "0.0.0.0", "--port", "0")
    assert status == 1
    assert "not loopback" in err
    assert "--allow-unauthenticated" in err


def test_a_bad_file_is_not_served(write: Callable[..., Path]) -> None:
    """Findings, exit status 1."""
    path = write("models: []\n")
    status, _, err = run("run", path)
    assert status == 1
    assert err.startswith(f"{path}:1:1: models: ")


def test_the_quickstart_is_the_one_that_is_documented() -> None:
    """The packaged fleet has three mock engines, and is the one of `pipelines/`, but for its tests."""
    packaged = read_quickstart()
    replicas = ModelRegistry.from_configs(packaged.models).replicas
    assert [(replica.provider, replica.endpoint) for replica in replicas] == [
        ("mock", "mock://small-1"),
        ("mock", "mock://small-2"),
        ("mock", "mock://large-1"),
    ]
    documented = load_config(Path(__file__).parents[2] / "pipelines" / "quickstart.yaml")
    assert packaged == attrs.evolve(documented, tests=())


def test_init_writes_a_file_that_is_valid(tmp_path: Path) -> None:
    """The starter validates, and its own tests pass."""
    path = tmp_path / "fleet.yaml"
    status, out, _ = run("init", "--output", path)
    assert status == 0
    assert f"kvfleet validate {path}" in out
    assert run("validate", path)[0] == 0
    assert run("test", path)[0] == 0


def test_init_overwrites_only_when_told(tmp_path: Path) -> None:
    """A file that is there is left alone."""
    path = tmp_path / "fleet.yaml"
    path.write_text("mine")
    status, _, err = run("init", "-o", path)
    assert (status, err) == (1, f"Error: {path}: is there already; --force overwrites it\n")
    assert path.read_text() == "mine"
    assert run("init", "-o", path, "--force")[0] == 0
    assert path.read_text() != "mine"


@pytest.mark.parametrize("host", ["nowhere.invalid"])
def test_a_host_that_does_not_exist_is_told(fleet: Path, host: str) -> None:
    """A name that does not resolve: exit status 1, no traceback."""
    status, _, err = run("run", fleet, "--host", host, "--allow-unauthenticated")
    assert status == 1
    assert err.startswith("Error: ")
    assert host in err
