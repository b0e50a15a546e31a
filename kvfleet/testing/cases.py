"""Pipeline tests: `tests:` in a pipeline file, or a ``*.test.yaml`` file that names its pipeline.

They run through the real engine, with fake backends, a frozen clock and a fixed seed; no backend is called, no secret
is read, and no ``KVFLEET__`` variable of the machine counts: a test has the same result everywhere. `run_files` is what
``kvfleet test`` calls; the pytest plugin collects the same cases one by one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.config.convert import structure
from kvfleet.config.fields import listing, text
from kvfleet.config.findings import Finding
from kvfleet.config.findings import Path as Place
from kvfleet.config.loader import check_config
from kvfleet.config.origin import Origin
from kvfleet.config.schema import FleetConfig
from kvfleet.config.secrets import Problem, Secret, SecretReader, is_reference
from kvfleet.config.yaml import parse_yaml
from kvfleet.pipeline.build import check
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.testing.checking import Names, check_case
from kvfleet.testing.expecting import Mismatch
from kvfleet.testing.running import Failure, run_case
from kvfleet.testing.vocabulary import Case

__all__ = ["CaseResult", "PlacedCase", "Report", "Suite", "load_suite", "run_files", "run_placed", "tested_files"]

SUFFIXES = (".yaml", ".yml")
_STAND_IN = "a secret's stand-in"


@attrs.frozen(kw_only=True)
class CaseFile:
    """A file of tests for a pipeline in another file."""

    pipeline: str = text(doc="The pipeline's file, from here.", example="fleet.yaml")
    tests: tuple[Mapping[str, Any], ...] = listing((), doc="The tests.", ge=1)


@attrs.frozen
class PlacedCase:
    """A case, and where it stands."""

    case: Case
    config: FleetConfig
    origin: Origin
    place: Place

    @property
    def line(self) -> int:
        """Its line in the file, from 1; 0 if unknown."""
        return self.origin.finding(self.place, "").line


@attrs.frozen(kw_only=True)
class Suite:
    """The tests of one file.

    Attributes:
        file: The file.
        cases: Its cases; empty if there are findings.
        findings: What is wrong with the pipeline or the tests.
    """

    file: str
    cases: tuple[PlacedCase, ...] = ()
    findings: tuple[Finding, ...] = ()


@attrs.frozen(kw_only=True)
class CaseResult:
    """How one case went.

    Attributes:
        name: The case's.
        file, line: Where it stands.
        duration_s: How long it took.
        mismatches: What was not as expected, each with its place; empty if the case passed.
        summary: The explanation of the request that went wrong.
        note: More in words: which turn or repetition, or the exception that ended it.
    """

    name: str
    file: str
    line: int
    duration_s: float = 0.0
    mismatches: tuple[Finding, ...] = ()
    summary: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        """True if everything held."""
        return not self.mismatches and not self.note

    def text(self) -> str:
        """What a person needs to know of a case that failed."""
        lines = [f"{self.file}:{self.line}: {self.name}{f' ({self.note})' if self.note else ''}"]
        lines += [f"  {mismatch}" for mismatch in self.mismatches]
        if self.summary:
            lines += ["  The decision:", *(f"    {line}" for line in self.summary.splitlines())]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        plain = attrs.asdict(self, recurse=False)
        return plain | {"passed": self.passed, "mismatches": [m.to_dict() for m in self.mismatches]}


@attrs.frozen(kw_only=True)
class Report:
    """How all cases went, and the findings of files whose tests could not run."""

    results: tuple[CaseResult, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def passed(self) -> int:
        """Cases that passed."""
        return sum(result.passed for result in self.results)

    @property
    def failed(self) -> int:
        """Cases that did not."""
        return len(self.results) - self.passed

    @property
    def is_ok(self) -> bool:
        """True if every case passed, and nothing kept a file from being tested."""
        return not self.failed and not self.findings

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {
            "passed": self.passed,
            "failed": self.failed,
            "results": [result.to_dict() for result in self.results],
            "findings": [finding.to_dict() for finding in self.findings],
        }


def run_files(
    paths: Iterable[str | Path],
    *,
    on_case: Callable[[CaseResult], None] | None = None,
    table: ComponentTable | None = None,
) -> Report:
    """Run the tests of files, and of all files in folders.

    Args:
        paths: Files and folders. A file named here must have tests; in a folder those without are passed over.
        on_case: Told of each result as it comes.
        table: The components there are; discovered if None.

    Raises:
        FileNotFoundError: for a path that does not exist.
    """
    table = discover() if table is None else table
    results: list[CaseResult] = []
    findings: list[Finding] = []
    for file in tested_files(paths):
        suite = load_suite(file, table=table)
        findings += suite.findings
        for placed in suite.cases:
            result = run_placed(placed, table)
            results.append(result)
            if on_case is not None:
                on_case(result)
    return Report(results=tuple(results), findings=tuple(findings))


def tested_files(paths: Iterable[str | Path]) -> Iterator[Path]:
    """The files to test: those named, and those in the named folders that have tests, or are no YAML at all.

    Raises:
        FileNotFoundError: for a path that does not exist.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from (file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and has_tests(file))
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"there is no file {path}")


