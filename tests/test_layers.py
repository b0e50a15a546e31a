"""The floors: a file imports only from lower floors, and nothing goes in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "kvfleet"

# Lowest first. The longest matching prefix decides; folders on one floor may not import each other unless listed so.
FLOORS = (
    (
        "kvfleet.background",
        "kvfleet.clock",
        "kvfleet.money",
        "kvfleet.sqlite",
        "kvfleet.turns",
        "kvfleet.config.findings",
        "kvfleet.trace.spans",
        "kvfleet.trace.names",
    ),
    ("kvfleet.errors",),
    ("kvfleet.config",),
    ("kvfleet.adapters", "kvfleet.sim", "kvfleet.trace"),
    ("kvfleet.router", "kvfleet.policy", "kvfleet.cache", "kvfleet.telemetry", "kvfleet.registry", "kvfleet.eval"),
    ("kvfleet.plugin",),
    ("kvfleet.builtin", "kvfleet.pipeline"),
    ("kvfleet.runtime",),
    ("kvfleet.gateway", "kvfleet.mock", "kvfleet.sdk", "kvfleet.testing", "kvfleet.replay"),
    ("kvfleet.cli",),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ["kvfleet", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """The package's modules that a file imports; those under TYPE_CHECKING do not run, and are left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvfleet"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("kvfleet")}
    return found & MODULES.keys()


def floor(module: str) -> int:
    """The floor a module stands on."""
    best, at = "", -1
    for level, prefixes in enumerate(FLOORS):
        for prefix in prefixes:
            if (module == prefix or module.startswith(prefix + ".")) and len(prefix) > len(best):
                best, at = prefix, level
    return at


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"kvfleet"}))
def test_a_module_imports_only_from_its_own_floor_or_below(module: str) -> None:
    """No arrow points upward, function-level imports included."""
    assert floor(module) >= 0, f"{module} stands on no floor: add it to FLOORS"
    upward = {other for other in imports(MODULES[module]) if other != "kvfleet" and floor(other) > floor(module)}
    assert not upward


def test_there_is_no_import_circle() -> None:
    """Following imports never leads back to where one began."""
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
