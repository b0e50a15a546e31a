"""The language of a text: by its script, or by the small words that each language has of its own.

Made for routing, where a wrong guess is worse than none: whatever is short, mixed, or code has no language.
`benchmarks/languages.py` measures it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import attrs

__all__ = ["LANGUAGES", "UNKNOWN", "PromptLanguage", "detect_language", "primary_language"]

UNKNOWN = ""
"""The language of a text of which nobody could tell."""

_MOST_CHARACTERS = 2000
_LEAST_LETTERS = 4
_WORD = re.compile(r"[^\W\d_]+")
_LEAST_WEIGHT = 1.5
_LEAST_SHARE = 0.12
_LEAD = 1.5

_SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("kana", re.compile(r"[\u3041-\u30ff]")),
    ("hangul", re.compile(r"[\uac00-\ud7a3]")),
    ("han", re.compile(r"[\u4e00-\u9fff]")),
    ("cyrillic", re.compile(r"[\u0400-\u04ff]")),
    ("arabic", re.compile(r"[\u0600-\u06ff]")),
    ("greek", re.compile(r"[\u0370-\u03ff]")),
    ("hebrew", re.compile(r"[\u0590-\u05ff]")),
    ("thai", re.compile(r"[\u0e00-\u0e7f]")),
    ("devanagari", re.compile(r"[\u0900-\u097f]")),
)
_BY_SCRIPT = {
    "hangul": "ko", "han": "zh", "greek": "el", "hebrew": "he", "thai": "th", "cyrillic": "ru", "arabic": "ar",
    "devanagari": "hi",
}  # fmt: skip
_MARKS = {
    "cyrillic": (
        ("[їєґ]", "uk"), ("ў|і.*ы|ы.*і", "be"), ("[ђјљњћџѓќ]", UNKNOWN), ("і", "uk"), ("[ыэё]", "ru"),
        (r"\b(?:се|от|са|да|ще|бъде|има|като|със|във)\b", "bg"), ("ъ.*ъ", "bg"),
        (r"\b(?:что|чтобы|как|или|если|для|кто|где|как\w\w|нужно|этого)\b", "ru"), ("", UNKNOWN),
    ),
    "arabic": (("[ٹڈڑے]", "ur"), ("[پچژگی]", "fa")),
}  # fmt: skip
"""What one of the languages of a script has and the others have not, in the order it is looked for."""

_WORDS: Mapping[str, str] = {
    "en": "i a me my do no so am if tell need want please much many the and of to is are was were that this these "
    "with from have has not for you your it its what which how why who when where will would can could should "
    "does did been by on at as an be they their there than then",
    "de": "der die das und ist nicht ein eine einen einem einer mit für auf von zu dem den des ich du er sie wir ihr "
    "auch wie was wird werden kann nach bei aus oder sich wenn über zum zur hat haben sind keine mir bitte",
    "fr": "le la les des une est et pas que qui dans pour avec sur au aux du ne ce cette ces il elle nous vous je tu "
    "sont être ou où mais plus comme par leur votre mon ma mes quel quelle comment pourquoi été fait",
    "es": "el los las una es y no que en para con por del al se su sus lo como más pero esta este está son ser hay "
    "qué cómo cuál puede desde cuando donde muy también sin sobre fue ha me mi",
    "it": "il lo gli una è e non che di per con del della dei delle nel nella sono come più ma questo questa anche "
    "da al alla si ha cosa perché quando dove può essere suo sua mi ho",
    "pt": "o os uma é e não que em para com por do da dos das no na nos nas se como mais mas este esta isso são ser "
    "você quando onde pode também foi ao à um seu sua há eu meu minha",
    "nl": "de het een en is niet van voor met op aan dat die dit zijn was ik je hij wij ook als maar om bij naar uit "
    "kan wordt worden heeft geen wat hoe waarom er te door over mijn",
    "pl": "i w nie na się jest że do to z jak co dla po od przez czy są był być ale lub tym tego ten ta jego może "
    "przy gdy tylko już o ze ma mi proszę",
    "cs": "a je v na se že to s z do pro jak by ale jsou byl být nebo která který které jako po při od už také může "
    "není tak ve aby jeho soubor",
    "sv": "och att det är en ett som på inte med för av den till har kan om jag du vi ni men eller från när hur vad "
    "var ska blir vid mitt min",
    "da": "og at det er en et som på ikke med for af den til har kan om jeg du vi men eller fra når hvordan hvad var "
    "skal bliver ved min der",
    "no": "og at det er en et som på ikke med for av den til har kan om jeg du vi men eller fra når hvordan hva var "
    "skal blir ved min der",
    "fi": "ja on ei että se hän oli ovat joka mutta kun niin tai kuin myös voi ole tämä sen jos minä sinä mitä miten "
    "mikä missä ovatko kanssa",
    "hu": "a az és nem hogy van egy is de ez meg ha csak vagy mint már el kell volt lehet mi hogyan miért nincs ezt "
    "azt még minden",
    "ro": "și în este nu cu pe să că din pentru sunt care mai ce cum dar sau se fi fost prin acest această unde când "
    "poate",
    "tr": "ve bir bu için ile de da ne olarak değil daha çok gibi var olan ama veya nasıl neden kadar sonra her mı "
    "mi ben sen o",
    "id": "yang dan di ini itu dengan untuk tidak dari pada adalah ke akan dalam oleh atau saya anda bisa ada apa "
    "bagaimana juga sudah tersebut",
    "vi": "là và của không có một cho các được trong với này đã khi những người để từ như tôi bạn thế nào gì",
}
_LETTERS: Mapping[str, str] = {
    "de": "ß", "es": "ñ¿¡", "pt": "ãõ", "pl": "łżźśćńęą", "cs": "řěů", "hu": "őű", "tr": "ğış", "ro": "ățș",
    "da": "øæ", "no": "øæ", "vi": "ơưđạảấầẩậắằặẹẻẽếềểệịỉọỏốồổộớờởợụủứừửựỳỵỷỹ", "fr": "œêûîç",
}  # fmt: skip

LANGUAGES = (*_WORDS, *_BY_SCRIPT.values(), "ja", "uk", "be", "bg", "fa", "ur")
"""The languages that are told apart (ISO 639-1)."""


_SIBLINGS = {"da": "no", "no": "da"}
"""Languages that share most of their small words, so that these tell them from all others, and not from each other."""


def _weights(lists: Mapping[str, list[str]]) -> dict[str, tuple[tuple[str, float], ...]]:
    """By word or letter, the languages that have it: the fewer, the more it says."""
    found: dict[str, list[str]] = {}
    for language, items in lists.items():
        for item in dict.fromkeys(items):
            found.setdefault(item, []).append(language)
    kinds = {item: len(there) - ("da" in there and "no" in there) for item, there in found.items()}
    return {item: tuple((language, 1 / kinds[item]) for language in there) for item, there in found.items()}


_OF_WORD = _weights({language: words.split() for language, words in _WORDS.items()})
_OF_LETTER = _weights({language: list(letters) for language, letters in _LETTERS.items()})


@attrs.frozen
class PromptLanguage:
    """A prompt's language, and who says so.

    Attributes:
        language: ISO 639-1, or `UNKNOWN`.
        method: ``tag`` if the request says it itself, ``text`` if its text does.
    """

    language: str
    method: str = "text"


def primary_language(tag: str) -> str:
    """The language of a tag, without region or script.

    >>> primary_language("de-AT"), primary_language("EN_us")
    ('de', 'en')
    """
    return re.split(r"[-_]", tag.strip().lower(), maxsplit=1)[0]


def detect_language(text: str) -> str:
    """The language of a text (ISO 639-1), or `UNKNOWN`; its first 2,000 characters are read.

    >>> detect_language("Wie backe ich ein Brot, das nicht trocken wird?")
    'de'
    >>> detect_language("Что такое рекурсия? Объясните, пожалуйста, это понятнее.")
    'ru'
    >>> detect_language("x = f(3)")
    ''
    """
    text = text[:_MOST_CHARACTERS]
    if not text.isascii() and (found := _by_script(text)) is not None:
        return found
    return _by_words(text)


def _by_script(text: str) -> str | None:
    """The language of a text that is mostly in a script of its own; None for Latin letters."""
    letters = sum(map(str.isalpha, text))
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS}
    if counts["kana"] >= _LEAST_LETTERS and counts["kana"] + counts["han"] > letters / 3:
        return "ja"
    name = max(counts, key=counts.__getitem__)
    needed = 2 if name in ("han", "hangul") else _LEAST_LETTERS
    if counts[name] < needed or counts[name] <= letters / 3:
        return None
    lower = text.lower()
    told = (language for mark, language in _MARKS.get(name, ()) if re.search(mark, lower, re.DOTALL))
    return next(told, _BY_SCRIPT[name])


def _by_words(text: str) -> str:
    lower = text.lower()
    words = _WORD.findall(lower)
    weights: dict[str, float] = dict.fromkeys(_WORDS, 0.0)
    hits: Counter[str] = Counter()
    for word, number in Counter(words).items():
        for language, weight in _OF_WORD.get(word, ()):
            weights[language] += weight * min(number, 3)
            hits[language] += number
    if not lower.isascii():
        for letter in set(lower):
            for language, weight in _OF_LETTER.get(letter, ()):
                weights[language] += weight
    best = max(weights, key=weights.__getitem__)
    weight = weights[best]
    sibling = _SIBLINGS.get(best, "")
    others = [other for language, other in weights.items() if language not in (best, sibling)]
    is_clear = weight >= max(others) * _LEAD and weights.get(sibling, 0.0) < weight
    is_enough = weight >= _LEAST_WEIGHT and hits[best] >= len(words) * _LEAST_SHARE
    return best if is_clear and is_enough else UNKNOWN
