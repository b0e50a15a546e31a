"""``kvfleet rerun``: recorded requests decided again, or put to other models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import attrs
import click

from kvfleet.adapters.base import ChatResponse
from kvfleet.adapters.call import Operation
from kvfleet.cli import render
from kvfleet.cli.compare import chat_request, named_models, standings, standings_table
from kvfleet.cli.options import config_argument, json_option, read_fleet, reports
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import RouteError, TraceError
from kvfleet.eval.compare import ModelComparator, ReplayEngine, ReplayResult
from kvfleet.eval.decisions import NOBODY, Move, MoveReport, move, report
from kvfleet.eval.records import RecordedRequest, read_records
from kvfleet.plugin.contract import RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Span, Trace

__all__ = ["decide_again", "rerun"]

_EVERY = 100


@click.command()
@click.argument("record", type=click.Path(path_type=Path))
@config_argument()
@click.option(
    "--against", type=click.Path(path_type=Path), help="Another fleet file: compare its decisions with FILE's."
)
@click.option("-m", "--models", default="", help="Ask these models of FILE, with commas, instead of deciding again.")
@click.option("-n", "--limit", type=click.IntRange(1), help="Only the first so many requests.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="In seconds.")
@json_option
@reports
def rerun(
    record: Path,
    config: Path,
    *,
    against: Path | None,
    models: str,
    limit: int | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Decide recorded requests again, and show which would go elsewhere, and by which stage.

    RECORD is a file that `observe.record` wrote. Without --against, the recorded decisions are compared with those of
    FILE. Decisions are made as `kvfleet simulate` makes them, with the recorded seeds: every replica is idle, and none
    is known to be down. With --models the requests are sent to models instead, which needs recorded content.
    """
    if against and models:
        raise click.UsageError("give either --against or --models")
    records = list(read_records(record, limit))
    if not records:
        raise TraceError(f"{record} holds no request")
    if models:
        _ask(config, records, models, timeout, as_json=as_json)
        return
    moves, skipped = anyio.run(_decide, config, against, records)
    found = report(moves)
    if as_json:
        moved = [one.to_dict() for one in moves if one.is_moved]
        render.echo_json({**found.to_dict(), "skipped": skipped, "moves": moved})
    else:
        _tell(found, skipped, without_content=sum(not one.has_content for one in records))


async def _decide(path: Path, against: Path | None, records: Sequence[RecordedRequest]) -> tuple[list[Move], int]:
    """A move for each request that was decided; and how many were not, because they were answered from a cache."""
    decided = [one for one in records if Explanation(one.trace).outcome not in ("cached", "refused")]
    before = [Explanation(one.trace) for one in decided]
    if against is not None:
        before = await decide_again(path, decided)
    after = await decide_again(against or path, decided)
    # Each is told by the trace that was recorded, which `kvfleet trace show` may still know.
    moves = [
        attrs.evolve(move(old, new), trace_id=one.trace.trace_id)
        for one, old, new in zip(decided, before, after, strict=True)
    ]
    return moves, len(records) - len(decided)


async def decide_again(path: Path, records: Sequence[RecordedRequest]) -> list[Explanation]:
    """The decisions of a fleet file about recorded requests; nobody is called.

    Raises:
        ConfigError: with every finding of the file.
    """
    table = discover()
    found = []
    async with Router(read_fleet(path, table), table=table, polls=False) as router:
        for number, one in enumerate(records, 1):
            if number % _EVERY == 0:
                render.progress(f"{path}: {number}/{len(records)}")
            found.append(await _again(router, one))
    return found


async def _again(router: Router, one: RecordedRequest) -> Explanation:
    request = RouteRequest(
        operation=one.operation,
        body=one.body,
        model=one.model_requested,
        models=None if one.allowlist is None else frozenset(one.allowlist),
        strategy=one.strategy,
        is_override=bool(one.strategy),
        stream=bool(one.body.get("stream")),
        request_id=Explanation(one.trace).request_id,
        tenant=one.tenant,
        data_class=one.data_class,
        region=one.region,
        session=one.session,
        tags=one.tags,
        condition_headers=one.condition_headers,
        seed=one.seed,
    )
    try:
        return await router.simulate_request(request)
    except RouteError as error:
        # What the request names does not exist there: decided, with nobody.
        return Explanation(error.trace) if error.trace is not None else _nobody(one, error)


def _nobody(one: RecordedRequest, error: RouteError) -> Explanation:
    span = Span(names.ROUTE_SPAN, one.trace.route.start_ns)
    span.attributes = {names.ERROR_TYPE: error.code, names.OUTCOME: "no_candidates"}
    span.fail(error.message)
    return Explanation(Trace(one.trace.trace_id, [span]))


def _tell(found: MoveReport, skipped: int, *, without_content: int) -> None:
    share = f" ({found.moved / found.requests:.0%})" if found.requests else ""
    render.echo(f"{render.count(found.requests, 'request')}, {found.moved} would go elsewhere{share}")
    if found.groups:
        rows = [
            (str(number), one.before, one.after, render.bold(one.stage), f"{one.reason} (as {one.trace_id[:8]})")
            for number, one in found.groups
        ]
        render.echo("\n" + render.table(("requests", "from", "to", "by", "why"), rows, columns=render.width()))
    names_ = sorted({*found.before, *found.after} - {NOBODY}) + ([NOBODY] if NOBODY in found.after else [])
    rows_ = [(name, str(found.before.get(name, 0)), str(found.after.get(name, 0))) for name in names_]
    render.echo("\n" + render.table(("model", "before", "after"), rows_))
    if skipped:
        render.echo(render.dim(f"\n{render.count(skipped, 'request')} left out: answered from a cache, or refused"))
    if without_content:
        told = f"{render.count(without_content, 'request')} without content"
        render.echo(render.dim(f"\n{told}: stages that read the text may decide differently"))


def _ask(path: Path, records: Sequence[RecordedRequest], wanted: str, timeout_s: float, *, as_json: bool) -> None:
    chats = [one for one in records if one.has_content and one.operation is Operation.CHAT]
    if not chats:
        raise TraceError("no chat request was recorded with its content; set `content: true` of observe.record")
    replicas, found = anyio.run(_replay, path, chats, wanted, timeout_s)
    standing = standings(found, replicas, [one.similarities for one in found])
    if as_json:
        render.echo_json({"requests": len(found), "models": [one.to_dict() for one in standing]})
        return
    render.echo(render.count(len(found), "request"))
    render.echo(standings_table(standing, alike=True))


async def _replay(
    path: Path, records: Sequence[RecordedRequest], wanted: str, timeout_s: float
) -> tuple[dict[str, ModelConfig], list[ReplayResult]]:
    table = discover()
    router = Router(read_fleet(path, table), table=table, polls=False)
    engine = ReplayEngine(most_records=len(records), comparator=ModelComparator(timeout_s=timeout_s))
    for one in records:
        engine.record(chat_request(one.body), one.model, ChatResponse(one.answer) if one.answer else None)
    done: list[ReplayResult] = []

    def tell(result: ReplayResult) -> None:
        done.append(result)
        render.progress(f"{len(done)}/{len(records)}")

    try:
        replicas = named_models(router, wanted)
        adapters = {name: router.adapters[replica.id] for name, replica in replicas.items()}
        return replicas, await engine.replay(adapters, list(replicas), limit=len(records), on_result=tell)
    finally:
        await router.aclose()
