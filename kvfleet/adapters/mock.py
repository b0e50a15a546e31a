"""The `mock` provider: engines inside this process that behave like engines, for a first look, demos and tests.

They need no GPU, no network and no key. Queue, batch, prefix cache and timing are those of `kvfleet.sim.engine`; the
words come from `kvfleet.adapters.mock_content`. Faults can be injected.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn, Self

import anyio
import attrs
import xxhash

from kvfleet.adapters.base import EndpointHealth, EngineLoad, InferenceAdapter
from kvfleet.adapters.call import Call, Limits, Operation, Reply
from kvfleet.adapters.mock_answer import MockAnswer
from kvfleet.adapters.mock_content import filler, sentence, text_of
from kvfleet.adapters.mock_wire import Writer, error_body, plan
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import choice, flag, number, text
from kvfleet.config.schema import ModelConfig
from kvfleet.config.simulation import PRESET_NAMES
from kvfleet.errors import BackendError, Fault
from kvfleet.sim.engine import Engine
from kvfleet.sim.live import LiveEngine
from kvfleet.sim.presets import PRESETS
from kvfleet.sim.spec import EngineSpec

__all__ = ["FAULT_STATUS", "MockAdapter", "injected_fault"]

_NO_FAULT = "none"
_NO_PRESET = "none"
_CONTEXT_TOKENS = 8192
_PREFIX = {
    Operation.CHAT: "chatcmpl",
    Operation.COMPLETION: "cmpl",
    Operation.EMBEDDING: "embd",
    Operation.RERANK: "rerank",
}
_INJECTABLE = tuple(
    fault.value for fault in Fault if fault not in (Fault.CANCELLED, Fault.DEADLINE, Fault.CIRCUIT_OPEN)
)

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
    wait = 1.0 if fault is Fault.RATE_LIMITED else None
    return BackendError(fault, message, status=status, body=body, retry_after_s=wait, received=received)


@attrs.define(kw_only=True)
class MockAdapter(InferenceAdapter):
    """An engine inside this process that behaves like one: prefix cache, queue, batch, prefill and decode time.

    Its answers say what it is and repeat nothing of the prompt. Unknown body fields are ignored.
    """

    prefill_tokens_per_s: float = number(
        8000, gt=0, unit="tokens/s", doc="Uncached prompt tokens it reads in a second, beside what each step costs."
    )
    decode_ms_per_token: float = number(8, ge=0, unit="ms", doc="Time of a decode step with one request in the batch.")
    decode_slowdown: float = number(
        0.05, ge=0, le=1, doc="How much longer a step gets with each further request in the batch, as a share."
    )
    token_budget: int = number(
        2048,
        ge=1,
        unit="tokens",
        doc="Most tokens computed in a step, the batch's and those of prompts; never fewer than `max_batch`.",
    )
    max_batch: int = number(8, ge=1, unit="requests", doc="Most requests in the batch; the others queue.")
    max_queue: int = number(256, ge=0, unit="requests", doc="Most requests in the queue; one more is refused with 503.")
    cache_tokens: int = number(32_768, ge=1, unit="tokens", doc="Size of the KV cache.")
    preset: str = choice(
        _NO_PRESET,
        of=(_NO_PRESET, *PRESET_NAMES),
        doc="A real engine's pace, batch, token budget and cache size, in place of those above.",
    )
    block_tokens: int = number(16, ge=1, unit="tokens", doc="Tokens in one block of the KV cache.")
    window_tokens: int = number(
        0,
        ge=0,
        unit="tokens",
        doc="Tokens that some of its layers look back on, as a hybrid model's with a sliding window; 0 for none.",
    )
    window_cache_tokens: int = number(8192, ge=1, unit="tokens", doc="Size of those layers' KV cache.")
    context_tokens: int | None = number(
        None,
        ge=1,
        unit="tokens",
        doc="Longest prompt plus answer; the model's `max_context_window`, or 8192, if absent.",
    )
    embedding_dimensions: int = number(64, ge=1, le=65_536, doc="Length of embeddings, unless the request says.")
    speed: float = number(1.0, gt=0, doc="How many times faster than that everything goes.")
    reply: str = text("", doc="What it says; a sentence that explains what it is, if empty.")
    answer_tokens: int = number(
        0,
        ge=0,
        unit="tokens",
        doc="Length of its answers, of words without a meaning and one token each; 0 for `reply`.",
    )
    echo: bool = flag(doc="Say the last message back. Off, so that no prompt shows up in logs of answers.")
    token_probability: float = number(
        0.9, gt=0, le=1, doc="How sure it is of each token; told where a request asks for `logprobs`."
    )
    fail: str = choice(
        _NO_FAULT, of=(_NO_FAULT, *_INJECTABLE), doc="Fault it has, by the name traces show; `none` for a sound engine."
    )
    fail_every: int = number(1, ge=1, unit="requests", doc="Only every so many-th request has the fault.")
    fail_after_tokens: int = number(
        0, ge=0, unit="tokens", doc="Tokens of the answer before the fault; 0 for a fault before the answer."
    )
    sleep: Callable[[float], Awaitable[None]] = attrs.field(init=False, default=anyio.sleep, repr=False)
    clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False)
    _calls: int = attrs.field(init=False, default=0, repr=False)

    @cached_property
    def live(self) -> LiveEngine:
        """The engine on its clock; made when first needed."""
        return LiveEngine(engine=Engine(self.spec), clock=self.clock, sleep=self.sleep)

    @property
    def spec(self) -> EngineSpec:
        """Size and pace of the engine."""
        context_tokens = self.context_tokens or _CONTEXT_TOKENS
        window: dict[str, int] = {}
        if self.window_tokens:
            blocks = max(1, self.window_cache_tokens // self.block_tokens)
            window = {"window_tokens": self.window_tokens, "window_cache_blocks": blocks}
        if self.preset != _NO_PRESET:
            sized = PRESETS[self.preset].sized(self.block_tokens, context_tokens=context_tokens, speed=self.speed)
            return attrs.evolve(sized, max_waiting=self.max_queue, **window)
        step_s = self.decode_ms_per_token / 1000
        return EngineSpec(
            token_budget=max(self.token_budget, self.max_batch),
            max_running=self.max_batch,
            max_waiting=self.max_queue,
            cache_blocks=max(1, self.cache_tokens // self.block_tokens),
            block_tokens=self.block_tokens,
            context_tokens=context_tokens,
            step_s=step_s * (1 - self.decode_slowdown),
            prefill_s_per_token=1 / self.prefill_tokens_per_s,
            decode_s_per_seq=step_s * self.decode_slowdown,
            speed=self.speed,
            **window,
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
        work = plan(
            call.operation,
            call.body,
            self._words(call.body),
            self.embedding_dimensions,
            self.token_probability,
        )
        writer = Writer(
            operation=call.operation,
            id=self._response_id(call.operation),
            created=self.clock.time_ns() // 1_000_000_000,
            model=self.model_id,
            work=work,
        )
        answer = MockAnswer(self.live, writer, self._failing(fault, call))
        try:
            with anyio.fail_after(call.limits.first_byte_s):
                return await (answer.streamed() if call.stream and work.choices else answer.whole())
        except TimeoutError as error:
            raise BackendError(Fault.TIMEOUT, "the engine gave no first byte in time") from error

    async def health_check(self) -> EndpointHealth:
        """The engine's state; down only if it is told to refuse every connection."""
        if self._is_down:
            return EndpointHealth(endpoint=self.endpoint, healthy=False, error=str(injected_fault(Fault(self.fail))))
        load = self.live.load()
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
        return self.live.load()

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

    def _failing(self, fault: Fault | None, call: Call) -> Callable[[int, bool], Awaitable[None]] | None:
        """What raises the fault amid an answer, when its token comes."""
        if fault is None:
            return None

        async def fail(tokens: int, received: bool) -> None:
            if tokens >= self.fail_after_tokens:
                await self._fail(fault, call.limits, received=received)

        return fail

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
        """What to say: as long as the body insists (vLLM's ``ignore_eos`` and ``min_tokens``), or as configured."""
        asked = 0 if self.echo else max(_insisted(body), self.answer_tokens)
        if not asked and not self.echo:
            return self.reply or sentence(self.model_id)
        messages = body.get("messages") or [{"content": body.get("prompt")}]
        last = messages[-1] if isinstance(messages, Sequence) else None
        said = text_of(last.get("content")) if isinstance(last, Mapping) else ""
        return said if self.echo else filler(said, asked)

    def _response_id(self, operation: Operation) -> str:
        """An identifier nobody else's answer in this fleet has, the same in every run."""
        seed = f"{self.endpoint} {self.model_id} {self._calls}".encode()
        return f"{_PREFIX[operation]}-{xxhash.xxh3_64_hexdigest(seed)}"


def _insisted(body: Mapping[str, Any]) -> int:
    """The least length that a body wants its answer to have, in tokens."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    wanted = [body.get("min_tokens"), limit if body.get("ignore_eos") else None]
    return max((count for count in wanted if isinstance(count, int)), default=0)
