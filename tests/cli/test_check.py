"""`kvfleet validate`, `graph` and `schema`: files, looked at without running them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.running import install, kvfleet, run


def test_a_valid_file_says_what_was_checked(fleet: Path) -> None:
    """Models, stages and strategy, so that one sees it was the right file."""
    status, out, _ = run("validate", fleet)
    assert status == 0
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert lines[0] == ["✓", f"{fleet} is valid"]
    assert ["models", "2 models on 3 replicas: cheap, dear"] in lines
    assert ["strategy", "select.cost_first"] in lines


def test_every_finding_is_printed_with_its_place(write: Callable[..., Path]) -> None:
    """One line each, clickable, all at once; exit status 1."""
    path = write("stratgy: x\nmodels:\n  - {name: a, provider: mock, quality_score: 7}\n")
    status, out, _ = run("validate", path)
    assert status == 1
    lines = out.splitlines()
    assert lines[0].startswith(f"{path}:1:1: stratgy: ")
    assert "did you mean strategy?" in lines[0]
    assert lines[1].startswith(f"{path}:3:")
    assert lines[-1] == "2 findings"


def test_an_unknown_strategy_is_a_finding(write: Callable[..., Path]) -> None:
    """Components are looked up, not only spelt."""
    path = write("strategy: cost_frist\nmodels:\n  - {name: a, provider: mock}\n")
    status, out, _ = run("validate", path)
    assert status == 1
    assert out.splitlines()[0].startswith(f"{path}:1:1: strategy: ")
    assert "did you mean select.cost_first?" in out


def test_a_file_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    """No traceback for a wrong path."""
    status, out, err = run("validate", tmp_path / "none.yaml")
    assert (status, err) == (1, "")
    assert out == f"{tmp_path / 'none.yaml'}: no such file or directory\n1 finding\n"


def test_a_file_that_is_no_yaml_is_a_finding(write: Callable[..., Path]) -> None:
    """A syntax error has its line."""
    path = write("models: [\n")
    status, out, _ = run("validate", path)
    assert status == 1
    assert out.startswith(f"{path}:")


def test_several_files_are_checked_together(fleet: Path, write: Callable[..., Path]) -> None:
    """One bad file fails the lot, and the good one is still told."""
    bad = write("models: []\n", "bad.yaml")
    status, out, _ = run("validate", fleet, bad)
    assert status == 1
    assert f"{fleet} is valid" in out
    assert f"{bad}:1:1: models: " in out


def test_findings_as_json(write: Callable[..., Path]) -> None:
    """The same findings for programs."""
    path = write("models: []\n")
    status, out, _ = run("validate", path, "--json")
    shown = json.loads(out)
    assert (status, shown["valid"]) == (1, False)
    (finding,) = shown["files"][0]["findings"]
    assert (finding["file"], finding["line"], finding["path"]) == (str(path), 1, "models")


def test_findings_as_annotations(write: Callable[..., Path]) -> None:
    """For a workflow run on GitHub."""
    path = write("models: []\n")
    status, out, _ = run("validate", path, "--format", "github")
    assert status == 1
    assert out.startswith(f"::error file={path},line=1,col=1,title=kvfleet ")


def test_a_valid_file_as_json(fleet: Path) -> None:
    """What was checked, for programs."""
    _, out, _ = run("validate", fleet, "--format", "json")
    shown = json.loads(out)
    assert shown["valid"] is True
    assert shown["files"][0]["models"] == ["cheap", "dear"]
    assert "select.cost_first" in shown["files"][0]["stages"]


def test_online_asks_the_backends(write: Callable[..., Path]) -> None:
    """A replica that is down is a finding at its model."""
    path = write(
        "models:\n  - {name: up, provider: mock}\n  - {name: gone, provider: mock, options: {fail: connect}}\n"
    )
    assert run("validate", path)[0] == 0
    status, out, _ = run("validate", path, "--online")
    assert status == 1
    assert out.splitlines()[0].startswith(f"{path}:3:")
    assert "mock://gone is down" in out


def test_without_a_file_the_variable_names_it(fleet: Path) -> None:
    """KVFLEET_CONFIG is the default; without it, a usage error says what to do."""
    assert run("validate", KVFLEET_CONFIG=str(fleet))[0] == 0
    assert run("graph", KVFLEET_CONFIG=str(fleet))[0] == 0
    for command in ("validate", "graph", "simulate", "fleet"):
        status, _, err = run(command)
        assert status == 2
        assert "no fleet file: name one, or set KVFLEET_CONFIG" in err


@pytest.mark.parametrize("command", ["graph", "simulate", "explain", "fleet", "health"])
def test_a_bad_file_is_told_alike_by_all(command: str, write: Callable[..., Path], tmp_path: Path) -> None:
    """Findings on standard error, exit status 1, no traceback; the same under --json on standard output."""
    path = write("models: []\n")
    status, out, err = run(command, path)
    assert (status, out) == (1, "")
    assert err.startswith(f"{path}:1:1: models: ")
    status, out, err = run(command, path, "--json")
    assert (status, err) == (1, "")
    assert json.loads(out)["findings"][0]["path"] == "models"
    status, _, err = run(command, tmp_path / "none.yaml")
    assert (status, err) == (1, f"Error: {tmp_path / 'none.yaml'}: no such file or directory\n")


def test_the_graph_is_drawn(fleet: Path) -> None:
    """As text, Mermaid, dot and JSON."""
    assert run("graph", fleet)[1].startswith("request\n├ ")
    assert run("graph", fleet, "--format", "mermaid")[1].startswith("flowchart TD")
    assert run("graph", fleet, "--format", "dot")[1].startswith("digraph pipeline {")
    assert "select" in [stage["kind"] for stage in json.loads(run("graph", fleet, "--json")[1])]


def test_the_expanded_pipeline_can_be_pasted(fleet: Path, write: Callable[..., Path]) -> None:
    """The file with the printed section decides by the same stages, and expands to itself."""
    _, expanded, _ = run("graph", fleet, "--expand")
    pasted = write(fleet.read_text() + expanded, "pasted.yaml")
    status, out, _ = run("validate", pasted)
    assert status == 0, out
    assert run("graph", pasted)[1] == run("graph", fleet)[1]
    assert run("graph", pasted, "--expand")[1] == expanded


def test_a_graph_of_a_broken_pipeline_comes_with_its_findings(write: Callable[..., Path]) -> None:
    """What can be drawn is drawn; the rest is told, exit status 1."""
    path = write("models:\n  - {name: a, provider: mock}\npipeline:\n  - filter.health\n  - select.cost_first\n")
    status, out, err = run("graph", path)
    assert status == 1
    assert "filter.health" in out
    assert "execute" in err


def test_the_schema_is_a_json_schema() -> None:
    """With every section of a file, and the options of the components."""
    status, out, _ = run("schema")
    schema = json.loads(out)
    assert status == 0
    assert {"models", "strategy", "pipeline", "tests"} <= set(schema["properties"])


def test_a_plugin_resolves_the_secrets_of_its_kind(tmp_path: Path) -> None:
    """A reference to a vault is read by the plugin that knows the vault; without it, it is a finding."""
    path = tmp_path / "fleet.yaml"
    path.write_text("models:\n  - {name: a, provider: vllm, endpoint: 'http://a:1', api_key: 'vault:kv/a'}\n")
    assert run("validate", path)[0] == 1
    code = (
        "from kvfleet.plugin.spec import hookimpl\n"
        "@hookimpl\n"
        "def kvfleet_secret(reference):\n"
        "    return 'hunter2' if reference == 'vault:kv/a' else None\n"
    )
    install(tmp_path, "acme-vault", code)
    done = kvfleet(tmp_path, "validate", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hunter2" not in done.stdout + done.stderr


def test_a_header_that_must_not_pass_is_a_finding(write: Callable[..., Path]) -> None:
    """What the gateway would refuse at its start, `validate` finds before."""
    path = write("models:\n  - {name: small, provider: mock}\ngateway:\n  passthrough_headers: [X-Ok, Authorization]\n")
    status, out, _ = run("validate", path)
    assert status == 1
    assert f"{path}:4:31: gateway.passthrough_headers[1]: Authorization cannot be passed through; take it out" in out
