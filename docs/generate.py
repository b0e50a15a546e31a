"""Writes the reference pages from the code: ``python docs/generate.py``; with ``--check`` it only compares.

Nothing on these pages is written by hand, so nothing on them can be out of date.
"""

from __future__ import annotations

import argparse
import collections.abc
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard, Union, get_args, get_origin

import attrs
import click

from kvfleet.cli.main import cli
from kvfleet.config.jsonschema import schema
from kvfleet.config.options import Option, options
from kvfleet.config.schema import FleetConfig
from kvfleet.plugin import spec
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.telemetry.metric_table import METRICS
from kvfleet.testing import vocabulary
from kvfleet.trace.reference import names_markdown

HERE = Path(__file__).parent / "reference"
WRITTEN_BY = "<!-- Written by docs/generate.py; edit the code it describes. -->\n"

KINDS = {
    Kind.CLASSIFY: "Find facts about the request, for later stages to use.",
    Kind.ADMIT: "Let the request in, or refuse it early.",
    Kind.FILTER: "Drop candidates, each with a reason.",
    Kind.ANSWER: "Answer without a backend.",
    Kind.AFFINITY: "Expect what each candidate has of the prompt in its KV cache.",
    Kind.SCORE: "Give each candidate a number, in a unit.",
    Kind.SELECT: "Rank the candidates: the strategies.",
    Kind.EXECUTE: "Get the answer from the ranked candidates.",
    Kind.OBSERVE: "Learn how routes ended.",
    Kind.ADAPTER: "Speak to an engine; a model's `provider` names one, its `options` are set under `options:`.",
    Kind.ACTION: "What a policy rule does; its `action` names one.",
    Kind.JUDGE: "Say how good an answer is; `execute.escalate` and `observe.judge` ask them.",
}


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", r"\|") or " "


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *([cell(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def type_text(option: Option) -> str:
    """A type in the words of the page."""
    if option.info.choices:
        return ", ".join(f"`{word}`" for word in option.info.choices)
    return words_for(option.type)


WORDS = {str: "text", bool: "yes or no", int: "whole number", float: "number", type(None): "nothing", Any: "anything"}


def words_for(hint: Any) -> str:
    """A type hint in plain words."""
    if hint in WORDS:
        return WORDS[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(words_for(part) for part in inner if part is not type(None))
    if origin in (tuple, list, collections.abc.Sequence):
        return f"list of {words_for(inner[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"mapping of names to {words_for(inner[1])}"
    return f"`{getattr(hint, '__name__', hint)}`"


def default_text(option: Option) -> str:
    """A default as YAML has it."""
    default = option.attribute.default
    if default is attrs.NOTHING:
        return "**required**"
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return " "
    if default in (None, "", ()):
        return " "
    return f"`{json.dumps(default)}`"


def range_text(option: Option) -> str:
    """Bounds and unit."""
    info = option.info
    bounds = [
        f"{sign} {value:g}"
        for sign, value in ((">=", info.ge), (">", info.gt), ("<=", info.le), ("<", info.lt))
        if value is not None
    ]
    return " ".join([", ".join(bounds), info.unit]).strip()


def option_table(found: Iterable[Option]) -> str:
    """The options of a class."""
    rows = [(f"`{o.name}`", type_text(o), default_text(o), range_text(o), o.info.doc) for o in found]
    return table(("Key", "Type", "Default", "Range, unit", "What it is"), rows) if rows else "No options.\n"


def described(cls: type) -> list[Option]:
    """The described options of a class; an adapter's common fields are not options."""
    return [option for option in options(cls).values() if option.info.doc]


def configuration(_: ComponentTable) -> str:
    """The fleet file."""
    parts = ["# Fleet file\n", "Every key, from the same descriptions that check a file. Unknown keys are findings.\n"]
    seen: list[type] = []

    def walk(cls: type, title: str) -> None:
        seen.append(cls)
        parts.append(f"## {title}\n\n{inspect.getdoc(cls)}\n\n{option_table(described(cls))}")
        for option in options(cls).values():
            for inner in sections_in(option.type):
                if inner not in seen:
                    walk(inner, f"`{option.name}`")

    walk(FleetConfig, "The file")
    return "\n".join(parts)


def sections_in(hint: Any) -> list[type]:
    """The attrs classes in a type."""
    if isinstance(hint, type) and attrs.has(hint):
        return [hint] if hint.__name__ != "StageConfig" else []
    return [inner for part in getattr(hint, "__args__", ()) for inner in sections_in(part)]


def components(found: ComponentTable) -> str:
    """The built-in components."""
    parts = ["# Components\n", "What comes with kvfleet. `kvfleet components` also lists what your plugins bring.\n"]
    for kind in Kind:
        own = [c for c in found.of_kind(kind) if c.distribution == "kvfleet"]
        if own:
            parts.append(f"## {kind}\n\n{KINDS[kind]}\n")
            parts += [component(c) for c in own]
    return "\n".join(parts)


def component(c: Component) -> str:
    """One component."""
    name = c.key if c.kind.is_stage else c.name
    lines = [f"### {name}\n", f"{inspect.getdoc(c.cls)}\n".replace("\n    ", "\n")]
    facts = []
    if c.needs:
        facts.append("needs " + ", ".join(f"`{fact.name}`" for fact in c.needs))
    if c.gives:
        facts.append("gives " + ", ".join(f"`{fact.name}`" for fact in c.gives))
    if c.must_hold:
        facts.append("must hold: it cannot be skipped")
    if c.aliases:
        facts.append("also called " + ", ".join(f"`{alias}`" for alias in c.aliases))
    facts.append(c.stability.value)
    lines += [f"*{'; '.join(facts)}*\n", option_table(described(c.cls))]
    return "\n".join(lines)


COMMAND_LINE = """`kvfleet COMMAND --help` says the same. Exit status: 0 for success, 1 for what was found to be wrong
(findings, failed tests, nobody left), 2 for a wrong command line.
"""


def command_line(_: ComponentTable) -> str:
    """Every command's help, from its parameters: the same whatever version of click prints it in a terminal."""
    parts = ["# Command line\n", COMMAND_LINE]

    def walk(command: click.Command, path: str) -> None:
        parts.append(f"## `{path}`\n\n```text\n{path}{usage(command)}\n```\n\n{help_of(command)}\n")
        rows = [(opts_of(p), sentence(p.help or ""), default_of(p)) for p in command.params if is_shown(p)]
        if rows:
            parts.append(table(("Option", "What it does", "Default"), rows))
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                if inner is not None and not inner.hidden:
                    walk(inner, f"{path} {name}")

    walk(cli, "kvfleet")
    return "\n".join(parts)


def is_shown(param: click.Parameter) -> TypeGuard[click.Option]:
    """True for an option that has a help text."""
    return isinstance(param, click.Option) and bool(param.help) and not param.hidden


def usage(command: click.Command) -> str:
    """What follows the command's name."""
    words = [" [OPTIONS]"] if any(is_shown(p) for p in command.params) else []
    words += [f" {p.metavar or p.human_readable_name}" for p in command.params if isinstance(p, click.Argument)]
    return "".join(words) + (" COMMAND [ARGS]..." if isinstance(command, click.Group) else "")


def help_of(command: click.Command) -> str:
    """The help text as Markdown; what click must not wrap becomes a block of code."""
    return "\n\n".join(map(_paragraph, inspect.cleandoc(command.help or "").split("\n\n")))


def _paragraph(text: str) -> str:
    code = re.sub(r"\A(?:\x08|\\b)\n", "", text)
    return text if code == text else f"```text\n{code}\n```"


def sentence(text: str) -> str:
    """A help text, ended as a sentence."""
    return text if text.endswith((".", "…")) else f"{text}."


def opts_of(option: click.Option) -> str:
    """An option's names, and what it takes."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    kind = option.type
    if option.is_flag:
        return names
    if isinstance(kind, click.Choice):
        return f"{names} {', '.join(map(str, kind.choices))}"
    if isinstance(kind, click.Path):
        return f"{names} path"
    is_number = isinstance(kind, click.types.IntParamType | click.types.FloatParamType)
    limits = [(word, getattr(kind, name, None)) for word, name in (("from", "min"), ("to", "max"))]
    bounds = [f"{word} {limit:g}" for word, limit in limits if limit]
    return " ".join([names, "number" if is_number else "text", *bounds])


def default_of(option: click.Option) -> str:
    """An option's default, where the help shows it."""
    return f"`{option.default}`" if option.show_default and not callable(option.default) else ""


TESTS = """Words of `tests:` in a fleet file, or in a `*.test.yaml` file that names its pipeline. How they are used:
[write and test a pipeline](../how-to/pipelines.md#test-it).
"""


def tests(_: ComponentTable) -> str:
    """The vocabulary of pipeline tests."""
    parts = ["# Pipeline tests\n", TESTS]
    parts += [f"## {title}\n\n{inspect.getdoc(cls)}\n\n{option_table(described(cls))}" for title, cls in TESTED]
    return "\n".join(parts)


TESTED = (
    ("A test", vocabulary.Case),
    ("`request`", vocabulary.CaseRequest),
    ("`given`", vocabulary.Given),
    ("`given.backends.NAME`", vocabulary.BackendGiven),
    ("`given.load.NAME`", vocabulary.LoadGiven),
    ("`expect`", vocabulary.Expected),
    ("`expect.dropped.NAME`", vocabulary.DropExpected),
    ("`expect.scores.NAME`, `expect.cached.NAME`", vocabulary.Range),
    ("`expect.share.NAME`", vocabulary.Share),
    ("`turns`", vocabulary.Turn),
)


def metrics(_: ComponentTable) -> str:
    """The metrics table."""
    rows = [(f"`{m.name}`", m.type, ", ".join(f"`{label}`" for label in m.labels), m.doc) for m in METRICS]
    head = "# Metrics\n\nServed on `/metrics`, and on `telemetry.prometheus_port` if that is set.\n\n"
    return head + table(("Metric", "Type", "Labels", "What it counts"), rows)


def traces(_: ComponentTable) -> str:
    """Span and attribute names."""
    return f"# Traces\n\nThe record of a decision, and what is exported over OTLP.\n\n{names_markdown()}"


def hooks(_: ComponentTable) -> str:
    """The hookspecs."""
    parts = [f"# Hooks\n\nPlugins implement these, under the entry-point group `{spec.ENTRY_POINT_GROUP}`.\n"]
    for name in spec.__all__:
        if name.startswith("kvfleet_"):
            hook = getattr(spec, name)
            parts.append(
                f"## {name}\n\n```python\ndef {name}{inspect.signature(hook)}\n```\n\n{inspect.getdoc(hook)}\n"
            )
    return "\n".join(parts)


def json_schema(found: ComponentTable) -> str:
    """The JSON Schema that the pipelines' modelines name."""
    own = [c for c in found.components if c.distribution == "kvfleet"]
    return json.dumps(schema(own, case=vocabulary.Case), indent=1) + "\n"


PAGES: dict[str, Callable[[ComponentTable], str]] = {
    "configuration.md": configuration,
    "components.md": components,
    "cli.md": command_line,
    "tests.md": tests,
    "metrics.md": metrics,
    "traces.md": traces,
    "hooks.md": hooks,
    "fleet.schema.json": json_schema,
}


def text_of(name: str, found: ComponentTable) -> str:
    """A page as it should be."""
    return (WRITTEN_BY if name.endswith(".md") else "") + PAGES[name](found)


def stale() -> list[str]:
    """The pages that are not as they should be."""
    found = discover(environ={})
    return [name for name in PAGES if not (HERE / name).exists() or (HERE / name).read_text() != text_of(name, found)]


def main() -> int:
    """Write or compare; 1 if a page is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    if not parser.parse_args().check:
        found = discover(environ={})
        for name in PAGES:
            (HERE / name).write_text(text_of(name, found))
        return 0
    old = stale()
    if old:
        print(f"out of date: {', '.join(old)}; run python docs/generate.py")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
