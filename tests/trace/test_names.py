"""Names are in one table, from which the reference is made, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import kvfleet
from kvfleet.trace import names
from kvfleet.trace.reference import names_markdown

PACKAGE = Path(kvfleet.__file__).parent
_NAME = re.compile(r"(kvfleet|gen_ai)\.[a-z_<.]*")


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Every text in a module's code that looks like a span's or attribute's name; loggers are named alike, and pass."""
    tree = ast.parse(path.read_text())
    loggers = {
        id(arg) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_logger(node) for arg in node.args
    }
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in loggers)
    for node in texts:
        if isinstance(node.value, str) and _NAME.fullmatch(node.value):
            yield node.lineno, node.value


def _is_logger(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "getLogger"


def is_module(name: str) -> bool:
    """True for the package's own modules, which have names like attributes."""
    place = PACKAGE.parent / Path(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").exists() or place.suffix in (".yaml", ".yml", ".json", ".toml")


def test_no_name_outside_the_table() -> None:
    """No module but the table writes a span's or an attribute's name."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != Path(names.__file__) and "templates" not in path.parts
        for line, name in strings(path)
        if not is_module(name)
    ]
    assert found == []


def test_the_table_is_sound() -> None:
    """Each name stands once, each has a meaning that is a sentence, and a unit where it is a quantity."""
    listed = [attribute.name for attribute in names.ATTRIBUTES]
    assert len(listed) == len(set(listed))
    assert all(entry.doc.endswith(".") for entry in (*names.ATTRIBUTES, *names.SPANS))
    constants = {value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
    prefixes = {names.STAGE_PREFIX, names.FACT_PREFIX, names.TERM_PREFIX, names.INSTEAD_PREFIX}
    assert constants - set(listed) == {names.ROUTE_SPAN, *prefixes}


def test_the_reference() -> None:
    """The reference lists every span and attribute, one a row, in valid Markdown tables."""
    text = names_markdown()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [re.match(r"\| `([^`]+)`", row)[1] for row in rows] == [
        entry.name for entry in (*names.SPANS, *names.ATTRIBUTES)
    ]
    assert {row.count(" | ") for row in rows[len(names.SPANS) :]} == {4}
    assert "| `kvfleet.cost` | route | `double` | usd | What the answer cost; absent if a price is unknown. |" in rows
