"""``kvfleet components`` and ``kvfleet plugins``: what there is, who brought it, and what is broken."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click

from kvfleet.cli import render
from kvfleet.cli.options import json_option, reports
from kvfleet.cli.skeleton import KINDS, PluginName, write_plugin
from kvfleet.config.fields import FieldInfo, info_of, options_of
from kvfleet.config.findings import did_you_mean
from kvfleet.errors import ComponentError
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import DISABLE_VARIABLE, ComponentTable, PluginInfo, discover

__all__ = ["components", "plugins"]

_TYPES = {
    "bool": "true/false",
    "float": "number",
    "int": "integer",
    "str": "text",
    "tuple": "list",
    "Mapping": "mapping",
}


@click.command()
@click.argument("name", required=False, metavar="[NAME]")
@click.option("-k", "--kind", type=click.Choice([kind.value for kind in Kind]), help="Only components of this kind.")
@json_option
@reports
def components(name: str | None, kind: str | None, *, as_json: bool) -> None:
    """List the components there are; with NAME, show one with its options.

    NAME is a component as a pipeline writes it (`filter.health`), or its bare name (`vllm`).
    """
    table = discover()
    if name:
        found = _named(table, name)
        if as_json:
            render.echo_json([_full(component) for component in found])
        else:
            render.echo("\n\n".join(_described(component) for component in found))
        return
    listed = [component for component in table.components if kind in (None, component.kind)]
    if as_json:
        render.echo_json([_full(component) for component in listed])
        return
    rows = [[_shown(c), c.stability.value, c.distribution, c.summary] for c in listed]
    render.echo(render.table(["component", "stability", "from", "what it does"], rows, columns=render.width()))
    _hint_at_problems(table)


def _named(table: ComponentTable, name: str) -> Sequence[Component]:
    if "." in name:
        kind, _, bare = name.partition(".")
        if kind in list(Kind):
            return [table.get(Kind(kind), bare)]
    found = [component for component in table.components if name in (component.name, *component.aliases)]
    if not found:
        known = [c.key for c in table.components] + [c.name for c in table.components if not c.kind.is_stage]
        raise ComponentError(f"there is no component {name}; {did_you_mean(name, known)}")
    return found


def _shown(component: Component) -> str:
    return component.key if component.kind.is_stage else f"{component.kind} {component.name}"


def _described(component: Component) -> str:
    brought = f"{component.distribution}, {component.stability}"
    facts = [
        ("needs", ", ".join(fact.name for fact in component.needs)),
        ("gives", ", ".join(fact.name for fact in component.gives)),
        ("from", brought),
        ("on error", "never skipped" if component.must_hold else ""),
    ]
    head = f"{render.bold(_shown(component))}  {component.summary}\n{render.fields(facts)}"
    rows = [
        [option, found["type"], _yaml(found["default"]), found["doc"]]
        for option, found in _options(component.cls).items()
    ]
    if not rows:
        return f"{head}\n  {render.dim('no options')}"
    return f"{head}\n\n{render.table(['option', 'type', 'default', 'meaning'], rows, columns=render.width())}"


def _options(cls: type) -> dict[str, dict[str, Any]]:
    """A component's own options; fields without a description are wiring, not options."""
    found: dict[str, dict[str, Any]] = {}
    for name, attribute in options_of(cls).items():
        info = info_of(attribute)
        if info is not None:
            found[name] = {
                "type": _type(attribute),
                "default": _default(attribute),
                "doc": _meaning(info),
                **_bounds(info),
            }
    return found


def _type(attribute: attrs.Attribute[Any]) -> str:
    kind: Any = attribute.type
    text = kind if isinstance(kind, str) else kind.__name__ if inspect.isclass(kind) else str(kind)
    first = re.split(r"[\[ |]", text.removeprefix("typing.").removeprefix("collections.abc."))[0]
    return _TYPES.get(first, first)


def _default(attribute: attrs.Attribute[Any]) -> Any:
    default: Any = attribute.default
    if default is attrs.NOTHING:
        return "required"
    if hasattr(default, "factory"):
        default = default.factory()
    return default if isinstance(default, str | int | float | Mapping | tuple | None) else None


def _yaml(default: Any) -> str:
    """A default as one would write it, on one line."""
    if default is None or default in ("", (), {}):
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return str(default)


def _meaning(info: FieldInfo) -> str:
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    limits = [f"{sign} {getattr(info, name):g}" for name, sign in signs if getattr(info, name) is not None]
    notes = [info.unit] * bool(info.unit) + limits + [" | ".join(info.choices)] * bool(info.choices)
    return f"{info.doc} ({', '.join(notes)})" if notes else info.doc


def _bounds(info: FieldInfo) -> dict[str, Any]:
    found = {name: getattr(info, name) for name in ("unit", "ge", "gt", "le", "lt", "choices")}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if value not in (None, "", ())
    }


