"""``kvfleet replay``: a trace sent through pipelines and simulated engines, on a virtual clock."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import click

from kvfleet.cli import render
from kvfleet.cli.options import read_fleet, reports
from kvfleet.config.findings import did_you_mean
from kvfleet.config.origin import Origin
from kvfleet.config.schema import FleetConfig
from kvfleet.config.simulation import SimulatedFleet
from kvfleet.errors import ComponentError
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.registry.models import ModelRegistry
from kvfleet.replay.driver import Replay
from kvfleet.replay.expect import Verdict, parse_expectation, shown
from kvfleet.replay.fleet import check_names, names_of, read_fleet_description
from kvfleet.replay.generate import GENERATORS, generator_from
from kvfleet.replay.measures import FIGURES
from kvfleet.replay.readers import FORMATS, read_trace
from kvfleet.replay.report import html_report
from kvfleet.replay.results import Comparison, Standing
from kvfleet.replay.several import cores, replay_all
from kvfleet.replay.slo import parse_slo
from kvfleet.replay.traces import RequestTrace
from kvfleet.replay.variants import with_strategy

__all__ = ["replay"]

_COLUMNS = (
    "ttft_mean",
    "ttft_p50",
    "ttft_p90",
    "ttft_p99",
    "least_ttft_mean",
    "tpot_mean",
    "e2e_mean",
    "cached_share",
    "imbalance",
    "goodput",
    "cost_usd",
)


def _is_writable(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written, before hours are replayed for it."""
    if path is not None and path.is_dir():
        raise click.BadParameter(f"{path} is a directory", ctx, param)
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {path.absolute().parent}", ctx, param)
    return path


