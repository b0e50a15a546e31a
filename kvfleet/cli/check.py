"""``kvfleet validate``, ``graph`` and ``schema``: fleet files, looked at without running them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
import ruamel.yaml

from kvfleet.cli import render
from kvfleet.cli.options import config_argument, json_option, named_files, read_fleet, reports
from kvfleet.config import jsonschema
from kvfleet.config.expand import expand as expand_sections
from kvfleet.config.findings import Finding
from kvfleet.config.loader import check_config
from kvfleet.config.schema import FleetConfig, StageConfig
from kvfleet.gateway.headers import header_findings
from kvfleet.pipeline.build import check
from kvfleet.pipeline.graph import StageView, as_dot, as_mermaid, as_text, describe
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.registry.models import ModelRegistry
from kvfleet.testing.vocabulary import Case

__all__ = ["Checked", "check_file", "graph", "pipeline_yaml", "schema", "validate"]


@attrs.frozen
class Checked:
    """What a check of one file found; the configuration is None if it could not be read."""

    path: Path
    config: FleetConfig | None
    stages: tuple[StageView, ...]
    findings: tuple[Finding, ...]


def check_file(path: Path, table: ComponentTable) -> Checked:
    """Check one file: syntax, vocabulary, components and their options, order, facts, references."""
    try:
        config, found = check_config(path, resolvers=(table.secret,))
    except OSError as error:
        what = (error.strerror or type(error).__name__).lower()
        return Checked(path, None, (), (Finding(what, file=str(path), code="file"),))
    if config is None:
        return Checked(path, None, (), tuple(found))
    more = (*header_findings(config.gateway, config.origin), *check(config, table))
    everything = (*found, *(one for one in more if one not in found))
    return Checked(path, config, describe(config, table), everything)


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(path_type=Path))
@click.option("--online", is_flag=True, help="Also ask every backend whether it is up.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "github"]),
    default="text",
    show_default=True,
    help="How findings are printed; github makes annotations of a workflow run.",
)
@json_option
@click.pass_context
@reports
def validate(ctx: click.Context, files: Sequence[Path], *, online: bool, form: str, as_json: bool) -> None:
    """Check fleet files and print every finding as file:line:column: path: what is wrong; what to do.

    Checked are the syntax, the vocabulary, the components and their options, the order of the stages, the facts they
    need, and every reference. Nothing is connected to, unless --online. Exit status 1 if there are findings.
    """
    paths = named_files(ctx, files)
    table = discover()
    checked = [check_file(path, table) for path in paths]
    if online:
        checked = [_with_health(one, table) for one in checked]
    form = "json" if as_json else form
    if form == "json":
        render.echo_json({"valid": not any(c.findings for c in checked), "files": [_as_json(c) for c in checked]})
    for one in checked:
        if form == "github":
            for finding in one.findings:
                render.echo(render.github_line(finding))
        elif form == "text":
            _print(one)
    if any(one.findings for one in checked):
        ctx.exit(1)


def _print(one: Checked) -> None:
    if one.findings:
        render.findings(one.findings)
    elif one.config is not None:
        render.echo(f"{render.good('✓')} {render.bold(str(one.path))} is valid")
        render.echo(render.fields(_facts(one.config, one.stages)))


def _facts(config: FleetConfig, stages: Sequence[StageView]) -> list[tuple[str, str]]:
    replicas = ModelRegistry.from_configs(config.models).replicas
    models = render.count(len(config.models), "model")
    more = f" on {render.count(len(replicas), 'replica')}" if len(replicas) != len(config.models) else ""
    strategy = next((stage.key for stage in stages if stage.kind == "select"), "")
    origin = "as written" if config.pipeline else "made from the sections"
    plugins = sorted({stage.distribution for stage in stages} - {"kvfleet", ""})
    return [
        ("fleet", config.fleet_name),
        ("models", f"{models}{more}: {_some([model.name for model in config.models])}"),
        ("pipeline", f"{render.count(len(stages), 'stage')}, {origin}"),
        ("strategy", strategy),
        ("plugins", ", ".join(plugins)),
        ("tests", f"{len(config.tests)}, not run here: `kvfleet test` runs them" if config.tests else ""),
    ]


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _with_health(one: Checked, table: ComponentTable) -> Checked:
    """The check with a finding for every replica that is down."""
    if one.findings or one.config is None:
        return one
    from kvfleet.cli.fleet import check_health  # noqa: PLC0415 - brings in the HTTP client, which only --online needs

    config = one.config
    index = {model.name: place for place, model in enumerate(config.models)}
    down = [
        config.origin.finding(
            ("models", index[model.name]),
            f"{model.endpoint} is down: {health.error or 'no answer'}",
            "start it, or set `enabled: false`",
            code="down",
        )
        for model, health in check_health(config, table)
        if not health.healthy
    ]
    return attrs.evolve(one, findings=tuple(down))


def _as_json(one: Checked) -> dict[str, Any]:
    config = one.config
    return {
        "file": str(one.path),
        "valid": not one.findings,
        "fleet": config.fleet_name if config else None,
        "models": [model.name for model in config.models] if config else [],
        "stages": [stage.key for stage in one.stages],
        "findings": [finding.to_dict() for finding in one.findings],
    }


@click.command()
@config_argument()
@click.option("--expand", is_flag=True, help="Print the pipeline as YAML that can be pasted into the file.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "mermaid", "dot"]),
    default="text",
    show_default=True,
    help="How it is drawn.",
)
@json_option
@click.pass_context
@reports
def graph(ctx: click.Context, config: Path, *, expand: bool, form: str, as_json: bool) -> None:
    """Draw the pipeline: its stages in order, the facts they need and give, and where a route may end.

    A file without `pipeline:` has one made from its sections; --expand prints that one as YAML.
    """
    table = discover()
    settings = read_fleet(config, table)
    if expand:
        stages = settings.pipeline or expand_sections(settings)
        if as_json:
            render.echo_json(_entries(stages))
        else:
            render.echo(pipeline_yaml(stages).rstrip())
        return
    views = describe(settings, table)
    if as_json:
        render.echo_json([attrs.asdict(view) for view in views])
    else:
        render.echo({"text": as_text, "mermaid": as_mermaid, "dot": as_dot}[form](views))
    found = check(settings, table)
    if found:
        render.findings(found, err=True)
        ctx.exit(1)


def _entries(stages: Sequence[StageConfig]) -> list[Any]:
    """The stages as they are written in ``pipeline:``."""
    return [_entry(stage) for stage in stages]


def _entry(stage: StageConfig) -> Any:
    full = {"use": stage.use, "name": stage.name, "on_error": stage.on_error, "with": _plain(stage.options)}
    kept = {key: value for key, value in full.items() if value}
    return stage.use if list(kept) == ["use"] else kept


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def pipeline_yaml(stages: Sequence[StageConfig]) -> str:
    """The stages as a ``pipeline:`` section.

    >>> print(pipeline_yaml([StageConfig(use="filter.health"), StageConfig(use="execute.fallback", options={"n": 2})]))
    pipeline:
      - filter.health
      - use: execute.fallback
        with:
          n: 2
    <BLANKLINE>
    """
    yaml = ruamel.yaml.YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 110
    stream = io.StringIO()
    yaml.dump({"pipeline": _entries(stages)}, stream)
    return stream.getvalue()


@click.command()
@reports
def schema() -> None:
    """Print the JSON Schema of fleet files, with the options of every installed component.

    \b
    kvfleet schema > fleet.schema.json

    and a first line `# yaml-language-server: $schema=fleet.schema.json` make an editor check and complete a file.
    """  # noqa: D301 - click's mark for lines that stay as they are
    render.echo_json(jsonschema.schema(discover().components, case=Case))
