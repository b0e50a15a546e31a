"""Reads traces: Mooncake's JSON Lines, Azure's CSV, recorded requests, and kvfleet's own store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs
import xxhash

from kvfleet.builtin.facts import prompt_texts
from kvfleet.errors import TraceError
from kvfleet.eval.records import RecordedRequest, read_records
from kvfleet.replay.rows import BOM, check_readable, csv_rows, json_rows, tokens_of, uncounted, while_reading
from kvfleet.replay.traces import RequestTrace, TracedRequest, chained, spread, with_prefixes
from kvfleet.trace import names
from kvfleet.trace.reader import TraceReader
from kvfleet.trace.spans import Span, SpanKind, Trace

__all__ = ["FORMATS", "read_trace"]

_MOONCAKE_BLOCK_TOKENS = 512
_OWN_BLOCK_TOKENS = 16
_BYTES_PER_TOKEN = 4
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_LONGEST_NUMBER = 18
_SQLITE = b"SQLite format 3\0"
_END = object()


def read_trace(path: Path, form: str = "", limit: int | None = None) -> RequestTrace:
    """Read a trace.

    Args:
        path: The file.
        form: One of `FORMATS`; told by the file's beginning if empty.
        limit: Only the first so many requests.

    Raises:
        TraceError: naming the line, if it is not such a trace.
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    check_readable(path, head)
    form = form or _form_of(path, head)
    block_tokens, read = FORMATS[form]
    rows = iter(read(path))
    requests, passed_over = list[TracedRequest](), 0
    while len(requests) != limit and (row := next(rows, _END)) is not _END:
        if isinstance(row, TracedRequest):
            requests.append(row)
        else:
            passed_over += 1
    if not requests:
        raise TraceError(f"{path} holds no request" + (" that was answered" if passed_over else ""))
    chained = with_prefixes(requests) if form == "mooncake" else requests
    return attrs.evolve(RequestTrace.of(path.stem, block_tokens, chained), passed_over=passed_over)


def _form_of(path: Path, head: bytes) -> str:
    if head.startswith(_SQLITE):
        return "store"
    text = head.removeprefix(BOM).lstrip()
    if text.startswith(_AZURE_COLUMNS[0].encode()):
        return "azure"
    line = text.split(b"\n", 1)[0]
    if b'"hash_ids"' in line:
        return "mooncake"
    if line.startswith(b'{"v":'):
        return "records"
    raise TraceError(
        f"{path} is no trace that is known: Mooncake's JSON Lines (with `hash_ids`), Azure's CSV "
        f"(with {', '.join(_AZURE_COLUMNS)}), a file of `observe.record`, or a trace store"
    )


# Mooncake


def _mooncake(path: Path) -> Iterator[TracedRequest]:
    """Mooncake's open traces: https://github.com/kvcache-ai/Mooncake (FAST25-release/traces).

    Timestamps are in milliseconds. Each hash id stands for a block of 512 tokens and for all before it. The last one
    may stand for a block that is not full; engines cache only full ones, so it is left out.
    """
    for number, row in json_rows(path):
        with while_reading(path, number, "a Mooncake"):
            tokens = tokens_of(row, "input_length", least=1)
            yield TracedRequest(
                at_s=uncounted(row, "timestamp") / 1000,
                prompt_tokens=tokens,
                output_tokens=tokens_of(row, "output_length"),
                blocks=_blocks(row["hash_ids"], tokens),
            )


