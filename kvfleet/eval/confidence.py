"""How far an answer can be trusted, from the answer alone: its tokens' probabilities, and what it says of itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.base import ChatResponse

__all__ = ["REFUSALS", "Signs", "confidence_of", "logprobs_of", "percentile_probability", "typical_probability"]

_BEGINNING = 400
"""Characters of an answer in which it is looked for a refusal: further on, the words mostly belong to the answer."""

REFUSALS = (
    r"i (?:really |honestly )?(?:don't|do not) know\b",
    r"i(?:'m| am) (?:not sure|unsure|not certain|not able|unable)\b",
    r"i(?:'m| am) sorry,? (?:but )?i (?:can't|cannot|can not|don't|do not)\b",
    r"i (?:can't|cannot|can not|won't|will not) (?:help|assist|answer|provide|do that|comply|fulfil)",
    r"(?:don't|do not) have (?:enough|sufficient|any) (?:information|context|data|knowledge)",
    r"as an ai(?: language)? model,? i (?:can't|cannot|can not|don't|do not|am not|am unable)",
    r"\b(?:unable|not able) to (?:help|assist|answer|provide|determine)",
)
"""Ways in which an answer says that it is none; English."""


def logprobs_of(choice: Mapping[str, Any]) -> Iterator[float]:
    """The logarithms of the tokens' probabilities in one choice, or chunk of one, of a chat or a text completion.

    >>> list(logprobs_of({"logprobs": {"content": [{"token": "Hi", "logprob": -0.5}]}}))
    [-0.5]
    """
    found = choice.get("logprobs")
    if not isinstance(found, Mapping):
        return
    for name in ("content", "refusal"):
        for token in found.get(name) or ():
            if isinstance(token, Mapping) and _is_logprob(token.get("logprob")):
                yield float(token["logprob"])
    for value in found.get("token_logprobs") or ():
        if _is_logprob(value):
            yield float(value)


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value <= 0


def typical_probability(logprobs: Sequence[float]) -> float:
    """The geometric mean of the tokens' probabilities, 0..1, which does not depend on the answer's length.

    >>> round(typical_probability([math.log(0.9), math.log(0.4)]), 3)
    0.6
    """
    return math.exp(sum(logprobs) / len(logprobs))


def percentile_probability(logprobs: Sequence[float], percent: float) -> float:
    """The probability that so many percent of the tokens do not exceed: how sure the least sure of them were.

    A few bad tokens are lost in a mean; quantiles tell better when to ask a larger model (Gupta et al. 2024, "Language
    Model Cascades: Token-level uncertainty and beyond").

    >>> round(percentile_probability([math.log(p / 10) for p in range(1, 11)], 20), 3)
    0.2
    """
    place = max(math.ceil(len(logprobs) * percent / 100) - 1, 0)
    return math.exp(sorted(logprobs)[place])


@attrs.frozen
class Signs:
    """What an answer gives away about itself: that it is empty, cut off, or says that it has no answer.

    Args:
        refusals: Patterns of answers that are none; any case.
        cut_off, refused: The confidence in answers of these kinds.

    >>> Signs().grade("I don't know the answer.", None)
    (0.1, 'it says that it has no answer')
    >>> Signs().grade("Paris.", "stop")
    (1.0, 'nothing speaks against it')
    """

    refusals: tuple[str, ...] = REFUSALS
    cut_off: float = 0.3
    refused: float = 0.1
    _pattern: re.Pattern[str] = attrs.field(init=False, repr=False, eq=False)

    @_pattern.default
    def _compile(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{one})" for one in self.refusals) or r"(?!)", re.IGNORECASE)

    def grade(
        self, text: str, finish_reason: str | None, *, calls_tool: bool = False, is_whole: bool = True
    ) -> tuple[float, str]:
        """The confidence, 0..1, and why.

        Args:
            text: What was said, or its beginning.
            finish_reason: Why it ended, as OpenAI has it.
            calls_tool: True if the answer is a call of a tool, which needs no text.
            is_whole: False for a beginning.
        """
        if finish_reason == "content_filter":
            return self.refused, "it was refused for its content"
        if is_whole and not calls_tool and not text.strip():
            return 0.0, "it is empty"
        if self._pattern.search(text[:_BEGINNING].replace("’", "'")):  # noqa: RUF001 - a typographic apostrophe
            return self.refused, "it says that it has no answer"
        if finish_reason == "length":
            return self.cut_off, "it was cut off at its longest length"
        return 1.0, "nothing speaks against it" if is_whole else "nothing speaks against its beginning"


def confidence_of(response: ChatResponse) -> float:
    """The lesser of what an answer gives away about itself and, if its engine told them, its tokens' probabilities."""
    value, _ = Signs().grade(response.content, response.finish_reason, calls_tool=bool(response.tool_calls))
    choices = response.raw.get("choices") or [{}]
    logprobs = list(logprobs_of(choices[0]))
    return min(value, typical_probability(logprobs)) if logprobs else value
