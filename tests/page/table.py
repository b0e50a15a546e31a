"""Runs every test that a promise of the feature page names, and prints a table: ``python -m tests.page.table``.

It fails if a promise has no test, if a test does not exist, or if one does not pass.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import attrs
import pytest

from tests.page.promises import Promise, belongs, read_promises

__all__ = ["Results", "Row", "main", "rows"]

_WIDTH = 88


@attrs.define
class Results:
    """A pytest plugin that keeps how each test ended.

    Attributes:
        outcomes: By node id: passed, failed, skipped or error.
    """

    outcomes: dict[str, str] = attrs.field(factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one phase; whatever went wrong first stays."""
        known = self.outcomes.get(report.nodeid, "passed")
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome if known == "passed" else known


@attrs.frozen
class Row:
    """What the table says of one promise.

    Attributes:
        promise: The promise.
        tests, live: How its tests ended, each by their number.
        missing: Node ids behind which there was nothing.
    """

    promise: Promise
    tests: Mapping[str, int]
    live: Mapping[str, int]
    missing: tuple[str, ...]

    @property
    def is_kept(self) -> bool:
        """True if there are tests, all of them are there, none failed, and not all were skipped."""
        ended = {*self.tests, *self.live}
        return "passed" in ended and ended <= {"passed", "skipped"} and not self.missing

    def cells(self) -> tuple[str, str, str, str]:
        """Name, tests, live tests and verdict."""
        name = self.promise.name if len(self.promise.name) <= _WIDTH else f"{self.promise.name[: _WIDTH - 1]}…"
        return name, _counted(self.tests), _counted(self.live), "kept" if self.is_kept else "NOT KEPT"


def rows(promises: Iterable[Promise], outcomes: Mapping[str, str]) -> list[Row]:
    """The table's rows, from how every test ended."""
    found = []
    for promise in promises:
        ended = {node: [how for test, how in outcomes.items() if belongs(test, node)] for node in promise.nodes}
        missing = tuple(node for node, hows in ended.items() if not hows)
        counts = [
            Counter(how for node in dict.fromkeys(nodes) for how in ended[node])
            for nodes in (promise.tests, promise.live)
        ]
        found.append(Row(promise, counts[0], counts[1], missing))
    return found


def _counted(outcomes: Mapping[str, int]) -> str:
    if set(outcomes) <= {"passed"}:
        return str(outcomes.get("passed", "-"))
    return ", ".join(f"{count} {how}" for how, count in sorted(outcomes.items()))


def shown(table: Sequence[Row]) -> str:
    """The table as text, a part under the other."""
    lines: list[str] = []
    part = ""
    for row in table:
        if row.promise.part != part:
            part = row.promise.part
            lines += ["", f"{part.capitalize():{_WIDTH}}  {'tests':>8}  {'live':>8}"]
        name, tests, live, verdict = row.cells()
        lines.append(f"{name:{_WIDTH}}  {tests:>8}  {live:>8}  {verdict}")
        lines += [f"    there is no {node}" for node in row.missing]
    kept = sum(row.is_kept for row in table)
    return "\n".join([*lines, "", f"{len(table)} promises, {kept} kept"])


def main(arguments: Sequence[str] = ()) -> int:
    """Run the tests and print the table; 0 if every promise is kept."""
    promises = read_promises()
    nodes = list(dict.fromkeys(node for promise in promises for node in promise.nodes))
    results = Results()
    status = pytest.main(["-q", "-p", "no:cacheprovider", *arguments, *nodes], plugins=[results])
    table = rows(promises, results.outcomes)
    print(shown(table))  # noqa: T201 - what it is for
    return 0 if status == pytest.ExitCode.OK and all(row.is_kept for row in table) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
