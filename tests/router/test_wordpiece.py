"""Words cut into pieces as the model was trained on them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.router.wordpiece import Wordpieces, bert_uncased


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("How do I reset my password?", [101, 2129, 2079, 1045, 25141, 2026, 20786, 1029, 102]),
        ("unaffable", [101, 14477, 20961, 3468, 102]),
        ("Café naïve", [101, 7668, 15743, 102]),
        ("x\u0000y 日本", [101, 1060, 2100, 1864, 1876, 102]),
        ("", [101, 102]),
    ],
)
def test_texts_become_the_numbers_of_the_original(text: str, ids: list[int]) -> None:
    """As Hugging Face's `tokenizers` gives them for bert-base-uncased."""
    assert bert_uncased().ids(text, 256) == ids


def test_the_plain_way_and_the_other_agree() -> None:
    """ASCII has a way of its own; the same words amid other letters give the same numbers."""
    text = "don't stop, 3.5% of e-mails (v2)!\tnow"
    plain = bert_uncased().ids(text, 256)[1:-1]
    assert bert_uncased().ids(f"é {text}", 256)[2:-1] == plain


@given(st.text(max_size=300), st.integers(2, 40))
def test_no_text_has_more_pieces_than_allowed(text: str, most: int) -> None:
    """The beginning and the end are always there."""
    ids = bert_uncased().ids(text, most)
    assert 2 <= len(ids) <= most
    assert (ids[0], ids[-1]) == (101, 102)


def test_a_word_without_known_pieces_is_unknown() -> None:
    """And one of more than 100 letters."""
    pieces = Wordpieces({"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "ab": 3, "##c": 4})
    assert pieces.ids("abc abd " + "a" * 101, 9) == [0, 3, 4, 2, 2, 1]
