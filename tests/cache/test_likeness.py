"""Whether two questions ask the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.cache.likeness import Likeness, Meaning, Wording

WORDING = Wording()


def alike(one: str, other: str, likeness: Likeness = WORDING) -> float:
    """How alike two questions are; 0 if they are not to be compared."""
    mine, theirs = likeness.sketch(one), likeness.sketch(other)
    if mine is None or theirs is None or mine.must != theirs.must:
        return 0.0
    return likeness.similarity(mine, theirs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the capital of France?", "what is the capital of france"),
        ("What is the capital of France?", "  What's the  capital of France ??"),
        ("Don\u2019t we owe VAT?", "do not we owe vat"),
        ("I'm late, what now?", "I am late, what now"),
        ("What is the US debt?", "what is the US debt"),
    ],
)
def test_another_form_is_the_same_question(one: str, other: str) -> None:
    """Case, spaces, contractions, typographic quotes and the final mark make no difference at all."""
    assert alike(one, other) == 1.0


@pytest.mark.parametrize(
    "other",
    [
        "please explain how a cache works",
        "Explain how a cache works, please.",
        "Hello, explain how a cache works",
        "could you please explain how a cache works",
    ],
)
def test_courtesy_makes_little_difference(other: str) -> None:
    """It stands around the question; the longer it is, the less alike the two are."""
    assert 0.6 < alike("Explain how a cache works", other) < 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the capital of France?", "What is the capital of Spain?"),
        ("What is 2 + 3?", "What is 2 - 3?"),
        ("What is 12 times 3?", "What is 1 2 times 3?"),
        ("Is 1,5 more than 1?", "Is 1.5 more than 1?"),
        ("(2 + 3) * 4 is what?", "2 + (3 * 4) is what?"),
        ("Can I take aspirin with ibuprofen?", "Can I not take aspirin with ibuprofen?"),
        ("Should I pay with the card?", "Should I pay without the card?"),
        ("Flights from Rome to Oslo", "Flights from Oslo to Rome"),
        ("Did Anna call Ben?", "Did Ben call Anna?"),
        ("How do I polish a table?", "How do I Polish a table?"),
        ("Is the car from us?", "Is the car from US?"),
        ("What is C++?", "What is C?"),
        ("What is C#?", "What is C++?"),
        ("When is the next train?", "When was the next train?"),
        ("Who is a president?", "Who is the president?"),
        ("It can't be done, right?", "It can be done, right?"),
        ("What does please mean?", "What does mean?"),
        ("x² for x = 3", "x2 for x = 3"),
        ("Let us eat, grandma", "Let us eat grandma"),
    ],
)
def test_another_question_is_another_question(one: str, other: str) -> None:
    """Numbers, signs, names, negations, order, tense and articles: nothing that carries meaning may differ."""
    assert alike(one, other) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ?! ",
        "please",
        "x" * 501,
        "Why does this fail?\nprint(1)",
        "What is `x`?",
        "Correct my text: i has a dog",
        "How many capital letters has this Sentence?",
        "Translate hello into French",
    ],
)
def test_what_hangs_on_its_form_is_not_compared(text: str) -> None:
    """Code, layout, what asks about letters or wording, and what is empty or long."""
    assert WORDING.sketch(text) is None


def test_a_sketch_holds_no_words() -> None:
    """It can be kept where texts must not be."""
    sketch = WORDING.sketch("Where does Ada Lovelace live?")
    assert "lovelace" not in repr(sketch).lower()


@given(st.text(max_size=80))
def test_any_text_is_like_itself(text: str) -> None:
    """And sketching never raises, whatever the text."""
    if WORDING.sketch(text) is not None:
        assert alike(text, text) == 1.0


@given(st.text(max_size=40), st.integers(0, 999), st.integers(0, 999))
def test_questions_with_different_numbers_are_never_alike(text: str, one: int, other: int) -> None:
    """Whatever stands around them."""
    if one != other:
        assert alike(f"{text} {one} apples", f"{text} {other} apples") == 0.0


def embed(text: str) -> list[float]:
    """A toy of an embedding: it sees only how many words there are about money."""
    return [1.0, float(sum(word in text.lower() for word in ("pay", "price", "cost")))]


class TestMeaning:
    """Embeddings, held in check."""

    MEANING = Meaning(embed)

    def test_other_words_may_mean_the_same(self) -> None:
        """As the embedding has it."""
        assert alike("how much does it cost", "what is the price", self.MEANING) == pytest.approx(1.0)
        assert alike("how much does it cost", "who are you", self.MEANING) < 0.9

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("what do 3 cost", "what do 4 cost"),
            ("what does it cost in Oslo", "what does it cost in Rome"),
            ("what does it not cost", "what does it cost"),
            ("why can't I pay", "why can I pay"),
            ('who said "pay me"', 'who said "price me"'),
            ("cost + 1", "cost - 1"),
        ],
    )
    def test_what_embeddings_hardly_see_must_be_the_same(self, one: str, other: str) -> None:
        """Numbers, names, negations, quotations and signs."""
        assert alike(one, other, self.MEANING) == 0.0

    @pytest.mark.parametrize("vector", [[], [0.0, 0.0], [float("nan")], [float("inf"), 1.0]])
    def test_a_useless_vector_compares_nothing(self, vector: list[float]) -> None:
        """Rather than with everything."""
        assert Meaning(lambda _: vector).sketch("what is it") is None

    def test_vectors_of_different_lengths_are_not_alike(self) -> None:
        """As after another model came in."""
        one, other = Meaning(lambda _: [1.0]).sketch("what"), Meaning(lambda _: [1.0, 0.0]).sketch("what")
        assert one is not None
        assert other is not None
        assert self.MEANING.similarity(one, other) == 0.0
