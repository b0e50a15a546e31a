"""`kvfleet plugins` and `kvfleet components`: what is there, and what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from kvfleet.cli.main import cli
from tests.cli.running import install, kvfleet

FILTER = (
    "import attrs\n"
    "from kvfleet.plugin.component import Component\n"
    "from kvfleet.plugin.contract import Kind\n"
    "from kvfleet.plugin.spec import hookimpl\n"
    "from kvfleet.config.fields import number\n"
    "@attrs.define\n"
    "class Sieve:\n"
    "    'Drop nobody.'\n"
    "    mesh_ms: float = number(2.5, ge=0, unit='ms', doc='Width.')\n"
    "    def filter(self, ctx):\n"
    "        return ()\n"
    "@hookimpl\n"
    "def kvfleet_components():\n"
    "    yield Component(Kind.FILTER, '{name}', Sieve)\n"
)


def invoke(*args: str) -> Any:
    """Run a command that must succeed, and read its JSON."""
    result = CliRunner().invoke(cli, [*args, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_builtins_are_plugins() -> None:
    """All of kvfleet's own plugins work, and none clashes."""
    shown = invoke("plugins")
    own = [p for p in shown["plugins"] if p["distribution"] == "kvfleet"]
    assert {p["status"] for p in own} == {"ok"}
    assert shown["conflicts"] == []
    assert "filter.health" in [component for p in own for component in p["components"]]


def test_every_component_says_what_it_is() -> None:
    """Each has a summary, and each option a meaning."""
    listed = invoke("components")
    assert [c["use"] for c in listed if not c["summary"]] == []
    assert [(c["use"], name) for c in listed for name, o in c["options"].items() if not o["doc"]] == []


def test_one_kind_can_be_asked_for() -> None:
    """`--kind select` lists the strategies."""
    assert {c["kind"] for c in invoke("components", "--kind", "select")} == {"select"}


def test_a_component_is_shown_with_its_options(tmp_path: Path) -> None:
    """Type, default, unit and range in words."""
    install(tmp_path, "acme-sieve", FILTER.format(name="sieve"))
    assert kvfleet(tmp_path, "components", "filter.sieve").stdout == (
        "filter.sieve  Drop nobody.\n"
        "  from  acme-sieve, beta\n"
        "\n"
        "OPTION   TYPE    DEFAULT  MEANING\n"
        "mesh_ms  number  2.5      Width. (ms, ≥ 0)\n"
    )


def test_an_adapter_is_found_by_its_bare_name() -> None:
    """`kvfleet components vllm` needs no kind."""
    assert [c["kind"] for c in invoke("components", "vllm")] == ["adapter"]


def test_an_unknown_component_gets_the_nearest() -> None:
    """A typo is told on standard error, exit status 1."""
    result = CliRunner().invoke(cli, ["components", "filter.helth"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: there is no filter.helth; did you mean filter.health?")


def test_a_broken_plugin_is_shown_with_its_cause(tmp_path: Path) -> None:
    """The list works, names it, and exits with 1; -v adds the traceback."""
    install(tmp_path, "acme-bad", "raise RuntimeError('out of order')\n")
    done = kvfleet(tmp_path, "plugins")
    assert done.returncode == 1
    assert "broken    acme_bad (acme-bad 1.0): RuntimeError: out of order" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "raise RuntimeError" in kvfleet(tmp_path, "plugins", "-v").stdout


def test_a_broken_plugin_is_hinted_at_in_the_list_of_components(tmp_path: Path) -> None:
    """Who misses a component learns where to look; the list itself stays clean."""
    install(tmp_path, "acme-bad", "raise RuntimeError('out of order')\n")
    done = kvfleet(tmp_path, "components")
    assert done.returncode == 0
    assert done.stderr == "Warning: 1 problem; see `kvfleet plugins`\n"


def test_a_pipeline_that_uses_a_broken_plugin_is_refused_with_the_cause(tmp_path: Path) -> None:
    """Who uses it learns why it is not there; who does not is not bothered."""
    install(tmp_path, "acme-bad", "raise RuntimeError('out of order')\n")
    path = tmp_path / "fleet.yaml"
    path.write_text("strategy: acme\nmodels:\n  - {name: a, provider: mock}\n")
    done = kvfleet(tmp_path, "validate", str(path))
    assert done.returncode == 1
    assert ": plugin acme_bad (acme-bad 1.0) is broken: RuntimeError: out of order;" in done.stdout
    path.write_text("models:\n  - {name: a, provider: mock}\n")
    assert kvfleet(tmp_path, "validate", str(path)).returncode == 0


def test_a_name_that_two_bring_is_a_conflict(tmp_path: Path) -> None:
    """Both distributions are named; leaving one out solves it."""
    install(tmp_path, "acme-sieve", FILTER.format(name="health"))
    done = kvfleet(tmp_path, "plugins")
    assert done.returncode == 1
    assert "conflict  filter.health is brought by acme-sieve and kvfleet; nobody can use it" in done.stdout
    solved = kvfleet(tmp_path, "plugins", KVFLEET_DISABLE_PLUGINS="acme-sieve")
    assert solved.returncode == 0
    assert "disabled" in solved.stdout


def test_piped_output_has_no_colours(tmp_path: Path) -> None:
    """Not an escape code, however it is set up, unless it is forced."""
    assert "\x1b" not in kvfleet(tmp_path, "plugins").stdout
    assert "\x1b" in kvfleet(tmp_path, "plugins", FORCE_COLOR="1").stdout
    assert "\x1b" not in kvfleet(tmp_path, "plugins", FORCE_COLOR="1", NO_COLOR="1").stdout


def test_the_list_of_plugins_is_a_table() -> None:
    """Plugin, distribution, version, state and what it brings."""
    first = CliRunner().invoke(cli, ["plugins"]).output.splitlines()[0]
    assert click.unstyle(first).split() == ["PLUGIN", "FROM", "VERSION", "STATE", "BRINGS"]
