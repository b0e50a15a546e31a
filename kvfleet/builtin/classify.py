"""Classifiers: what is known of a request before anybody is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from kvfleet.adapters.call import Operation
from kvfleet.builtin.facts import DOMAIN, MODALITY, PII, PROMPT, PromptFacts, messages_of, prompt_of, prompt_texts
from kvfleet.config.fields import listing
from kvfleet.plugin.component import Component, Stability
from kvfleet.plugin.contract import Fact, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.policy.pii import PIIDetector
from kvfleet.router.multimodal import TEXT_ONLY, detect_modality
from kvfleet.router.semantic import describe_prompt

__all__ = ["DomainClassifier", "ModalityClassifier", "PIIClassifier", "PromptClassifier"]


@attrs.frozen
class PromptClassifier:
    """Estimate the prompt's length and name its conversation; its fingerprint is made when a stage asks for it."""

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `PROMPT`."""
        return {PROMPT: PromptFacts.of(ctx.request)}


@attrs.frozen
class ModalityClassifier:
    """See whether the request carries pictures, sound, video or files."""

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `MODALITY`."""
        if ctx.request.operation is not Operation.CHAT:
            return {MODALITY: TEXT_ONLY}
        return {MODALITY: detect_modality(messages_of(ctx.request.body))}


@attrs.frozen
class DomainClassifier:
    """See what the user's last message is about, by its words and phrases, and how much it asks for."""

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `DOMAIN`."""
        return {DOMAIN: describe_prompt(prompt_of(ctx).question)}


@attrs.define
class PIIClassifier:
    """Look for personal data in every text of the request, tool results included."""

    types: tuple[str, ...] = listing((), doc="Types to look for; all there are if empty.", example=["email", "ssn"])
    _detector: PIIDetector = attrs.field(init=False, repr=False, eq=False)

    @_detector.default
    def _make_detector(self) -> PIIDetector:
        """A detector of the wanted types.

        Raises:
            ValueError: for a type there is no pattern for; the build makes a finding of it.
        """
        return PIIDetector.of_types(self.types)

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `PII`."""
        texts = prompt_texts(ctx.request.operation, ctx.request.body)
        return {PII: self._detector.detect_all(texts)}


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The classifiers."""
    yield Component(Kind.CLASSIFY, "prompt", PromptClassifier, gives=(PROMPT,), stability=Stability.STABLE)
    yield Component(Kind.CLASSIFY, "modality", ModalityClassifier, gives=(MODALITY,), stability=Stability.STABLE)
    yield Component(Kind.CLASSIFY, "pii", PIIClassifier, gives=(PII,), must_hold=True)
    yield Component(Kind.CLASSIFY, "domain", DomainClassifier, gives=(DOMAIN,))