def _full(component: Component) -> dict[str, Any]:
    return {
        "kind": component.kind.value,
        "name": component.name,
        "use": component.key if component.kind.is_stage else component.name,
        "summary": component.summary,
        "stability": component.stability.value,
        "distribution": component.distribution,
        "needs": [fact.name for fact in component.needs],
        "gives": [fact.name for fact in component.gives],
        "must_hold": component.must_hold,
        "options": {
            name: {**found, "default": _plain(found["default"])} for name, found in _options(component.cls).items()
        },
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@click.group(invoke_without_command=True)
@click.option(
    "-v", "--verbose", is_flag=True, help="Show the components of each plugin, and tracebacks of broken ones."
)
@json_option
@click.pass_context
def plugins(ctx: click.Context, *, verbose: bool, as_json: bool) -> None:
    """List the plugins that are installed, broken and disabled ones too; or begin a new one.

    Exit status 1 if a plugin is broken or two bring the same component.
    """
    if ctx.invoked_subcommand is not None:
        return
    table = discover()
    if as_json:
        render.echo_json({"plugins": [_plugin(info) for info in table.plugins], "conflicts": _conflicts(table)})
    else:
        _show_plugins(table, verbose=verbose)
    if table.conflicts or any(info.is_broken for info in table.plugins):
        ctx.exit(1)


def _show_plugins(table: ComponentTable, *, verbose: bool) -> None:
    colour = {"ok": render.good, "disabled": render.dim, "broken": render.bad}
    rows = [
        [info.name, info.distribution, info.version, colour[info.status](info.status), _brings(info)]
        for info in table.plugins
    ]
    render.echo(render.table(["plugin", "from", "version", "state", "brings"], rows, columns=render.width()))
    if problems := _problems(table):
        render.echo("\n" + "\n".join(problems))
        render.echo(f"`kvfleet plugins -v` shows tracebacks; {DISABLE_VARIABLE}=NAME leaves a plugin out")
    if not verbose:
        return
    for info in table.plugins:
        if info.components:
            render.echo(f"\n{render.bold(info.label)}  {render.dim(info.module)}")
            render.echo("\n".join(f"  {_shown(component)}" for component in info.components))
        if info.traceback:
            render.echo(f"\n{render.bold(info.label)}\n{info.traceback.rstrip()}")


def _brings(info: PluginInfo) -> str:
    parts = [render.count(len(info.components), "component")] if info.components else []
    parts += sorted(hook.removeprefix("kvfleet_") for hook in info.hooks if hook != "kvfleet_components")
    return ", ".join(parts)


def _problems(table: ComponentTable) -> list[str]:
    broken = [f"{render.bad('broken')}    {p.label}: {p.cause}" for p in table.plugins if p.is_broken]
    for found in table.conflicts:
        who = " and ".join(component.distribution for component in found)
        broken.append(f"{render.bad('conflict')}  {found[0].key} is brought by {who}; nobody can use it")
    return broken


def _hint_at_problems(table: ComponentTable) -> None:
    """Say on standard error that something is missing in a list of components."""
    if problems := _problems(table):
        render.echo(
            f"{render.warn('Warning:')} {render.count(len(problems), 'problem')}; see `kvfleet plugins`", err=True
        )


def _plugin(info: PluginInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "module": info.module,
        "status": info.status,
        "cause": info.cause,
        "traceback": info.traceback,
        "hooks": list(info.hooks),
        "components": [component.key for component in info.components],
    }


def _conflicts(table: ComponentTable) -> list[dict[str, Any]]:
    return [{"component": found[0].key, "distributions": [c.distribution for c in found]} for found in table.conflicts]


@plugins.command()
@click.argument("name")
@click.option("-k", "--kind", type=click.Choice(list(KINDS)), default="strategy", show_default=True, help="What it is.")
@click.option("--path", type=click.Path(path_type=Path), help="Where to write kvfleet-NAME; here if not given.")
@json_option
@reports
def new(name: str, kind: str, path: Path | None, *, as_json: bool) -> None:
    """Write a working plugin to begin with.

    It is a distribution of its own, kvfleet-NAME, with tests that pass and a pipeline that uses it.
    """
    try:
        spelt = PluginName.of(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="NAME") from error
    taken = [c for c in discover().of_kind(KINDS[kind]) if c.name == spelt.component]
    if taken:
        raise click.BadParameter(f"{taken[0].key} is already brought by {taken[0].distribution}", param_hint="NAME")
    target = (path or Path()) / spelt.distribution
    files = write_plugin(spelt, kind, target)
    if as_json:
        render.echo_json({"path": str(target), "files": [str(file) for file in files]})
        return
    render.echo(f"wrote {render.bold(str(target))}")
    render.echo("\n".join(f"  {file.relative_to(target)}" for file in files))
    steps = [f"cd {target}", "python -m pip install -e . pytest", "pytest", "kvfleet test pipeline.yaml"]
    render.echo("\nnext, in the environment where kvfleet is installed:\n" + "\n".join(f"  {step}" for step in steps))
