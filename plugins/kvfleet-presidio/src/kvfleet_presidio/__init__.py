"""Personal data by Microsoft Presidio: what kvfleet's own patterns find, and what only a language model can.

`PresidioClassifier` gives the same fact as the built-in `classify.pii`, so policies (`has_pii`, `pii_types`) read
either. Presidio and its model are loaded when the pipeline opens, and work in threads of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import anyio
import anyio.to_thread
import attrs

from kvfleet.builtin.facts import PII, all_texts
from kvfleet.config.fields import listing, number, text
from kvfleet.errors import BadRequestError, ComponentError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Fact, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.policy.pii import PIIDetectionResult

__all__ = ["TYPES", "PresidioClassifier", "kvfleet_components"]

TYPES: Mapping[str, str] = {
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone",
    "US_SSN": "ssn",
    "CREDIT_CARD": "credit_card",
    "IP_ADDRESS": "ip_address",
    "US_PASSPORT": "passport",
    "IBAN_CODE": "iban",
    "US_DRIVER_LICENSE": "us_driver_license",
}
"""kvfleet's names for Presidio's entities; every other entity keeps its own name in lower case, as in ``person``."""

_DEFAULT = ("PERSON", *TYPES)

Analyze = Callable[[str], Sequence[Any]]


@attrs.define
class PresidioClassifier:
    """Look for personal data with Presidio in every text of the request; names of people included.

    It needs `presidio-analyzer` and a spaCy model that is installed beside it; nothing is downloaded. A request with
    more text than `max_chars` is refused: nothing is let through unread.
    """

    model: str = text("en_core_web_sm", doc="The spaCy model; a package that is installed, never downloaded.")
    language: str = text("en", doc="The language of the texts, as Presidio names it.")
    entities: tuple[str, ...] = listing(_DEFAULT, doc="Presidio's entities to look for.", example=["PERSON", "US_SSN"])
    min_score: float = number(0.5, ge=0, le=1, doc="Least confidence of a find.")
    max_chars: int = number(100_000, gt=0, doc="Longest text of a request, all its parts together, in characters.")
    max_concurrent: int = number(2, ge=1, le=64, doc="Most texts that are looked through at once.")
    judges_texts: ClassVar[bool] = True
    _analyze: Analyze | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _limiter: anyio.CapacityLimiter | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _seen: int = attrs.field(init=False, default=0, eq=False)

    def provision(self, services: Services) -> None:
        """Nothing is wired; tests put their own analyzer in by `use`."""

    def use(self, analyze: Analyze) -> None:
        """Look through texts by a function of one's own instead of Presidio's."""
        self._analyze = analyze

    async def aopen(self) -> None:
        """Load Presidio and the model, off the event loop.

        Raises:
            ComponentError: if either is not installed.
        """
        self._limiter = anyio.CapacityLimiter(self.max_concurrent)
        if self._analyze is None:
            self._analyze = await anyio.to_thread.run_sync(self._load)

    async def aclose(self) -> None:
        """Let the model go."""
        self._analyze = self._limiter = None

    def state(self) -> Mapping[str, int]:
        """How many requests were looked through."""
        return {"requests": self._seen}

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `PII`.

        Raises:
            BadRequestError: if the texts are too long to be looked through.
            ComponentError: if the component was not opened.
        """
        texts = all_texts(ctx.request)
        length = sum(map(len, texts))
        if length > self.max_chars:
            raise BadRequestError(f"{length} characters are more than are looked through here ({self.max_chars})")
        if self._limiter is None or self._analyze is None:
            raise ComponentError("classify.presidio was not opened")
        found = await anyio.to_thread.run_sync(_types_in, self._analyze, texts, self.min_score, limiter=self._limiter)
        self._seen += 1
        return {PII: PIIDetectionResult(found)}

    def _load(self) -> Analyze:
        try:
            presidio = importlib.import_module("presidio_analyzer")
            engines = importlib.import_module("presidio_analyzer.nlp_engine")
            importlib.import_module(self.model)
        except ImportError as error:
            raise ComponentError(
                f"classify.presidio needs presidio-analyzer and the spaCy model {self.model!r}: "
                f"pip install 'kvfleet-presidio[analyzer]', and the model's own wheel ({error.name} is missing)"
            ) from error
        _stay_offline()
        models = [{"lang_code": self.language, "model_name": self.model}]
        provider = engines.NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models})
        engine = presidio.AnalyzerEngine(nlp_engine=provider.create_engine(), supported_languages=[self.language])

        def analyze(text: str) -> Sequence[Any]:
            return engine.analyze(text, language=self.language, entities=list(self.entities))

        return analyze


def _stay_offline() -> None:
    """Keep Presidio's check of e-mail domains to the installed list of suffixes; by default it fetches a newer one.

    The extractor it uses is its library's default one, so others in this process go without the newer list too.
    """
    tldextract = importlib.import_module("tldextract.tldextract")
    tldextract.TLD_EXTRACTOR.suffix_list_urls = ()


def _types_in(analyze: Analyze, texts: Sequence[str], min_score: float) -> list[str]:
    """The types found in some texts, each once, in alphabetical order; runs in a thread."""
    found = {
        TYPES.get(result.entity_type, result.entity_type.lower())
        for text in texts
        if text
        for result in analyze(text)
        if result.score >= min_score
    }
    return sorted(found)


@hookimpl
def kvfleet_components() -> Iterator[Component]:
    """The classifier."""
    yield Component(Kind.CLASSIFY, "presidio", PresidioClassifier, gives=(PII,), must_hold=True)
