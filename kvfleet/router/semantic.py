"""Routing by what a prompt is about: a classifier by words and phrases, and the strategies that use it.

Terms are matched as whole words (a plural counts as its singular), never as parts of words: "capital" does not mean
"api". How often the classifier is right on labelled prompts is in ``docs/how-to/semantic.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs

from kvfleet.config.fields import flag, mapping
from kvfleet.config.findings import did_you_mean
from kvfleet.config.schema import ModelConfig
from kvfleet.router.descriptions import Nearness
from kvfleet.router.keywords import DOMAIN_KEYWORDS, PATTERNS
from kvfleet.router.replicas import Replicas
from kvfleet.router.scoring import Ranking, ScoringContext, arranged

__all__ = [
    "DOMAINS",
    "DomainStrategy",
    "PromptDomain",
    "SemanticStrategy",
    "beginning_and_end",
    "classify_domain",
    "describe_prompt",
    "estimate_complexity",
    "keyword_scores",
    "question_in",
]

GENERAL = "general"
DOMAINS = (*DOMAIN_KEYWORDS, GENERAL)
"""The eight domains, and the one of everything else."""

KEYWORDS, EMBEDDINGS, COMBINED = "keywords", "embeddings", "combined"
"""The ways of telling a domain."""

_NEUTRAL = ScoringContext()
_LONGEST_HEAD = 2000
_LONGEST_TAIL = 1000
"""Characters that are read of a long prompt: what is asked stands at its beginning or its end."""
_NO_MATCH = 0.3
_LEAST = 1.0
"""What the terms of a domain must weigh; less is chance."""
_WORD = re.compile(r"[a-z0-9]+(?:\+\+|#)?")
_TECHNICAL = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(?:algorithm|architecture|implement|optimi[sz]e|complexity|concurren\w+|distributed)\b",
        r"\b(?:prove|proof|derive|theorem|equation|integral|derivative)\b",
        r"\b(?:analy[sz]e|compare|evaluate|critique|trade-?offs?)\b",
        r"\b(?:explain why|step by step|in detail|reason(?:ing)?)\b",
        r"```|\bdef |\bclass |\bSELECT\b.{1,200}\bFROM\b",
    )
)


def _index() -> tuple[dict[str, list[tuple[str, float]]], frozenset[str]]:
    """Each term's domains and weights, and the first words of the terms that are phrases."""
    terms: dict[str, list[tuple[str, float]]] = {}
    for domain, weights in DOMAIN_KEYWORDS.items():
        for term, weight in weights.items():
            terms.setdefault(term, []).append((domain, weight))
    return terms, frozenset(term.partition(" ")[0] for term in terms if " " in term)


_TERMS, _FIRST_WORDS = _index()


def classify_domain(text: str) -> tuple[str, float]:
    """What a text is about, and how sure that is.

    Args:
        text: A prompt; of a long one its beginning and its end are read.

    Returns:
        One of the eight domains or ``general``, and 0.5 to 1: a half and a tenth of the weight by which its terms
        exceed the next domain's.

    >>> classify_domain("Write a Python function to sort a list")
    ('coding', 0.7)
    >>> classify_domain("What is the capital of France?")
    ('general', 0.5)
    """
    scores = keyword_scores(beginning_and_end(text))
    domain = max(scores, key=scores.__getitem__)
    best = scores.pop(domain)
    if best < _LEAST:
        return GENERAL, 0.5
    margin = best - max(scores.values())
    return domain, round(min(1.0, 0.5 + 0.1 * margin), 4)


def beginning_and_end(text: str) -> str:
    """What is read of a text: all of a short one, of a long one its beginning and its end."""
    if len(text) <= _LONGEST_HEAD + _LONGEST_TAIL:
        return text
    return f"{text[:_LONGEST_HEAD]}\n{text[-_LONGEST_TAIL:]}"


