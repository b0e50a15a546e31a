"""The facts the built-in classifiers find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import anyio.to_thread
import attrs
import orjson

from kvfleet.adapters.call import MOST_TOKENS, Operation
from kvfleet.cache.blocks import Laid, PromptBlocks, byte_blocks, render_messages
from kvfleet.cache.fingerprints import PromptFingerprint, PromptFingerprinter, estimate_tokens
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.contract import Fact, RouteRequest, RoutingContext
from kvfleet.policy.pii import PIIDetectionResult
from kvfleet.policy.texts import texts_beside
from kvfleet.router.embedding import PromptEmbedding
from kvfleet.router.language import PromptLanguage
from kvfleet.router.multimodal import ModalityDetection
from kvfleet.router.routes import RouteMatch
from kvfleet.router.semantic import KEYWORDS, PromptDomain
from kvfleet.telemetry.reservations import Work
from kvfleet.trace.spans import AttributeValue

__all__ = [
    "DOMAIN",
    "EMBEDDING",
    "LANGUAGE",
    "MODALITY",
    "PII",
    "PROMPT",
    "ROUTE",
    "PromptFacts",
    "all_texts",
    "estimate_prompt",
    "messages_of",
    "prompt_of",
    "prompt_texts",
    "work_of",
]


def prompt_texts(operation: Operation, body: Mapping[str, Any]) -> Iterator[str]:
    """Every text in a request that its author or an engine will read, in order: also tool results and calls."""
    if operation is Operation.CHAT:
        for message in messages_of(body):
            yield from _message_texts(message)
    elif operation is Operation.COMPLETION:
        yield from _strings(body.get("prompt"))
        yield from _strings(body.get("suffix"))
    elif operation is Operation.EMBEDDING:
        yield from _strings(body.get("input"))
    else:
        yield from _strings(body.get("query"))
        yield from _strings(body.get("documents"))


def all_texts(request: RouteRequest) -> tuple[str, ...]:
    """The same one by one, and then whatever other text goes to an engine with the request, as one."""
    texts = tuple(prompt_texts(request.operation, request.body))
    native = () if request.native is None else (request.native.body,)
    beside = texts_beside(texts, request.body, *native)
    return (*texts, beside) if beside else texts


_OBJECTS = frozenset({dict})


def messages_of(body: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The messages of a body that are messages; what is malformed is the engine's to refuse."""
    messages = body.get("messages")
    if type(messages) is list and _OBJECTS.issuperset(map(type, messages)):
        return messages  # as JSON has them: nothing is to be left out
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        return ()
    return [message for message in messages if isinstance(message, Mapping)]


def _message_texts(message: Mapping[str, Any]) -> Iterator[str]:
    yield from _strings(message.get("content"))
    yield from _call_texts(message)
    if "reasoning_content" in message or "thinking_blocks" in message:
        yield from _strings(message.get("reasoning_content"))
        blocks = message.get("thinking_blocks")
        yield from _strings([block.get("thinking") for block in blocks or () if isinstance(block, Mapping)])


def _call_texts(message: Mapping[str, Any]) -> Iterator[str]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, Sequence) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield from _strings(function.get("arguments"))


