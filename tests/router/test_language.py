"""Telling the language of a text, and saying so only where it can be told."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.router.language import LANGUAGES, UNKNOWN, detect_language, primary_language


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "What is the capital of France, and why is it not Lyon?"),
        ("de", "Wie backe ich ein Brot, das nicht trocken wird?"),
        ("fr", "Quelle est la capitale de la France, et pourquoi ?"),
        ("es", "¿Cuál es la capital de Francia y por qué no es Lyon?"),
        ("it", "Qual è la capitale della Francia e perché non è Lione?"),
        ("pt", "Você pode me dizer qual é a capital da França e por que não é Lyon?"),
        ("nl", "Wat is de hoofdstad van Frankrijk en waarom is het niet Lyon?"),
        ("pl", "Czy to jest stolica Francji, i dlaczego nie jest nią Lyon?"),
        ("sv", "Vad är huvudstaden i Frankrike, och varför är det inte Lyon?"),
        ("ru", "Что такое рекурсия, и когда она нужна?"),
        ("uk", "Що таке рекурсія і коли вона потрібна?"),
        ("ja", "フランスの首都はどこですか"),
        ("zh", "法国的首都是哪里?"),
        ("ko", "프랑스의 수도는 어디입니까?"),
        ("ar", "ما هي عاصمة فرنسا؟"),
        ("fa", "پایتخت فرانسه کجاست؟"),
        ("el", "Ποια είναι η πρωτεύουσα της Γαλλίας;"),
        ("he", "מהי בירת צרפת?"),
        ("th", "เมืองหลวงของฝรั่งเศสคืออะไร"),
        ("hi", "फ्रांस की राजधानी क्या है?"),
    ],
)
def test_a_sentence_has_its_language(language: str, text: str) -> None:
    """By script, or by small words; with others in capitals, the same."""
    assert detect_language(text) == language
    assert detect_language(text.upper()) == language


@pytest.mark.parametrize("text", ["", "hola", "x = f(3)", "git push --force", "12345 %$", "Paris Lyon Nice", "🙂" * 40])
def test_nobody_can_tell_of_what_is_short_or_code(text: str) -> None:
    """No guess is better than a wrong one."""
    assert detect_language(text) == UNKNOWN


def test_a_few_foreign_words_do_not_change_it() -> None:
    """A question about a foreign phrase is in its own language."""
    assert detect_language("How would you translate “Was ist das?” and “Qu'est-ce que c'est ?” into English?") == "en"
    assert detect_language("What does the Japanese word 木漏れ日 mean, and when would one use it?") == "en"


@given(st.text(max_size=300))
def test_any_text_has_a_known_language_or_none(text: str) -> None:
    """Whatever it holds."""
    assert detect_language(text) in {UNKNOWN, *LANGUAGES}


def test_a_long_text_is_not_read_to_its_end() -> None:
    """Of 64 KB of anything no more than of 2,000 characters."""
    begun = time.process_time()
    for text in ("ж" * 65_536, "a " * 32_768, "日本" * 32_768):
        detect_language(text)
    assert time.process_time() - begun < 0.1


@pytest.mark.parametrize(("tag", "language"), [("de", "de"), ("de-AT", "de"), (" EN_us ", "en"), ("zh-Hant-TW", "zh")])
def test_a_tag_has_a_language(tag: str, language: str) -> None:
    """Without region and script."""
    assert primary_language(tag) == language
