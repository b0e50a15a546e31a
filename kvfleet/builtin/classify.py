"""Classifiers: what is known of a request before anybody is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import anyio.to_thread
import attrs

from kvfleet.adapters.call import Operation
from kvfleet.builtin.facts import (
    DOMAIN,
    EMBEDDING,
    LANGUAGE,
    MODALITY,
    PII,
    PROMPT,
    all_texts,
    messages_of,
    prompt_of,
)
from kvfleet.config.fields import choice, listing, text
from kvfleet.errors import ComponentError
from kvfleet.plugin.component import Component, Services, Stability
from kvfleet.plugin.contract import Fact, Kind, RouteRequest, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.policy.pii import PIIDetectionResult, PIIDetector
from kvfleet.policy.texts import may_have_files
from kvfleet.router.language import PromptLanguage, detect_language, primary_language
from kvfleet.router.multimodal import TEXT_ONLY, detect_modality
from kvfleet.router.prototypes import Prototypes, keyword_weights, shipped_prototypes
from kvfleet.router.semantic import (
    COMBINED,
    EMBEDDINGS,
    KEYWORDS,
    PromptDomain,
    describe_prompt,
    estimate_complexity,
)

__all__ = ["DomainClassifier", "LanguageClassifier", "ModalityClassifier", "PIIClassifier", "PromptClassifier"]

_MOST_ON_THE_LOOP = 128 * 1024
"""Characters that are looked through for personal data at once, in 2 ms at most; more in a thread, since RE2 lets the
event loop go on meanwhile (`benchmarks/loop_lag.py`)."""


@attrs.frozen
class PromptClassifier:
    """Estimate the prompt's length and name its conversation; its fingerprint is made when a stage asks for it."""

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `PROMPT`."""
        return {PROMPT: prompt_of(ctx)}


@attrs.frozen
class ModalityClassifier:
    """See whether the request carries pictures, sound, video or files."""

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `MODALITY`."""
        if ctx.request.operation is not Operation.CHAT:
            return {MODALITY: TEXT_ONLY}
        messages = messages_of(ctx.request.body)
        if ctx.request.is_large:
            return {MODALITY: await anyio.to_thread.run_sync(detect_modality, messages)}
        return {MODALITY: detect_modality(messages)}


@attrs.frozen
class LanguageClassifier:
    """See in which language the user's last message is: by the request's tag `language`, or else by its text.

    Of a text that is short, mixed or code nobody can tell, and then no model is left out for its languages.
    """

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `LANGUAGE`."""
        tag = ctx.request.tags.get("language", "")
        if tag:
            return {LANGUAGE: PromptLanguage(primary_language(tag), "tag")}
        return {LANGUAGE: PromptLanguage(detect_language(prompt_of(ctx).question))}


@attrs.define
class DomainClassifier:
    """See what the user's last message is about, by words and phrases or by embeddings, and how much it asks for.

    Where a vector was wanted and there is none, words and phrases decide, and the trace says why.
    """

    method: str = choice(
        KEYWORDS,
        of=(KEYWORDS, EMBEDDINGS, COMBINED),
        doc="What is looked at: words and phrases, the vector of `classify.embedding`, or both.",
    )
    prototypes: str = text(
        "",
        doc="A file of prototypes trained by `benchmarks/domain_prototypes.py` for another embedder than `minilm`.",
        example="prototypes.json",
    )
    _prototypes: Prototypes | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def required_facts(self) -> tuple[Fact[Any], ...]:
        """The vector, unless words and phrases suffice."""
        return () if self.method == KEYWORDS else (EMBEDDING,)

    def provision(self, services: Services) -> None:
        """Read the prototypes.

        Raises:
            ComponentError: if they cannot be read, or speak of another embedder's vectors.
        """
        if self.method == KEYWORDS:
            return
        path = Path(self.prototypes).expanduser() if self.prototypes else None
        self._prototypes = shipped_prototypes() if path is None else Prototypes.load(path)
        made = services.embeddings
        if made is not None and made.name != self._prototypes.embedder:
            what = f"the prototypes are those of {self._prototypes.embedder}, and vectors come from {made.name}"
            raise ComponentError(
                f"{what}; train some with benchmarks/domain_prototypes.py and name them: `prototypes:`"
            )

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `DOMAIN`."""
        asked = prompt_of(ctx).question
        if self._prototypes is None:
            return {DOMAIN: describe_prompt(asked)}
        embedding = ctx.fact(EMBEDDING)
        if embedding.vector is None:
            return {DOMAIN: attrs.evolve(describe_prompt(asked), degraded=embedding.reason)}
        words = keyword_weights(asked) if self.method == COMBINED else None
        domain, confidence = self._prototypes.classify(embedding.vector, words)
        return {DOMAIN: PromptDomain(domain, confidence, estimate_complexity(asked), self.method)}


@attrs.define
class PIIClassifier:
    """Look for personal data in every text of the request: messages, tools and their results, fields nobody knows."""

    types: tuple[str, ...] = listing((), doc="Types to look for; all there are if empty.", example=["email", "ssn"])
    judges_texts: ClassVar[bool] = True
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
        if ctx.request.is_large or may_have_files(ctx.request.raw):
            return {PII: await anyio.to_thread.run_sync(self._look_through, ctx.request)}
        texts = all_texts(ctx.request)
        if sum(map(len, texts)) > _MOST_ON_THE_LOOP:
            return {PII: await anyio.to_thread.run_sync(self._detector.detect_all, texts)}
        return {PII: self._detector.detect_all(texts)}

    def _look_through(self, request: RouteRequest) -> PIIDetectionResult:
        return self._detector.detect_all(all_texts(request))


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The classifiers."""
    yield Component(Kind.CLASSIFY, "prompt", PromptClassifier, gives=(PROMPT,), stability=Stability.STABLE)
    yield Component(Kind.CLASSIFY, "modality", ModalityClassifier, gives=(MODALITY,), stability=Stability.STABLE)
    yield Component(Kind.CLASSIFY, "pii", PIIClassifier, gives=(PII,), must_hold=True)
    yield Component(Kind.CLASSIFY, "language", LanguageClassifier, gives=(LANGUAGE,))
    yield Component(Kind.CLASSIFY, "domain", DomainClassifier, gives=(DOMAIN,))
