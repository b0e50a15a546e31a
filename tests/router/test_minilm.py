"""The sentence encoder of the extra, and the prototypes that were trained with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvfleet.router.embedding import has_minilm
from kvfleet.router.keywords import DOMAIN_KEYWORDS
from kvfleet.router.minilm import MiniLM
from kvfleet.router.prototypes import keyword_weights, shipped_prototypes
from kvfleet.router.semantic import DOMAINS, classify_domain
from kvfleet.router.vectors import cosine

needs_extra = pytest.mark.skipif(not has_minilm(), reason="needs kvfleet[semantic]")
SAMPLES = Path(__file__).parent / "samples" / "domains.jsonl"


@needs_extra
def test_the_same_in_other_words_is_near_and_something_else_is_far() -> None:
    """As the original model has them: 0.89 and 0.07."""
    texts = [
        "How do I reset my password?",
        "I forgot my password, how can I change it?",
        "What is the capital of France?",
    ]
    question, same, other = MiniLM().embed(texts)
    assert len(question) == 384
    assert cosine(question, question) == pytest.approx(1)
    assert cosine(question, same) == pytest.approx(0.89, abs=0.03)
    assert cosine(question, other) == pytest.approx(0.07, abs=0.03)


@needs_extra
def test_many_texts_keep_their_order() -> None:
    """They are sorted by length into batches, and come back as they were given; an empty text has a vector too."""
    texts = [f"{'long ' * (n % 7)}text {n}" for n in range(40)] + [""]
    model = MiniLM()
    together = model.embed(texts)
    for place in (0, 17, 39, 40):
        (alone,) = model.embed([texts[place]])
        assert cosine(alone, together[place]) > 0.97  # 8-bit activations share their scale within a batch


@needs_extra
def test_prototypes_are_right_more_often_than_words() -> None:
    """On an excerpt of the held-out prompts, short and balanced as they are; both together are best."""
    rows = [json.loads(line) for line in SAMPLES.read_text().splitlines()]
    vectors = MiniLM().embed([row["text"] for row in rows])
    prototypes = shipped_prototypes()
    words = sum(classify_domain(row["text"])[0] == row["domain"] for row in rows) / len(rows)
    both = [
        prototypes.classify(vector, keyword_weights(row["text"]))[0] == row["domain"]
        for row, vector in zip(rows, vectors, strict=True)
    ]
    assert sum(both) / len(rows) > words + 0.05


def test_the_prototypes_know_all_domains() -> None:
    """One direction for each, of the encoder's length; who follows it is there."""
    prototypes = shipped_prototypes()
    assert prototypes.embedder == MiniLM().name
    assert set(prototypes.domains) == set(DOMAINS)
    assert {len(row) for row in prototypes.weights} == {384}
    for domain, row in zip(prototypes.domains, prototypes.weights, strict=True):
        length = sum(value * value for value in row) ** 0.5
        said, confidence = prototypes.classify([value / length for value in row])
        assert (said, confidence > 0.9) == (domain, True)


def test_each_domain_s_words_speak_for_it() -> None:
    """In the combination the words of a domain weigh most for that domain."""
    prototypes = shipped_prototypes()
    for column, domain in enumerate(DOMAIN_KEYWORDS):
        weights = {name: row[column] for name, row in zip(prototypes.domains, prototypes.keywords, strict=True)}
        assert max(weights, key=weights.__getitem__) == domain
    assert keyword_weights("Translate this")[list(DOMAIN_KEYWORDS).index("translation")] == 3.0
