"""One answer of a mock engine in the making: it waits for its tokens, and gives its place back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import attrs
import xxhash

from kvfleet.adapters.call import Reply, Tally, Usage
from kvfleet.adapters.mock_wire import Part, Work, Writer
from kvfleet.errors import BackendError, Fault
from kvfleet.sim.events import Job
from kvfleet.sim.live import LiveEngine
from kvfleet.sim.tokens import block_hashes, count_tokens

__all__ = ["MockAnswer", "MockText", "jobs_of"]


@attrs.frozen
class MockText:
    """What a job's tokens are: the key of each job here.

    Attributes:
        text: Prompt and answer.
        salt: What keeps its cache apart.
        finish_reason: Why the answer ends; empty if there is none.
    """

    text: bytes = attrs.field(repr=False)
    salt: str = attrs.field(default="", repr=False)
    finish_reason: str = ""


def jobs_of(work: Work, block_tokens: int) -> tuple[Job, ...]:
    """The jobs of a call: one for each choice of each prompt; for prompts without an answer, one for each.

    Args:
        work: What the call asks for.
        block_tokens: Tokens in a block of the engine's cache.
    """
    found = []
    seed = xxhash.xxh3_64_intdigest(work.salt.encode("utf-8", "surrogatepass")) if work.salt else 0
    each = max(1, len(work.choices) // len(work.prompts))
    for index in range(len(work.prompts) * each):
        prompt = work.prompts[index // each]
        said = work.choices[index] if work.choices else None
        text = prompt + said.text.encode("utf-8", "surrogatepass") if said else prompt
        tokens, hashes = count_tokens(prompt), block_hashes(text, block_tokens, seed=seed)
        full = tokens // block_tokens
        key = MockText(text, work.salt, said.finish_reason if said else "")
        found.append(Job(hashes[:full], tokens, len(said.pieces) if said else 0, hashes[full:], key=key))
    return tuple(found)


class MockAnswer(AsyncIterator[bytes]):
    """One answer, whole or as a stream of which closing it gives the engine's place back.

    Args:
        live: The engine.
        writer: Writes what it says.
        fail: Called before each token with how many there were, and whether they were received: raises a fault. None
            if there is to be none.

    Raises:
        BackendError: as `LiveEngine.submit`.
    """

    def __init__(self, live: LiveEngine, writer: Writer, fail: Callable[[int, bool], Awaitable[None]] | None) -> None:
        self._live, self._writer, self._fail = live, writer, fail
        self._work = writer.work
        self._order = live.submit(jobs_of(self._work, live.engine.spec.block_tokens))
        self._tally = Tally(model=writer.model, response_id=writer.id)
        self._events: Iterator[tuple[Part, bytes]] = iter(())
        self._tokens = 0

    async def whole(self) -> Reply:
        """Wait for all of it."""
        try:
            if self._fail is not None:
                for _ in range(self._work.steps):
                    await self._step(received=False)
            await self._live.finished(self._order)
        except BaseException:
            self._live.cancel(self._order)
            raise
        self._finish()
        self._tally.is_complete = True
        body = self._writer.whole(self._usage)
        return Reply(headers={"content-type": "application/json"}, body=body, tally=self._tally)

    async def streamed(self) -> Reply:
        """Wait for the first token, and stream from there."""
        try:
            await self._live.tokens(self._order, 1)
        except BaseException:
            self._live.cancel(self._order)
            raise
        self._events = self._writer.chunks(self._usage)
        headers = {"content-type": "text/event-stream; charset=utf-8"}
        return Reply(headers=headers, events=self, tally=self._tally, close=self._close)

    async def __anext__(self) -> bytes:
        part, event = next(self._events, (None, b""))
        if part is None:
            raise StopAsyncIteration
        if part is Part.TOKEN:
            try:
                await self._step(received=True)
            except BaseException:
                self._live.cancel(self._order)
                raise
        if self._order.is_cancelled:
            raise BackendError(Fault.CANCELLED, "the stream was closed before its end", received=True)
        if part is Part.FINISH:
            self._finish()
        self._tally.is_complete = self._tally.is_complete or part is Part.DONE
        self._tally.events += event.count(b"\n\n")
        return event

    async def _step(self, *, received: bool) -> None:
        """Wait for the next token of every choice."""
        if self._fail is not None:
            await self._fail(self._tokens, received)
        self._tokens += 1
        await self._live.tokens(self._order, self._tokens)

    async def _close(self) -> None:
        self._live.cancel(self._order)

    def _finish(self) -> None:
        said = self._work.choices
        self._tally.usage = self._usage
        self._tally.finish_reason = said[0].finish_reason if said else "stop"

    @property
    def _usage(self) -> Usage:
        prompt, output = self._work.prompt_tokens, self._work.output_tokens
        jobs = self._order.jobs
        cached = sum(job.cached_tokens for job in jobs[:: len(jobs) // len(self._work.prompts)])
        return Usage(prompt, output, prompt + output, cached)
