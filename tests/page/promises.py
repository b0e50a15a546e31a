"""What the feature page promises (`features.toml`), and whether the tests named there exist."""

from __future__ import annotations

import ast
import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs

__all__ = ["ROOT", "Promise", "belongs", "exists", "read_promises"]

ROOT = Path(__file__).parent.parent.parent


@attrs.frozen
class Promise:
    """One promise and its tests.

    Attributes:
        part: A row of the key features, a section, or a heading of what must hold.
        name: The promise itself, or its title.
        tests: Node ids, without parameters; a file stands for all that is in it.
        live: Those that ask a running gateway.
    """

    part: str
    name: str
    tests: tuple[str, ...]
    live: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.tests, *self.live)))


def read_promises() -> tuple[Promise, ...]:
    """Every promise, in the page's order."""
    found = tomllib.loads(Path(__file__).with_name("features.toml").read_text())["promise"]
    return tuple(
        Promise(one["part"], one["name"], tuple(one.get("tests", ())), tuple(one.get("live", ()))) for one in found
    )


def belongs(test: str, node: str) -> bool:
    """True if a collected test is one that a node id means: itself, or within its file or class.

    >>> belongs("a.py::T::test_x[1]", "a.py"), belongs("a.py::test_xy", "a.py::test_x")
    (True, False)
    """
    return test.partition("[")[0] == node or test.startswith((f"{node}::", f"{node}["))


def exists(node: str) -> bool:
    """True if there is such a test; read from the source, so that nothing is imported."""
    path, _, name = node.partition("::")
    found = _tests_of(ROOT / path)
    return any(belongs(f"{path}::{test}", node) for test in found) if name else bool(found)


@functools.cache
def _tests_of(path: Path) -> frozenset[str]:
    return frozenset(_named(ast.parse(path.read_text()).body)) if path.is_file() else frozenset()


def _named(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}::{test}" for test in _named(node.body))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name
