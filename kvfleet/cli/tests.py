"""``kvfleet test``: the tests that fleet files carry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from kvfleet.cli import render
from kvfleet.cli.options import json_option, named_files, reports
from kvfleet.testing.cases import CaseResult, Report, run_files

__all__ = ["test"]


@click.command()
@click.argument("paths", nargs=-1, metavar="[FILE|FOLDER]...", type=click.Path(path_type=Path))
@click.option("-q", "--quiet", is_flag=True, help="Show only what failed, and the count.")
@json_option
@click.pass_context
@reports
def test(ctx: click.Context, paths: Sequence[Path], *, quiet: bool, as_json: bool) -> None:
    """Run the tests that stand under `tests:` in fleet files, or in *.test.yaml files beside them.

    They run through the real engine, with backends that do as told, a frozen clock and a fixed seed. Nothing is
    connected to. Exit status 1 if a test fails, a file has findings,
    or there are no tests.
    """
    paths = named_files(ctx, paths)
    if as_json:
        report = run_files(paths)
        render.echo_json(report.to_dict())
    else:
        seen: list[str] = []

        def tell(result: CaseResult) -> None:
            if not (quiet and result.passed):
                _tell(result, seen)

        report = run_files(paths, on_case=tell)
        _summarise(report)
    if not report.is_ok or not report.results:
        ctx.exit(1)


def _tell(result: CaseResult, seen: list[str]) -> None:
    """One result, below its file's name."""
    if result.file not in seen:
        seen.append(result.file)
        render.echo(render.bold(result.file))
    if result.passed:
        render.echo(f"  {render.good('✓')} {result.name}  {render.dim(f'{result.duration_s * 1000:.0f} ms')}")
        return
    note = f" ({result.note})" if result.note else ""
    render.echo(f"  {render.bad('✗')} {result.name}{note}")
    for line in result.text().splitlines()[1:]:  # the first one repeats the name
        render.echo(f"  {line}")


def _summarise(report: Report) -> None:
    if report.findings:
        render.findings(report.findings)
    if not report.results and not report.findings:
        render.echo(f"{render.bad('Error:')} no tests there; they stand under `tests:` in a fleet file", err=True)
        return
    told = render.count(report.passed, "test") + " passed"
    failed = render.bad(f", {report.failed} failed") if report.failed else ""
    render.echo((render.good(told) if report.is_ok else told) + failed)