def _blocks(ids: object, tokens: int) -> tuple[int, ...]:
    """The hashes of a prompt's whole blocks."""
    size = _MOONCAKE_BLOCK_TOKENS
    full = tokens // size
    if not isinstance(ids, list) or {*map(type, ids)} - {int}:
        raise TypeError("hash_ids is no list of whole numbers; give one for each block, or an empty list")
    if ids and not full <= len(ids) <= -(-tokens // size):
        raise ValueError(
            f"it has {len(ids)} hash_ids for a prompt of {tokens} tokens, which has {full} whole blocks of {size}; give"
            " an id for each, and one more for an end that is no whole block, or none at all"
        )
    return tuple(map(spread, ids[:full]))


# Azure


def _azure(path: Path) -> Iterator[TracedRequest]:
    """Azure's open traces of 2023 and 2024: https://github.com/Azure/AzurePublicDataset.

    They say nothing of what prompts share, so nothing is shared.
    """
    start: datetime | None = None
    for number, row in csv_rows(path):
        if not number:
            if missing := [name for name in _AZURE_COLUMNS if name not in row]:
                raise TraceError(
                    f"{path}:1: has no column {missing[0]}; an Azure trace has {', '.join(_AZURE_COLUMNS)}"
                )
            continue
        with while_reading(path, number, "an Azure"):
            at = datetime.fromisoformat(row["TIMESTAMP"])
            start = at if start is None else start
            counts = {name: _whole(row[name]) for name in _AZURE_COLUMNS[1:]}
            yield TracedRequest(
                at_s=(at - start).total_seconds(),
                prompt_tokens=tokens_of(counts, "ContextTokens", least=1),
                output_tokens=tokens_of(counts, "GeneratedTokens"),
            )


def _whole(cell: str | None) -> int | str | None:
    """The whole number a cell holds, or else the cell as it is."""
    return int(cell) if cell and cell.strip().isdecimal() and len(cell) <= _LONGEST_NUMBER else cell


# Our own


def _store(path: Path) -> Iterator[TracedRequest | None]:
    """Traces that a gateway kept: times, tokens and tenants. They hold no text, so what was shared is not known."""
    last = 0
    with TraceReader(path) as reader:
        while rows := reader.since(last):
            last = rows[-1].id
            for row in rows:
                if not row.prompt_tokens or row.completion_tokens is None:
                    yield None
                    continue
                yield TracedRequest(
                    at_s=row.start_ns / 1e9,
                    prompt_tokens=row.prompt_tokens,
                    output_tokens=row.completion_tokens,
                    tenant=row.tenant,
                )


def _records(path: Path) -> Iterator[TracedRequest | None]:
    """What `observe.record` wrote; with content, blocks are hashed from it; sessions give think times."""
    ended_s: dict[str, float] = {}
    for record in read_records(path):
        found = _of_trace(record.trace)
        if found is None:
            yield None
            continue
        if record.has_content:
            found |= _sizes_and_blocks(record)
        if record.session:
            found["session"] = record.session
            before_s = ended_s.get(record.session)
            if before_s is not None:
                found["think_s"] = max(found["at_s"] - before_s, 0.0)
            ended_s[record.session] = found["at_s"] + record.duration_s
        found["model"] = record.model_requested
        yield TracedRequest(**found)


def _of_trace(trace: Trace) -> dict[str, Any] | None:
    """What a decision's record says of a request; None if it was not answered by a backend."""
    usage = next((u for u in map(_usage_of, reversed(trace.stages)) if u is not None), None)
    if usage is None or usage[0] < 1:
        return None
    attributes = trace.route.attributes
    return {
        "at_s": trace.route.start_ns / 1e9,
        "prompt_tokens": usage[0],
        "output_tokens": usage[1],
        "tenant": str(attributes.get(names.TENANT, "")),
        "model": str(attributes.get(names.MODEL_REQUESTED, "auto")),
    }


def _usage_of(span: Span) -> tuple[int, int] | None:
    found = span.attributes.get(names.GEN_AI_INPUT_TOKENS), span.attributes.get(names.GEN_AI_OUTPUT_TOKENS)
    if span.kind is not SpanKind.CLIENT or not isinstance(found[0], int) or not isinstance(found[1], int):
        return None
    return found[0], found[1]


def _sizes_and_blocks(record: RecordedRequest) -> dict[str, Any]:
    """The prompt's size and the blocks of it and of its answer, over the texts' bytes, four to a token."""
    prompt = "\x1e".join(prompt_texts(record.operation, record.body)).encode(errors="replace")
    hashes = chained(0, _parts(prompt + b"\x1e" + record.answer.encode(errors="replace")))
    tokens = max(-(-len(prompt) // _BYTES_PER_TOKEN), 1)
    full = tokens // _OWN_BLOCK_TOKENS
    return {"prompt_tokens": tokens, "blocks": hashes[:full], "answer_blocks": hashes[full:]}


def _parts(text: bytes) -> list[int]:
    size = _OWN_BLOCK_TOKENS * _BYTES_PER_TOKEN
    return [xxhash.xxh3_64_intdigest(text[i : i + size]) for i in range(0, len(text) - size + 1, size)]


FORMATS: Mapping[str, tuple[int, Callable[[Path], Iterator[TracedRequest | None]]]] = {
    "mooncake": (_MOONCAKE_BLOCK_TOKENS, _mooncake),
    "azure": (_OWN_BLOCK_TOKENS, _azure),
    "records": (_OWN_BLOCK_TOKENS, _records),
    "store": (_OWN_BLOCK_TOKENS, _store),
}
"""By name: the tokens of a block, and what reads it; None stands for one that nobody answered, or without a prompt."""
