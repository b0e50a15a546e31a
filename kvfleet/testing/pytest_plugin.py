"""The pytest plugin that collects pipeline tests from YAML files.

It collects the files named on the command line that have `tests:`, and those under the paths of the ini option
``kvfleet_pipelines``. It is loaded into every pytest run of an environment where kvfleet is installed, so it imports
nothing of kvfleet before there is such a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvfleet.plugin.manager import ComponentTable
    from kvfleet.testing.cases import CaseResult, PlacedCase

__all__ = ["PipelineFile", "PipelineItem"]

_SUFFIXES = (".yaml", ".yml")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The ini option that says where pipelines with tests are."""
    parser.addini(
        "kvfleet_pipelines",
        type="paths",
        default=[],
        help="Files and folders of kvfleet pipelines whose tests are run.",
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect a YAML file that was asked for and has tests."""
    if file_path.suffix not in _SUFFIXES or not _is_wanted(file_path, parent):
        return None
    from kvfleet.testing.cases import has_tests  # noqa: PLC0415 - see the module's docstring

    if not has_tests(file_path):
        return None
    return PipelineFile.from_parent(parent, path=file_path)


def _is_wanted(file_path: Path, parent: pytest.Collector) -> bool:
    if parent.session.isinitpath(file_path):
        return True
    roots: list[Path] = parent.config.getini("kvfleet_pipelines")
    return any(file_path == root or root in file_path.parents for root in map(Path.resolve, roots))


class PipelineFile(pytest.File):
    """A pipeline file; its cases are the items."""

    def collect(self) -> Iterator[pytest.Item]:
        """The cases; what is wrong with the file is a collection error, with every finding."""
        from kvfleet.plugin.manager import discover  # noqa: PLC0415 - see the module's docstring
        from kvfleet.testing.cases import load_suite  # noqa: PLC0415

        table = discover()
        suite = load_suite(_shown(self.path), table=table)
        if suite.findings:
            raise self.CollectError("\n".join(map(str, suite.findings)))
        for placed in suite.cases:
            yield PipelineItem.from_parent(self, name=placed.case.name, placed=placed, table=table)


def _shown(path: Path) -> Path:
    """The file as people name it: from where they are."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


class PipelineItem(pytest.Item):
    """One case."""

    def __init__(self, *, placed: PlacedCase, table: ComponentTable, **rest: Any) -> None:
        super().__init__(**rest)
        self.placed = placed
        self.table = table

    def runtest(self) -> None:
        """Run it through the engine."""
        from kvfleet.testing.cases import run_placed  # noqa: PLC0415 - see the module's docstring

        result = run_placed(self.placed, self.table)
        if not result.passed:
            raise CaseFailure(result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What was expected, what came, and the decision; no Python traceback."""
        if isinstance(excinfo.value, CaseFailure):
            return excinfo.value.result.text()
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """File, line (from 0) and name, as reports show them."""
        return self.path, max(self.placed.line - 1, 0), self.name


class CaseFailure(Exception):  # noqa: N818 - it is a failure, and not an error
    """A case that did not hold."""

    def __init__(self, result: CaseResult) -> None:
        super().__init__(result.name)
        self.result = result
