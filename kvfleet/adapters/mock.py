"""The `mock` provider: engines inside this process that behave like engines, for a first look, demos and tests.

They need no GPU, no network and no key. Queue, batch, prefix cache and timing are those of
`kvfleet.adapters.mock_engine`; the words come from `kvfleet.adapters.mock_content`. Faults can be injected.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, NoReturn, Self

import anyio
import attrs
import xxhash

from kvfleet.adapters.base import EndpointHealth, EngineLoad, InferenceAdapter
from kvfleet.adapters.call import Call, Limits, Reply, Tally, Usage
from kvfleet.adapters.mock_content import sentence, text_of
from kvfleet.adapters.mock_engine import EngineLimits, Job, MockEngine, Stage
from kvfleet.adapters.mock_wire import Part, Work, Writer, error_body, plan
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import choice, flag, number, text
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault

__all__ = ["FAULT_STATUS", "MockAdapter", "injected_fault"]

_NO_FAULT = "none"
_CONTEXT_TOKENS = 8192
_INJECTABLE = tuple(fault.value for fault in Fault if fault not in (Fault.CANCELLED, Fault.DEADLINE))

FAULT_STATUS: Mapping[Fault, int] = {
    Fault.RATE_LIMITED: 429,
    Fault.OVERLOADED: 503,
    Fault.SERVER_ERROR: 500,
    Fault.BAD_REQUEST: 400,
    Fault.CONTEXT_LENGTH: 400,
    Fault.CONTENT_POLICY: 400,
    Fault.UNAUTHORIZED: 401,
    Fault.NOT_FOUND: 404,
}
"""The HTTP status a real engine sends with a fault; the faults that are absent come without one."""


def injected_fault(fault: Fault, *, received: bool = False) -> BackendError:
    """The error a real engine's adapter would raise for a fault, which somebody asked for."""
    message = f"injected fault: {fault.value}"
    status = FAULT_STATUS.get(fault)
    body = error_body(message, fault.value) if fault.is_callers else None
    wait = 1.0 if fault in (Fault.RATE_LIMITED, Fault.OVERLOADED) else None
    return BackendError(fault, message, status=status, body=body, retry_after_s=wait, received=received)


