"""Recording of live requests, to be run again later against other models or another pipeline."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import anyio
import attrs

from kvfleet.config.fields import flag, number, text
from kvfleet.eval.asking import text_of_answer
from kvfleet.eval.records import RecordedRequest, older
from kvfleet.eval.shadow import is_sampled
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Kind, Outcome
from kvfleet.plugin.spec import hookimpl

__all__ = ["FILE_NAME", "RequestRecorder"]

log = logging.getLogger(__name__)

FILE_NAME = "requests.jsonl"
_MOST_WAITING = 1000


@attrs.define(kw_only=True)
class RequestRecorder:
    """Write requests and their decisions to a file, for `kvfleet rerun`.

    Without `content` a record holds who asked, what kind of request it was and how it was decided, and filler of the
    same length for every text. The file is bounded: a full one replaces the one before it, and a new one begins.
    """

    path: str = text("", doc="The JSON Lines file; `requests.jsonl` in the gateway's state directory if empty.")
    content: bool = flag(doc="Record prompts and answers too. Off unless you need them.")
    sample_rate: float = number(1.0, ge=0, le=1, doc="Share of the requests that is recorded.")
    max_megabytes: float = number(64.0, gt=0, doc="Largest size of the two files together.")
    _path: Path | None = attrs.field(init=False, default=None, repr=False)
    _waiting: deque[RecordedRequest] = attrs.field(init=False, factory=deque, repr=False, eq=False)
    _writer: asyncio.Task[None] | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _counts: dict[str, int] = attrs.field(init=False, repr=False, eq=False)

    @_counts.default
    def _no_counts(self) -> dict[str, int]:
        return dict.fromkeys(("recorded", "dropped"), 0)

    @property
    def wants_content(self) -> bool:
        """True if answers are recorded."""
        return self.content

    def provision(self, services: Services) -> None:
        """Find the file's place; without one, nothing is recorded."""
        folder = services.state_dir
        self._path = Path(self.path).expanduser() if self.path else folder / FILE_NAME if folder else None

    async def observe(self, outcome: Outcome) -> None:
        """Queue one record; a thread writes it."""
        ctx = outcome.context
        if self._path is None or not is_sampled(ctx.seed, self.sample_rate):
            return
        if len(self._waiting) >= _MOST_WAITING:
            self._counts["dropped"] += 1
            return
        self._waiting.append(_record(outcome, has_content=self.content))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(self._path), name="kvfleet-record")

    async def aclose(self) -> None:
        """Write what is waiting; twice is safe."""
        if self._writer is not None:
            await self._writer

    def state(self) -> Mapping[str, Any]:
        """How many were recorded, and how many could not be."""
        return {**self._counts, "waiting": len(self._waiting)}

    async def _write(self, path: Path) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            try:
                added = await anyio.to_thread.run_sync(_append, path, batch, round(self.max_megabytes * 5e5))
                self._counts["recorded"] += added
                self._counts["dropped"] += len(batch) - added
            except (OSError, ValueError, TypeError) as error:
                self._counts["dropped"] += len(batch)
                log.warning("recording failed path=%s lost=%d error=%s", path, len(batch), type(error).__name__)


def _record(outcome: Outcome, *, has_content: bool) -> RecordedRequest:
    ctx, usage = outcome.context, outcome.usage
    request, served = ctx.request, outcome.served_by
    return RecordedRequest(
        operation=request.operation,
        body=request.body,
        trace=outcome.trace,
        model_requested=request.model,
        allowlist=None if request.allowlist is None else tuple(sorted(request.allowlist)),
        strategy=request.strategy if request.is_override else "",
        tenant=ctx.tenant,
        data_class=ctx.data_class,
        region=ctx.region,
        session=request.session,
        tags=dict(request.tags),
        condition_headers=dict(request.condition_headers),
        seed=ctx.seed,
        has_content=has_content,
        model=served.name if served is not None else "",
        answer=text_of_answer(outcome.content) if has_content and outcome.content else "",
        cost_usd=outcome.cost_usd,
        duration_s=outcome.duration_s,
        completion_tokens=usage.completion_tokens if usage is not None else None,
    )


def _append(path: Path, batch: Iterable[RecordedRequest], most_bytes: int) -> int:
    """Add lines, and say how many; a file that one would overfill makes room first, and one that fits none is left."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    added, pieces = 0, bytearray()
    size = path.stat().st_size if path.exists() else 0
    for line in (record.to_line() for record in batch):
        if len(line) > most_bytes:
            continue
        if size + len(pieces) + len(line) > most_bytes:
            _write_out(path, pieces)
            path.replace(older(path))
            size = 0
            pieces.clear()
        pieces += line
        added += 1
    _write_out(path, pieces)
    return added


def _write_out(path: Path, lines: bytearray) -> None:
    handle = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    with os.fdopen(handle, "ab") as file:
        file.write(lines)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The recorder."""
    yield Component(Kind.OBSERVE, "record", RequestRecorder)
