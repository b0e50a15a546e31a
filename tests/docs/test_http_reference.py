"""The page on the HTTP API says what the gateway does: its tables are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import attrs

from kvfleet import errors
from kvfleet.config.fields import info_of
from kvfleet.config.schema import FleetConfig, GatewayConfig, ModelConfig
from kvfleet.errors import Fault, RouteError
from kvfleet.gateway.app import Gateway
from kvfleet.gateway.table import Access
from kvfleet.runtime import Router
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "reference" / "http.md"
RAISING = ("router", "gateway", "pipeline", "builtin")


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, as the texts of their cells without backticks."""
    _, _, rest = PAGE.read_text().partition(f"\n## {heading}\n")
    section = rest.partition("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert table is not None, f"there is no table below {heading}"
    lines = table[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in lines]


def calls_of(tree: ast.AST) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Calls of names, with their keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, {one.arg: one.value for one in node.keywords if one.arg}


def codes_in(path: Path) -> Iterator[str]:
    """The error codes a module writes: in errors it raises and refusals it gives, beside a status, and in an error object."""
    tree = ast.parse(path.read_text())
    found: list[ast.expr | None] = [
        words.get("code") for name, words in calls_of(tree) if name.endswith(("Error", "Refusal"))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple) and len(node.elts) >= 2:
            status = node.elts[-2]
            if isinstance(status, ast.Constant) and isinstance(status.value, int) and status.value >= 400:
                found.append(node.elts[-1])
        if isinstance(node, ast.Dict):
            found += [value for key, value in zip(node.keys, node.values, strict=True) if _text(key) == "code"]
        if isinstance(node, ast.Assign) and _text(node.targets[0]) == "_AS_IT_IS" and isinstance(node.value, ast.Dict):
            found += node.value.values
    yield from (code for one in found if (code := _text(one)))


def _text(node: ast.AST | None) -> str:
    if isinstance(node, ast.Name):
        return node.id if node.id.startswith("_") else ""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


_KEY = {Access.OPEN: "no", Access.KEY: "yes", Access.ADMIN: "admin's"}


def test_every_route_is_told_with_who_may_call_it() -> None:
    """Method, path, and whether a key is asked for."""
    router = Router(FleetConfig(models=(ModelConfig(name="m", provider="mock", endpoint="mock://m"),)))
    told = [(method, path, key) for method, path, key, *_ in rows("Endpoints")]
    routes = Gateway(router).routes
    assert sorted(told) == sorted((r.method, r.path, _KEY[r.access]) for r in routes)


def test_every_configurable_header_is_told() -> None:
    """Its option, and its default."""
    told = {option.removeprefix("gateway."): header for header, option, *_ in rows("Request headers") if option}
    options = {a.name: a.default for a in attrs.fields(GatewayConfig) if a.name.endswith("_header")}
    assert all(info_of(a) is not None for a in attrs.fields(GatewayConfig) if a.name in options)
    assert {option: header.removeprefix("none") for option, header in told.items()} == options


def test_every_response_header_is_told() -> None:
    """Every `x-kvfleet-…` header that the gateway's code names, and those of retries."""
    source = "".join(path.read_text() for path in (ROOT / "kvfleet" / "gateway").glob("*.py"))
    told = {header for cell, *_ in rows("Response headers") for header in cell.split(", ")}
    assert set(re.findall(r'\(b"(x-kvfleet-[a-z]+)"', source)) <= told
    assert {"x-request-id", "server-timing", "retry-after", "x-should-retry"} <= told


def test_every_error_code_is_told() -> None:
    """The codes on the page are those in the code, no more and no fewer."""
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, RouteError)]
    modules = [path for folder in RAISING for path in (ROOT / "kvfleet" / folder).rglob("*.py")]
    in_code = {kind.code for kind in kinds} | {code for path in modules for code in codes_in(path)}
    told = {code for code, *_ in rows("Errors")}
    assert told == in_code


def test_the_status_of_an_error_is_that_of_its_class() -> None:
    """For every error class, its code stands with its status."""
    told = {code: status for code, status, *_ in rows("Errors")}
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, RouteError)]
    wrong = {kind.code: told[kind.code] for kind in kinds if str(kind.status) not in told[kind.code]}
    assert wrong == {}


def test_every_fault_is_told() -> None:
    """What may be wrong with one backend call, by the name traces show, and whether breakers count it."""
    told = [(fault, counts) for fault, _, _, counts in rows("Faults")]
    assert told == [(fault.value, "yes" if fault.counts_against_replica else "no") for fault in Fault]