@attrs.define(kw_only=True)
class MockAdapter(InferenceAdapter):
    """An engine inside this process that behaves like one: prefix cache, queue, batch, prefill and decode time.

    Its answers say what it is and repeat nothing of the prompt. Unknown body fields are ignored.
    """

    prefill_tokens_per_s: float = number(
        8000, gt=0, unit="tokens/s", doc="Uncached prompt tokens it reads in a second."
    )
    decode_ms_per_token: float = number(8, ge=0, unit="ms", doc="Time of a decode step with one request in the batch.")
    decode_slowdown: float = number(
        0.05, ge=0, doc="How much longer a step gets with each further request in the batch, as a share."
    )
    max_batch: int = number(8, ge=1, unit="requests", doc="Most requests in the batch; the others queue.")
    max_queue: int = number(256, ge=0, unit="requests", doc="Most requests in the queue; one more is refused with 503.")
    cache_tokens: int = number(32_768, ge=1, unit="tokens", doc="Size of the KV cache.")
    block_tokens: int = number(16, ge=1, unit="tokens", doc="Tokens in one block of the KV cache.")
    context_tokens: int | None = number(
        None,
        ge=1,
        unit="tokens",
        doc="Longest prompt plus answer; the model's `max_context_window`, or 8192, if absent.",
    )
    embedding_dimensions: int = number(64, ge=1, le=65_536, doc="Length of embeddings, unless the request says.")
    speed: float = number(1.0, gt=0, doc="How many times faster than that everything goes.")
    reply: str = text("", doc="What it says; a sentence that explains what it is, if empty.")
    echo: bool = flag(doc="Say the last message back. Off, so that no prompt shows up in logs of answers.")
    fail: str = choice(
        _NO_FAULT, of=(_NO_FAULT, *_INJECTABLE), doc="Fault it has, by the name traces show; `none` for a sound engine."
    )
    fail_every: int = number(1, ge=1, unit="requests", doc="Only every so many-th request has the fault.")
    fail_after_tokens: int = number(
        0, ge=0, unit="tokens", doc="Tokens of the answer before the fault; 0 for a fault before the answer."
    )
    sleep: Callable[[float], Awaitable[None]] = attrs.field(init=False, default=anyio.sleep, repr=False)
    clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False)
    engine: MockEngine = attrs.field(init=False, repr=False)
    _calls: int = attrs.field(init=False, default=0, repr=False)

    def __attrs_post_init__(self) -> None:
        self.engine = MockEngine(
            EngineLimits(
                prefill_tokens_per_s=self.prefill_tokens_per_s,
                decode_ms_per_token=self.decode_ms_per_token,
                decode_slowdown=self.decode_slowdown,
                max_batch=self.max_batch,
                max_queue=self.max_queue,
                cache_blocks=max(1, self.cache_tokens // self.block_tokens),
                block_tokens=self.block_tokens,
                context_tokens=self.context_tokens or _CONTEXT_TOKENS,
            )
        )

    @classmethod
    def from_config(cls, model: ModelConfig, *, connections: Any = None, **options: Any) -> Self:
        """Make the engine of one replica."""
        if options.get("context_tokens") is None:
            options["context_tokens"] = model.capabilities.max_context_window
        return super().from_config(model, connections=connections, **options)

    async def send(self, call: Call) -> Reply:
        """Answer a call as an engine would.

        Raises:
            BackendError: for a body no engine takes, a prompt that is too long, a full queue, a wait beyond the call's
                limit, or the injected fault.
        """
        fault = self._fault_of_next()
        if fault and not self.fail_after_tokens:
            await self._fail(fault, call.limits)
        work = plan(call.operation, call.body, self._words(call.body), self.embedding_dimensions)
        answer = _Answer(self, call, work, fault)
        try:
            with anyio.fail_after(call.limits.first_byte_s):
                await answer.begin()
                if not (call.stream and work.choices):
                    return await answer.whole()
        except TimeoutError as error:
            raise BackendError(Fault.TIMEOUT, "the engine gave no first byte in time") from error
        return answer.streamed()

    async def health_check(self) -> EndpointHealth:
        """The engine's state; down only if it is told to refuse every connection."""
        if self._is_down:
            return EndpointHealth(endpoint=self.endpoint, healthy=False, error=str(injected_fault(Fault(self.fail))))
        load = self.engine.load()
        return EndpointHealth(
            endpoint=self.endpoint,
            healthy=True,
            queue_depth=load.waiting,
            active_requests=load.running,
            kv_usage=load.kv_usage,
            tokens_per_second=load.tokens_per_second,
            models=(self.model_id,),
        )

    async def list_models(self) -> tuple[str, ...]:
        """The one model it serves."""
        self._refuse_if_down()
        return (self.model_id,)

    async def get_load(self) -> EngineLoad:
        """The engine's load and cache, all of it known."""
        self._refuse_if_down()
        return self.engine.load()

    async def get_metrics(self) -> Mapping[str, float]:
        """The load as figures by name."""
        load = attrs.asdict(await self.get_load())
        return {name: float(value) for name, value in load.items() if value is not None}

    @property
    def _is_down(self) -> bool:
        return self.fail in (Fault.CONNECT, Fault.CONNECT_TIMEOUT) and self.fail_every == 1

    def _refuse_if_down(self) -> None:
        if self._is_down:
            raise injected_fault(Fault(self.fail))

    def _fault_of_next(self) -> Fault | None:
        self._calls += 1
        return Fault(self.fail) if self.fail != _NO_FAULT and self._calls % self.fail_every == 0 else None

    async def _fail(self, fault: Fault, limits: Limits, *, received: bool = False) -> NoReturn:
        """Raise the fault, after the silence a caller would have sat through."""
        silence = {
            Fault.CONNECT_TIMEOUT: limits.connect_s,
            Fault.TIMEOUT: limits.first_byte_s,
            Fault.IDLE_TIMEOUT: limits.idle_s,
        }.get(fault)
        if silence:
            await self.sleep(silence)
        raise injected_fault(fault, received=received)

    def _words(self, body: Mapping[str, Any]) -> str:
        if self.echo:
            messages = body.get("messages") or [{"content": body.get("prompt")}]
            return text_of(messages[-1].get("content")) if isinstance(messages[-1], Mapping) else ""
        return self.reply or sentence(self.model_id)

    def response_id(self, prefix: str) -> str:
        """An identifier nobody else's answer in this fleet has, the same in every run."""
        seed = f"{self.endpoint} {self.model_id} {self._calls}".encode()
        return f"{prefix}-{xxhash.xxh3_64_hexdigest(seed)}"


_PREFIX = {"chat": "chatcmpl", "completion": "cmpl", "embedding": "embd", "rerank": "rerank"}


class _Answer(AsyncIterator[bytes]):
    """One answer in the making: waits for its turn, lets the time of its tokens pass, and gives its place back."""

    def __init__(self, adapter: MockAdapter, call: Call, work: Work, fault: Fault | None) -> None:
        self._adapter, self._call, self._work, self._fault = adapter, call, work, fault
        self._engine = adapter.engine
        self._turn = anyio.Event()
        self._job: Job = self._engine.submit(work.prompt, work.output_tokens, self._turn.set)
        response_id = adapter.response_id(_PREFIX[call.operation.value])
        self._tally = Tally(model=adapter.model_id, response_id=response_id)
        self._writer = Writer(
            operation=call.operation,
            id=response_id,
            created=adapter.clock.time_ns() // 1_000_000_000,
            model=adapter.model_id,
            work=work,
        )
        self._events: Iterator[tuple[Part, bytes]] = iter(())
        self._tokens = 0

    async def begin(self) -> None:
        """Wait in the queue, then for the prefill."""
        try:
            await self._turn.wait()
            await self._pass(self._engine.prefill_s(self._job))
        except BaseException:
            self._engine.release(self._job)
            raise
        self._engine.prefilled(self._job)

    async def whole(self) -> Reply:
        """Wait for the rest, and give all of it at once."""
        try:
            for _ in range(self._work.steps):
                await self._step(received=False)
        except BaseException:
            self._engine.release(self._job)
            raise
        self._finish()
        self._tally.is_complete = True
        body = self._writer.whole(self._usage)
        return Reply(headers={"content-type": "application/json"}, body=body, tally=self._tally)

    def streamed(self) -> Reply:
        """The answer as a stream, of which closing it gives the engine's place back."""
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
                self._engine.release(self._job)
                raise
        if self._job.stage is Stage.DONE and not self._tally.finish_reason:
            raise BackendError(Fault.CANCELLED, "the stream was closed before its end", received=True)
        if part is Part.FINISH:
            self._finish()
        self._tally.is_complete = self._tally.is_complete or part is Part.DONE
        self._tally.events += event.count(b"\n\n")
        return event

    async def _step(self, *, received: bool) -> None:
        """Let a decode step pass; the first token comes with the prefill."""
        if self._fault and self._tokens >= self._adapter.fail_after_tokens:
            await self._adapter._fail(self._fault, self._call.limits, received=received)  # noqa: SLF001
        if self._tokens:
            await self._pass(self._engine.step_s())
        self._tokens += 1

    async def _pass(self, seconds: float) -> None:
        await self._adapter.sleep(seconds / self._adapter.speed)

    async def _close(self) -> None:
        self._engine.release(self._job)

    def _finish(self) -> None:
        said = self._work.choices
        whole = self._work.prompt + said[0].text.encode() if said else b""
        self._engine.release(self._job, whole)
        self._tally.usage = self._usage
        self._tally.finish_reason = said[0].finish_reason if said else "stop"

    @property
    def _usage(self) -> Usage:
        prompt, output = self._job.prompt_tokens, self._work.output_tokens
        return Usage(prompt, output, prompt + output, self._job.cached_tokens)