def _strings(value: Any) -> Iterator[str]:
    """The texts of a string, a list of strings, or a list of content parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(value.get("text"))
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from _strings(item)


@attrs.define(repr=False)
class PromptFacts:
    """What is known of a prompt. Its repr shows no text; texts and fingerprints are made when first asked for.

    Attributes:
        token_estimate: About how many tokens it has, without pictures; exactly, once they were `counted`.
        session: The conversation's key, if the request names one; else empty.
        operation: What is asked.
    """

    token_estimate: int
    session: str = ""
    operation: Operation = Operation.CHAT
    _body: Mapping[str, Any] = attrs.field(factory=dict, alias="body")
    _text: str | None = attrs.field(init=False, default=None)
    _fingerprint: PromptFingerprint | None = attrs.field(init=False, default=None)
    _made_by: PromptFingerprinter | None = attrs.field(init=False, default=None)
    _blocks: PromptBlocks | None = attrs.field(init=False, default=None)
    _blocks_key: tuple[int, int] | None = attrs.field(init=False, default=None)
    _counted: int | None = attrs.field(init=False, default=None)

    @classmethod
    def of(cls, request: RouteRequest) -> PromptFacts:
        """The facts of a request's prompt."""
        operation, body = request.operation, request.body
        session = request.session or str(body.get("prompt_cache_key") or "")
        return cls(estimate_prompt(operation, body), session, operation, body)

    @classmethod
    def of_blocks(cls, blocks: PromptBlocks, session: str = "") -> PromptFacts:
        """The facts of a prompt of which only its size and its blocks are known, as in a recorded trace."""
        facts = cls(blocks.tokens, session)
        facts._blocks = blocks
        return facts

    def blocks(self, seed: int, block_bytes: int) -> PromptBlocks:
        """Its chain of blocks of bytes; the last one made is kept.

        Args:
            seed: Keeps apart what must not be shared.
            block_bytes: Bytes of a block.
        """
        if self._blocks is None or (self._blocks_key is not None and self._blocks_key != (seed, block_bytes)):
            self._blocks_key = (seed, block_bytes)
            return self._keep(byte_blocks(self._laid_out(), seed, block_bytes))
        return self._blocks

    async def blocks_in_turns(self, seed: int, block_bytes: int) -> PromptBlocks:
        """The same for a large prompt: others go on while it is laid out and hashed."""
        made = await anyio.to_thread.run_sync(lambda: byte_blocks(self._laid_out(), seed, block_bytes))
        self._blocks_key = (seed, block_bytes)
        return self._keep(made)

    def counted(self, tokens: int) -> None:
        """Let it be so many tokens, as its engine counts, in place of what its bytes come to.

        What is cached of it is then in the same unit, whether engines tell it in tokens or it was sent there in bytes.
        """
        if tokens > 0 and tokens != self.token_estimate:
            self.token_estimate = self._counted = tokens
            if self._blocks is not None:
                self._blocks = self._blocks.of_tokens(tokens)

    def _keep(self, made: PromptBlocks) -> PromptBlocks:
        self._blocks = made = made if self._counted is None else made.of_tokens(self._counted)
        return made

    def _laid_out(self) -> Laid:
        if self.operation is Operation.CHAT:
            return render_messages(messages_of(self._body), self._body.get("tools"))
        return Laid(self.text.encode("utf-8", "surrogatepass"))

    @property
    def text(self) -> str:
        """All its texts, one below the other."""
        if self._text is None:
            self._text = "\n".join(prompt_texts(self.operation, self._body))
        return self._text

    @property
    def beginning(self) -> str:
        """What prompts that begin alike share: its first two blocks; empty for a shorter one nobody named."""
        if self._blocks is None:
            return self.fingerprint.prefix_key
        hashes = self._blocks.hashes[:2]
        return f"{hashes[-1]:016x}" if hashes else self.fingerprint.prefix_key if self._body else ""

    @property
    def question(self) -> str:
        """What it asks: in a chat the last message of its user, else all its texts."""
        if self.operation is Operation.CHAT:
            for message in reversed(messages_of(self._body)):
                if message.get("role") == "user":
                    return "\n".join(_strings(message.get("content")))
        return self.text

    def texts(self) -> Iterator[str]:
        """Its texts one by one, without a copy."""
        return prompt_texts(self.operation, self._body)

    @property
    def fingerprint(self) -> PromptFingerprint:
        """What it is recognised by."""
        return self.fingerprint_by(_FINGERPRINTER)

    def fingerprint_by(self, fingerprinter: PromptFingerprinter) -> PromptFingerprint:
        """The fingerprint as one fingerprinter makes it; the last one made is kept."""
        if self._fingerprint is None or self._made_by is not fingerprinter:
            self._made_by = fingerprinter
            self._fingerprint = self._make_fingerprint(fingerprinter)
        return self._fingerprint

    def _make_fingerprint(self, fingerprinter: PromptFingerprinter) -> PromptFingerprint:
        if self.operation is Operation.CHAT:
            messages = messages_of(self._body)
            return fingerprinter.fingerprint(messages, tools=self._body.get("tools"))
        return fingerprinter.fingerprint_text(self.text)

    def __repr__(self) -> str:
        return f"PromptFacts(token_estimate={self.token_estimate})"


_FINGERPRINTER = PromptFingerprinter()


def estimate_prompt(operation: Operation, body: Mapping[str, Any]) -> int:
    """About how many tokens a request's prompt has: a quarter of its UTF-8 bytes; exact where it is given as tokens.

    Tools are a part of it, as chat templates write them: an agent's are often longer than all its messages.
    """
    if operation is Operation.CHAT:
        tools = body.get("tools") or body.get("functions")
        return _estimate_chat(body) + (estimate_tokens(_written(tools)) if tools else 0)
    given = body.get("prompt" if operation is Operation.COMPLETION else "input")
    counted = _count_ids(given) if isinstance(given, list | tuple) else 0
    return counted or sum(map(estimate_tokens, prompt_texts(operation, body)))


