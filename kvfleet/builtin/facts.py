"""The facts the built-in classifiers find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from kvfleet.adapters.base import Operation
from kvfleet.cache.fingerprints import PromptFingerprint
from kvfleet.plugin.contract import Fact
from kvfleet.router.multimodal import ModalityDetection

if TYPE_CHECKING:
    from kvfleet.policy.pii import PIIDetectionResult

__all__ = ["MODALITY", "PII", "PROMPT", "PromptFacts", "prompt_texts"]


def prompt_texts(operation: Operation, body: Mapping[str, Any]) -> Iterator[str]:
    """Every text in a request that its author or an engine will read, in order: also tool results and calls."""
    if operation is Operation.CHAT:
        for message in body.get("messages") or ():
            yield from _message_texts(message)
    elif operation is Operation.COMPLETION:
        yield from _strings(body.get("prompt"))
        yield from _strings(body.get("suffix"))
    elif operation is Operation.EMBEDDING:
        yield from _strings(body.get("input"))
    else:
        yield from _strings(body.get("query"))
        yield from _strings(body.get("documents"))


def _message_texts(message: Any) -> Iterator[str]:
    if not isinstance(message, Mapping):
        return
    yield from _strings(message.get("content"))
    for call in message.get("tool_calls") or ():
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
    """What is known of a prompt. Its repr shows no text.

    Attributes:
        token_estimate: About how many tokens it has, without pictures.
        fingerprint: What it is recognised by.
        session: The conversation's key, if the request names one; else empty.
    """

    token_estimate: int
    fingerprint: PromptFingerprint
    session: str = ""
    operation: Operation = Operation.CHAT
    _body: Mapping[str, Any] = attrs.field(factory=dict, alias="body")
    _text: str | None = attrs.field(init=False, default=None)

    @property
    def text(self) -> str:
        """All its texts, one below the other; put together when first asked for."""
        if self._text is None:
            self._text = "\n".join(prompt_texts(self.operation, self._body))
        return self._text

    def texts(self) -> Iterator[str]:
        """Its texts one by one, without a copy."""
        return prompt_texts(self.operation, self._body)

    def __repr__(self) -> str:
        return f"PromptFacts(token_estimate={self.token_estimate})"


def _describe_prompt(prompt: PromptFacts) -> str:
    return f"about {prompt.token_estimate} tokens"


def _describe_modality(modality: ModalityDetection) -> str:
    return modality.primary_modality


def _describe_pii(pii: PIIDetectionResult) -> Sequence[str]:
    return tuple(pii.pii_types)


PROMPT: Fact[PromptFacts] = Fact("prompt", _describe_prompt)
MODALITY: Fact[ModalityDetection] = Fact("modality", _describe_modality)
PII: Fact[PIIDetectionResult] = Fact("pii", _describe_pii)