def keyword_scores(text: str) -> dict[str, float]:
    """By domain, the weight of its terms in a text; each term counts once."""
    words = [_singular(word) for word in _WORD.findall(text.lower())]
    found = _TERMS.keys() & set(words)
    for at, word in enumerate(words):
        if word in _FIRST_WORDS:
            found.update(phrase for n in (2, 3, 4) if (phrase := " ".join(words[at : at + n])) in _TERMS)
    scores = dict.fromkeys(DOMAIN_KEYWORDS, 0.0)  # of two that weigh the same the first named wins, always
    for term in found:
        for domain, weight in _TERMS[term]:
            scores[domain] += weight
    for domain, pattern, weight in PATTERNS:
        if pattern.search(text):
            scores[domain] += weight
    # A set has no order, and sums of floats depend on theirs.
    return {domain: round(score, 6) for domain, score in scores.items()}


def _singular(word: str) -> str:
    """A word without the ending of its plural, if it is known so."""
    if word in _TERMS or not word.endswith("s") or word in _FIRST_WORDS:
        return word
    for short in (word[:-1], word[:-2], f"{word[:-3]}y"):
        if short in _TERMS or short in _FIRST_WORDS:
            return short
    return word


def estimate_complexity(text: str) -> float:
    """How much a prompt asks for, 0..1: by its length, its questions, and words of technical work.

    >>> estimate_complexity("Hello")
    0.0
    """
    words = len(text.split(None, 201))
    questions = text.count("?")
    score = 0.3 if words > 200 else 0.2 if words > 50 else 0.1 if words > 20 else 0.0
    score += 0.2 if questions > 2 else 0.1 if questions else 0.0
    read = beginning_and_end(text)
    score += 0.1 * sum(pattern.search(read) is not None for pattern in _TECHNICAL)
    return round(min(score, 1.0), 4)


@attrs.frozen
class PromptDomain:
    """What a prompt is about, and how much it asks for.

    Attributes:
        domain: One of `DOMAINS`.
        confidence: 0..1; by words and phrases at least a half.
        complexity: 0..1.
        method: How the domain was told: ``keywords``, ``embeddings`` or ``combined``.
        degraded: Why it was told by words although embeddings were to be compared; empty if not so.
    """

    domain: str = GENERAL
    confidence: float = 0.5
    complexity: float = 0.0
    method: str = KEYWORDS
    degraded: str = ""


def describe_prompt(text: str) -> PromptDomain:
    """The domain and the complexity of a prompt."""
    return PromptDomain(*classify_domain(text), estimate_complexity(text))


class _HasQuestion(Protocol):
    @property
    def question(self) -> str:
        """What the prompt asks."""


def question_in(context: ScoringContext) -> str:
    """What the prompt of a context asks: as the library's user gave it, or in the pipeline its user's last message."""
    text = context.metadata.get("prompt_text")
    if isinstance(text, str):
        return text
    prompt: _HasQuestion | None = context.metadata.get("prompt")
    return "" if prompt is None else prompt.question


def _domain_of(context: ScoringContext) -> PromptDomain:
    """What a classifier found; or, where none looked, what is found now in the prompt."""
    found = context.metadata.get("domain")
    return found if isinstance(found, PromptDomain) else describe_prompt(question_in(context))


class _HasName(Protocol):
    @property
    def name(self) -> str:
        """The route's."""


def _route_of(context: ScoringContext) -> str:
    """The route a classifier found; empty if none looked."""
    found: _HasName | None = context.metadata.get("route")
    return "" if found is None else found.name


def _rank_models(
    models: Sequence[ModelConfig],
    context: ScoringContext,
    terms: Mapping[str, Sequence[float]],
    totals: Sequence[float],
    mode: str,
) -> Ranking:
    """Models by their totals, the replicas within each by expected time."""
    replicas = Replicas.of(models, context)
    of = {model.name: total for model, total in zip(models, totals, strict=True)}
    names = sorted(replicas.groups, key=of.__getitem__, reverse=True)
    return arranged(models, replicas.order(names), totals, terms=terms, mode=mode)