def has_tests(file: Path) -> bool:
    """True if a YAML file has `tests:`, or cannot be read, which somebody should then be told."""
    parsed = parse_yaml(file.read_text(encoding="utf-8"), file=str(file))
    return not parsed.is_yaml or (isinstance(parsed.data, Mapping) and "tests" in parsed.data)


def load_suite(file: str | Path, *, table: ComponentTable) -> Suite:
    """The tests of a file, every name in them checked.

    Args:
        file: A pipeline file, or a file of tests that names one.
        table: The components there are.
    """
    path = Path(file)
    parsed = parse_yaml(path.read_text(encoding="utf-8"), file=str(path))
    is_apart = isinstance(parsed.data, Mapping) and isinstance(parsed.data.get("pipeline"), str)
    if is_apart:
        named, findings = structure(CaseFile, parsed.data, origin=parsed.origin)
        if named is None:
            return Suite(file=str(path), findings=(*parsed.findings, *findings))
        config, found = _load(path.parent / named.pipeline)
        tests, origin = named.tests, parsed.origin
    else:
        config, found = _load(path)
        tests, origin = (config.tests, config.origin) if config else ((), parsed.origin)
    if config is None or found:
        return Suite(file=str(path), findings=found)
    findings = check(config, table)
    if not tests and not findings:
        findings = [origin.finding((), "this file has no tests", "add `tests:`", code="no-tests")]
    cases, more = _cases(tests, config, origin, table)
    findings += more
    return Suite(file=str(path), findings=tuple(findings)) if findings else Suite(file=str(path), cases=cases)


class _Variables(Mapping[str, str]):
    """An environment in which every variable is set when asked for, and none overrides a setting."""

    def __getitem__(self, name: str) -> str:
        return _STAND_IN

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Secrets(SecretReader):
    """Resolves every reference to the same stand-in."""

    def read(self, text: str) -> Secret | Problem:
        return Secret(_STAND_IN, text) if is_reference(text) else Secret(text)


def _load(path: Path) -> tuple[FleetConfig | None, tuple[Finding, ...]]:
    """The pipeline, with stand-ins for its secrets: a test calls nobody, so it needs none of them."""
    config, findings = check_config(path, environ=_Variables(), resolvers=(lambda _: _STAND_IN,))
    if config is not None:
        config = attrs.evolve(config, origin=attrs.evolve(config.origin, secrets=_Secrets()))
    return config, tuple(finding for finding in findings if finding.code != "secret")


def _cases(
    tests: Sequence[Mapping[str, Any]], config: FleetConfig, origin: Origin, table: ComponentTable
) -> tuple[tuple[PlacedCase, ...], list[Finding]]:
    names = Names.of(config, table)
    cases = []
    findings: list[Finding] = []
    seen: set[str] = set()
    for index, raw in enumerate(tests):
        place: Place = ("tests", index)
        case, wrong = structure(Case, raw, path=place, origin=origin)
        findings += wrong
        if case is None:
            continue
        if case.name in seen:
            findings.append(
                origin.finding((*place, "name"), f"there is another test called {case.name!r}", "rename one")
            )
        seen.add(case.name)
        findings += check_case(case, place, names, origin)
        cases.append(PlacedCase(case, config, origin, place))
    return tuple(cases), findings


def run_placed(placed: PlacedCase, table: ComponentTable) -> CaseResult:
    """Run one case. What a component raises is a failure of the case."""
    started = time.perf_counter()
    origin, case = placed.origin, placed.case
    result = CaseResult(name=case.name, file=origin.file, line=placed.line)
    try:
        failure = asyncio.run(run_case(placed.config, case, table))
    except Exception as error:  # noqa: BLE001 - a test runner's border: one broken case must not end the others
        return attrs.evolve(
            result, duration_s=time.perf_counter() - started, note=f"ended by {type(error).__name__}: {error}"
        )
    duration_s = time.perf_counter() - started
    if failure is None:
        return attrs.evolve(result, duration_s=duration_s)
    found = tuple(_placed(mismatch, placed, failure) for mismatch in failure.mismatches)
    return attrs.evolve(
        result, duration_s=duration_s, mismatches=found, summary=failure.summary, note=_note(case, failure)
    )


def _placed(mismatch: Mismatch, placed: PlacedCase, failure: Failure) -> Finding:
    path = (*placed.place, *failure.path, "expect", *mismatch.path)
    found = placed.origin.finding(path, f"expected {mismatch.expected}, got {mismatch.got}", code="mismatch")
    return attrs.evolve(found, path=path[len(placed.place) :])


def _note(case: Case, failure: Failure) -> str:
    parts = []
    if failure.path:
        parts.append(f"turn {int(failure.path[-1]) + 1} of {len(case.turns)}")
    if case.repeat > 1:
        over = f"over all {case.repeat} repetitions"
        parts.append(f"repetition {failure.repetition} of {case.repeat}" if failure.repetition else over)
    return ", ".join(parts)