def _written(tools: Any) -> str:
    return orjson.dumps(tools, default=str).decode()


def _estimate_chat(body: Mapping[str, Any]) -> int:
    messages = messages_of(body)
    # Almost every content is one string, and that is three times as fast without a generator.
    plain = [m["content"] for m in messages if isinstance(m.get("content"), str)]
    if len(plain) == len(messages):
        calls = [t for m in messages if m.get("tool_calls") for t in _call_texts(m)]
        return sum(map(estimate_tokens, plain)) + sum(map(estimate_tokens, calls))
    return sum(map(estimate_tokens, prompt_texts(Operation.CHAT, body)))


def _count_ids(value: Sequence[Any]) -> int:
    """The number of tokens in a list of token ids, or of such lists; 0 for a list of texts."""
    if not value or isinstance(value[0], str):
        return 0
    return sum(len(item) if isinstance(item, list | tuple) else isinstance(item, int) for item in value)


def _describe_prompt(prompt: PromptFacts) -> str:
    return f"about {prompt.token_estimate} tokens"


def _describe_modality(modality: ModalityDetection) -> str:
    return modality.primary_modality


def _describe_pii(pii: PIIDetectionResult) -> Sequence[str]:
    return tuple(pii.pii_types)


def _describe_domain(found: PromptDomain) -> str:
    return found.domain


def _domain_details(found: PromptDomain) -> Mapping[str, AttributeValue]:
    if found.method == KEYWORDS and not found.degraded:  # nothing but what the usual classifier does
        return {}
    told: dict[str, AttributeValue] = {"method": found.method, "confidence": found.confidence}
    return {**told, "degraded": found.degraded} if found.degraded else told


def _describe_language(found: PromptLanguage) -> str:
    return found.language or "unknown"


def _language_details(found: PromptLanguage) -> Mapping[str, AttributeValue]:
    return {"method": found.method} if found.language else {}


def _describe_embedding(found: PromptEmbedding) -> str:
    return found.embedder if found.vector is not None else f"none: {found.reason}"


def _describe_route(found: RouteMatch) -> str:
    return found.name


def _route_details(found: RouteMatch) -> Mapping[str, AttributeValue]:
    told: dict[str, AttributeValue] = {"similarity": found.similarity, "nearest": found.nearest, "method": found.method}
    return {**told, "degraded": found.degraded} if found.degraded else told


PROMPT: Fact[PromptFacts] = Fact("prompt", _describe_prompt)
MODALITY: Fact[ModalityDetection] = Fact("modality", _describe_modality)
LANGUAGE: Fact[PromptLanguage] = Fact("language", _describe_language, _language_details)
PII: Fact[PIIDetectionResult] = Fact("pii", _describe_pii)
DOMAIN: Fact[PromptDomain] = Fact("domain", _describe_domain, _domain_details)
EMBEDDING: Fact[PromptEmbedding] = Fact("embedding", _describe_embedding)
ROUTE: Fact[RouteMatch] = Fact("route", _describe_route, _route_details)


def prompt_of(ctx: RoutingContext) -> PromptFacts:
    """The prompt's facts: those a classifier found, or else made now."""
    found = ctx.fact_or_none(PROMPT)
    return PromptFacts.of(ctx.request) if found is None else found


def prompt_tokens(ctx: RoutingContext) -> int:
    """About how many tokens the prompt has, pictures included."""
    modality = ctx.fact_or_none(MODALITY)
    return prompt_of(ctx).token_estimate + (modality.estimated_image_tokens if modality else 0)


def answer_tokens(ctx: RoutingContext, usual: int) -> int:
    """Most tokens of all answers asked for: `max_tokens` where the request sets it, else `usual`, times `n`."""
    if ctx.request.operation in (Operation.EMBEDDING, Operation.RERANK):
        return 0
    body = ctx.request.body
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    tokens = asked if isinstance(asked, int) and asked > 0 else usual
    choices = body.get("n")
    whole = tokens * choices if isinstance(choices, int) and choices > 1 else tokens
    return min(whole, MOST_TOKENS)  # a client may ask for any number, and no engine writes more


def work_of(ctx: RoutingContext, model: ModelConfig) -> Work:
    """What a request means for a replica: its prompt, the part of it that is expected there, and its answer."""
    cached = ctx.affinity.get(model.id, 0.0)
    return Work(prompt_tokens(ctx), cached, answer_tokens(ctx, 0), is_stream=ctx.request.stream)