@attrs.define
class SemanticStrategy:
    """Choose the model made for what the prompt is about, and no stronger than it needs.

    If a model's tag `route` is the prompt's route, only such models match. Else a model matches by its tag `domain`, or
    by what its description is about: its domain, or with embeddings how near its meaning is to the prompt's. The total
    is 0.6 for the match (0.3 of that for no match) and 0.4 for a quality close to the prompt's complexity.
    """

    model_descriptions: Mapping[str, str] = mapping(
        doc="What a model is good at, in words, by model; read where it has no tag `domain`.",
        example={"code-model": "Expert at coding tasks"},
    )
    use_embeddings: bool = flag(doc="Compare descriptions with prompts by meaning; needs `kvfleet[semantic]`.")
    _described: dict[str, str] = attrs.field(init=False, repr=False, eq=False)
    _nearness: Nearness = attrs.field(init=False, factory=Nearness, repr=False, eq=False)

    @_described.default
    def _read_descriptions(self) -> dict[str, str]:
        return {name: classify_domain(text)[0] for name, text in self.model_descriptions.items()}

    def provision(self, services: Any) -> None:
        """Check the models' names, and find what makes vectors.

        Raises:
            ValueError: for a model that is not there.
        """
        _check_models("model_descriptions", self.model_descriptions, services.models)
        self._nearness = Nearness(services.embeddings)

    async def aopen(self) -> None:
        """Learn what the descriptions mean.

        Raises:
            EmbeddingError: if nobody can say.
        """
        if self.use_embeddings:
            await self._nearness.learn(self.model_descriptions)

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank models by match and fit."""
        context = context or _NEUTRAL
        prompt = _domain_of(context)
        near = self._nearness.of_prompt(self.model_descriptions, context, question_in) if self.use_embeddings else {}
        made_for = [model.tags.get("route", "") == _route_of(context) != "" for model in models]
        matches = [
            (1.0 if is_made else _NO_MATCH) if any(made_for) else self._match(model, prompt.domain, near)
            for model, is_made in zip(models, made_for, strict=True)
        ]
        fits = [1 - abs(model.quality_score - prompt.complexity) for model in models]
        totals = [0.6 * match + 0.4 * fit for match, fit in zip(matches, fits, strict=True)]
        mode = f"domain {prompt.domain}" if near or not self.use_embeddings else f"domain {prompt.domain}, by words"
        return _rank_models(models, context, {"domain": matches, "fit": fits}, totals, mode)

    def _match(self, model: ModelConfig, domain: str, near: Mapping[str, float]) -> float:
        """1 for a model made for the prompt's domain, 0.3 for another one, between them by nearness."""
        tags = model.tags
        if "domain" not in tags and model.name in near:
            return _NO_MATCH + (1 - _NO_MATCH) * near[model.name]
        return 1.0 if (tags.get("domain") or self._described.get(model.name, GENERAL)) == domain else _NO_MATCH


@attrs.define
class DomainStrategy:
    """Choose the model that a map names for what the prompt is about.

    A mapped model's total is 1, that of a model whose tag `domain` says the same 0.8, and any other's half its quality.
    """

    domain_model_map: Mapping[str, str] = mapping(
        doc="The model for each domain.", example={"coding": "deepseek-coder", "medical": "med-llama"}
    )

    def provision(self, services: Any) -> None:
        """Check the names of domains and models.

        Raises:
            ValueError: for one that is not there.
        """
        for domain in self.domain_model_map:
            if domain not in DOMAINS:
                raise ValueError(f"there is no domain {domain!r}; {did_you_mean(domain, DOMAINS)}")
        _check_models("the domain map", self.domain_model_map.values(), services.models)

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank models by domain."""
        context = context or _NEUTRAL
        prompt = _domain_of(context)
        mapped = self.domain_model_map.get(prompt.domain)
        totals = [self._total(model, prompt.domain, mapped) for model in models]
        return _rank_models(models, context, {}, totals, f"domain {prompt.domain}")

    def _total(self, model: ModelConfig, domain: str, mapped: str | None) -> float:
        if model.name == mapped:
            return 1.0
        return 0.8 if model.tags.get("domain") == domain else model.quality_score * 0.5


def _check_models(what: str, named: Any, models: Sequence[ModelConfig]) -> None:
    known = dict.fromkeys(model.name for model in models)
    for name in named:
        if name not in known:
            raise ValueError(f"{what} names the model {name!r}, which is not in the fleet; {did_you_mean(name, known)}")