def _strategy_names(ctx: click.Context, param: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what no strategy is called."""
    table = discover() if names else None
    for name in names:
        try:
            assert table is not None  # noqa: S101 - there are names
            table.find_stage(f"{Kind.SELECT}.{name}")
        except ComponentError as error:
            raise click.BadParameter(str(error), ctx, param) from error
    return names


@click.command()
@click.argument("trace")
@click.option(
    "-p",
    "--pipeline",
    "pipelines",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="A fleet file; give several to compare them.",
)
@click.option(
    "-s",
    "--strategy",
    "strategies",
    multiple=True,
    callback=_strategy_names,
    help="Replay each file also with this strategy; may be repeated.",
)
@click.option("--fleet", type=click.Path(path_type=Path), help="A YAML file that says which engine each replica is.")
@click.option(
    "--format", "form", type=click.Choice(list(FORMATS)), help="The trace's; told by its beginning if absent."
)
@click.option(
    "--speed",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Requests come that much faster.",
)
@click.option("-n", "--limit", type=click.IntRange(1), help="Only the first so many requests.")
@click.option(
    "--loop",
    type=click.Choice(["open", "closed"]),
    help="Whether turns wait for the answer before; by default where the trace has sessions.",
)
@click.option(
    "--events/--no-events",
    default=None,
    help="Whether engines tell exactly what their caches hold; by default those of models with `kv_events`.",
)
@click.option(
    "--slo",
    default="ttft < 2s",
    show_default=True,
    help="What a good answer is; also as in 'ttft < 2s, tpot < 50ms, e2e < 30s'.",
)
@click.option(
    "--expect", "expected", multiple=True, help="What must hold, as in 'ttft_p99 < 5s'; exit status 1 if it does not."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of every random choice.")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Replays at once; as many as there are cores if absent.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    callback=_is_writable,
    help="Write the figures there, as JSON.",
)
@click.option(
    "--html",
    "html_path",
    type=click.Path(path_type=Path),
    callback=_is_writable,
    help="Write a report there, with plots.",
)
@click.pass_context
@reports
def replay(
    ctx: click.Context,
    trace: str,
    *,
    pipelines: Sequence[Path],
    strategies: Sequence[str],
    fleet: Path | None,
    form: str | None,
    speed: float,
    limit: int | None,
    loop: str | None,
    events: bool | None,
    slo: str,
    expected: Sequence[str],
    seed: int,
    jobs: int | None,
    json_path: Path | None,
    html_path: Path | None,
) -> None:
    """Send a trace through pipelines, with simulated engines behind them, and compare what comes of it.

    \b
    TRACE is a file (Mooncake's JSON Lines, Azure's CSV, what `observe.record` wrote, a trace store), or a generator:
    shared_prefix, agent_sessions or bursts, with options as in shared_prefix:requests=1000,zipf=1.2

    Decisions are made by the pipelines themselves, in virtual time: an hour of traffic takes seconds. The engines are
    those of the file's `simulation:` section or of --fleet.
    """  # noqa: D301 - click's mark for lines that stay as they are
    logging.getLogger("kvfleet").addHandler(logging.NullHandler())  # what a gateway warns of is in the figures here
    level = parse_slo(slo)
    table = discover()
    variants = _variants(pipelines, strategies, table)
    expectations = [parse_expectation(text, list(variants)) for text in expected]
    requests = _trace(trace, form or "", limit, seed)
    engines = _engines(fleet, variants) if fleet else {}
    make = partial(
        Replay,
        trace=requests,
        table=table,
        seed=seed,
        speed=speed,
        is_closed_loop=None if loop is None else loop == "closed",
        tells=events,
    )
    runs = {label: make(config=config, fleet=engines.get(label)) for label, config in variants.items()}
    render.echo(
        f"{requests.name}: {render.count(len(requests.requests), 'request')} over {requests.duration_s:,.0f} s,"
        f" {requests.shared_share:.1%} of prompt tokens shared with earlier ones"
    )
    if requests.passed_over:
        passed = render.count(requests.passed_over, "request")
        render.echo(render.warn(f"{passed} more were not answered, or had no prompt, and are left out"))
    with _progress(len(runs) * len(requests.requests)) as progress:
        results = replay_all(runs, jobs or cores(), progress)
    comparison = Comparison.of(results, level, speed=speed, seed=seed)
    verdicts = [verdict for one in expectations for verdict in one.check(comparison.figures)]
    _keep(comparison, verdicts, json_path, html_path)
    render.echo(_table(comparison.standings))
    _tell_errors(comparison.standings)
    if failed := [verdict for verdict in verdicts if not verdict.holds]:
        render.echo("\n" + _verdicts(failed))
        ctx.exit(1)


def _variants(pipelines: Sequence[Path], strategies: Sequence[str], table: ComponentTable) -> dict[str, FleetConfig]:
    """Each file by its name, and with each other strategy."""
    found: dict[str, FleetConfig] = {}
    stems = Counter(path.stem for path in pipelines)
    for path in dict.fromkeys(pipelines):
        config = read_fleet(path, table)
        label = path.stem if stems[path.stem] == 1 else str(path.with_suffix(""))
        found[label] = config
        found |= {f"{label}:{name}": with_strategy(config, name) for name in strategies}
    return found


def _engines(path: Path, variants: Mapping[str, FleetConfig]) -> dict[str, SimulatedFleet]:
    """Each pipeline's part of a fleet description, which must not speak of what none of them has."""
    described = read_fleet_description(path)
    models = {label: ModelRegistry.from_configs(config.models).replicas for label, config in variants.items()}
    check_names(described, [model for replicas in models.values() for model in replicas], Origin(str(path)))
    return {label: described.only(names_of(replicas)) for label, replicas in models.items()}


def _keep(comparison: Comparison, verdicts: Sequence[Verdict], json_path: Path | None, html_path: Path | None) -> None:
    """Write what is to be kept."""
    if json_path:
        json_path.write_text(json.dumps(comparison.to_dict(verdicts), indent=2) + "\n", encoding="utf-8")
    if html_path:
        html_path.write_text(html_report(comparison, verdicts), encoding="utf-8")


def _trace(name: str, form: str, limit: int | None, seed: int) -> RequestTrace:
    word, is_file = name.partition(":")[0], Path(name).exists()
    if not is_file and word not in GENERATORS and "." not in name:
        names = sorted(GENERATORS)
        raise click.UsageError(f"{name}: no such file, nor is a generated trace called so; {did_you_mean(word, names)}")
    if word in GENERATORS and not is_file:
        if form:
            raise click.UsageError("--format is a file's, and this trace is generated")
        found = generator_from(name).generate(seed)
        return attrs.evolve(found, requests=found.requests[:limit])
    return read_trace(Path(name), form, limit)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=total, label="replaying", file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.pos)


def _table(standings: Sequence[Standing]) -> str:
    rows = [(one.label, *(shown(one.figures.get(name), FIGURES[name]) for name in _COLUMNS)) for one in standings]
    return render.table(("pipeline", *_COLUMNS), rows)


def _tell_errors(standings: Sequence[Standing]) -> None:
    for one in standings:
        if one.errors:
            told = ", ".join(f"{count:,} {code}" for code, count in one.errors.items())
            render.echo(render.warn(f"{one.label}: without a whole answer: {told}"))
    left_out = sorted({key for one in standings for key in one.result.left_out})
    if left_out:
        render.echo(render.dim(f"left out, because a trace has no text: {', '.join(left_out)}"))


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    rows = [
        (
            render.bad("failed"),
            one.expectation.text,
            one.label,
            shown(one.left, one.expectation.figure),
            shown(one.right, one.expectation.figure),
        )
        for one in verdicts
    ]
    return render.table(("", "expected", "pipeline", "is", "against"), rows)
