"""The condition language of policy rules: small, closed, parsed once.

::

    data_class == confidential and not tenant in [research, legal]
    has_pii or "ssn" in pii_types
    data_class >= confidential and tokens > 8000
    tags.domain == medical and headers.x-purpose != 'test'

Names: ``data_class`` (ordered from public to restricted), ``has_pii``, ``pii_types``, ``tenant``, ``region``,
``tokens``, ``domain``, ``route``, ``tags.NAME``, ``headers.NAME``, and ``always``. Words may stand without quotes.
There is no arithmetic, no call, no attribute: a condition can read the request and nothing else.
"""

from __future__ import annotations

import difflib
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.config.findings import did_you_mean
from kvfleet.config.schema import DATA_CLASSES
from kvfleet.errors import KVFleetError
from kvfleet.policy.pii import PII_PATTERNS
from kvfleet.router.semantic import DOMAINS

__all__ = ["Condition", "ConditionError", "PolicyContext", "parse"]

_MOST_CHARACTERS = 2000
_MOST_DEPTH = 32


@attrs.frozen(kw_only=True)
class PolicyContext:
    """What conditions may know of a request.

    Attributes:
        data_class, tenant_id, source_region, tags: The request's own.
        has_pii, pii_types: What the PII classifier found.
        tokens: About how long the prompt is.
        domain, route: What it is about, and which of the operator's routes it is on; ``none`` for no route.
        headers: Those request headers that conditions may read, lower-case.
    """

    data_class: str = "internal"
    tenant_id: str = ""
    source_region: str = ""
    tags: Mapping[str, str] = attrs.field(factory=dict)
    has_pii: bool = False
    pii_types: Sequence[str] = ()
    tokens: int = 0
    domain: str = ""
    route: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict)


class ConditionError(KVFleetError, ValueError):
    """A condition that cannot be read; `column` counts from 1 within its text."""

    def __init__(self, message: str, column: int) -> None:
        super().__init__(f"{message} (column {column})")
        self.column = column


Test = Callable[[PolicyContext], bool]


@attrs.frozen
class Condition:
    """A parsed condition: call it with a `PolicyContext`.

    Attributes:
        text: As written.
        names: The names it reads, so that the build knows which facts it needs.
    """

    text: str
    names: frozenset[str]
    _test: Test = attrs.field(repr=False, eq=False)

    def __call__(self, context: PolicyContext) -> bool:
        """True if it holds for the request."""
        return self._test(context)


@attrs.frozen
class _Name:
    """A name of the language: its type, and how it is read."""

    type: str
    read: Callable[[PolicyContext], Any]


_RANK = {name: rank for rank, name in enumerate(DATA_CLASSES)}
_NAMES = {
    "data_class": _Name("class", operator.attrgetter("data_class")),
    "has_pii": _Name("bool", operator.attrgetter("has_pii")),
    "pii_types": _Name("set", operator.attrgetter("pii_types")),
    "tenant": _Name("text", operator.attrgetter("tenant_id")),
    "tenant_id": _Name("text", operator.attrgetter("tenant_id")),
    "region": _Name("text", operator.attrgetter("source_region")),
    "source_region": _Name("text", operator.attrgetter("source_region")),
    "tokens": _Name("number", operator.attrgetter("tokens")),
    "domain": _Name("domain", operator.attrgetter("domain")),
    "route": _Name("text", operator.attrgetter("route")),
    "always": _Name("bool", lambda _: True),
}
_SHOWN = [*_NAMES, "tags.NAME", "headers.NAME"]

_TOKEN = re.compile(
    r"""\s*(?:(?P<op>==|!=|<=|>=|<|>|\(|\)|\[|\]|,)
    |"(?P<dq>[^"]*)"|'(?P<sq>[^']*)'
    |(?P<num>-?\d+(?:\.\d+)?(?![\w.-]))
    |(?P<word>[A-Za-z_][\w.:/-]*))""",
    re.VERBOSE,
)


@attrs.frozen
class _Token:
    kind: str
    value: Any
    column: int


def parse(text: str) -> Condition:
    """Read a condition.

    >>> parse("data_class == confidential")(PolicyContext(data_class="confidential"))
    True

    Raises:
        ConditionError: saying what is wrong, where, and what could stand there.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ConditionError(f"the condition is longer than {_MOST_CHARACTERS} characters", _MOST_CHARACTERS)
    parser = _Parser(_tokens(text), len(text) + 1)
    test = parser.either(0)
    parser.end()
    return Condition(text, frozenset(parser.names), test)


def _tokens(text: str) -> list[_Token]:
    found = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            column = at + len(text[at:]) - len(text[at:].lstrip()) + 1
            raise ConditionError(f"unexpected {text[column - 1]!r}", column)
        kind = str(match.lastgroup)
        value: Any = match[kind]
        if kind == "num":
            value = float(value)
        found.append(_Token("text" if kind in ("dq", "sq") else kind, value, match.start(kind) + 1))
        at = match.end()
    return found


@attrs.define
class _Parser:
    """Recursive descent: either < both < negation < comparison."""

    tokens: list[_Token]
    last_column: int
    at: int = 0
    names: set[str] = attrs.field(factory=set)

    def peek(self, *words: str) -> bool:
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        return token is not None and token.kind in ("op", "word") and str(token.value).lower() in words

    def take(self, what: str) -> _Token:
        if self.at >= len(self.tokens):
            raise ConditionError(f"the condition ends where {what} should stand", self.last_column)
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, word: str) -> None:
        if not self.peek(word):
            column = self.tokens[self.at].column if self.at < len(self.tokens) else self.last_column
            raise ConditionError(f"{word!r} should stand here", column)
        self.at += 1

    def end(self) -> None:
        if self.at < len(self.tokens):
            token = self.tokens[self.at]
            raise ConditionError(f"unexpected {token.value!r}; join conditions with and / or", token.column)

    def either(self, depth: int) -> Test:
        tests = [self.both(depth)]
        while self.peek("or"):
            self.at += 1
            tests.append(self.both(depth))
        return functools.reduce(_or, tests)

    def both(self, depth: int) -> Test:
        tests = [self.negation(depth)]
        while self.peek("and"):
            self.at += 1
            tests.append(self.negation(depth))
        return functools.reduce(_and, tests)

    def negation(self, depth: int) -> Test:
        if depth > _MOST_DEPTH:
            raise ConditionError(
                f"the condition is nested more than {_MOST_DEPTH} deep", self.tokens[self.at - 1].column
            )
        if self.peek("not"):
            self.at += 1
            return _not(self.negation(depth + 1))
        if self.peek("("):
            self.at += 1
            test = self.either(depth + 1)
            self.expect(")")
            return test
        return self.comparison()

    def comparison(self) -> Test:
        first = self.take("a name")
        if self.peek("in"):
            self.at += 1
            if self.peek("["):
                name = self.name(first)
                return _one_of(name, self.values(name, first))
            return self.member(first)
        if self.peek("not"):
            self.at += 1
            self.expect("in")
            if not self.peek("["):
                return _not(self.member(first))
            name = self.name(first)
            return _not(_one_of(name, self.values(name, first)))
        name = self.name(first)
        if not self.peek("==", "!=", "<", "<=", ">", ">="):
            if name.type != "bool":
                raise ConditionError(f"{first.value} must be compared with something", first.column)
            return lambda c: bool(name.read(c))
        sign = str(self.take("a comparison").value)
        return _compare(name, sign, self.value(name, self.take("a value"), sign), first)

    def member(self, first: _Token) -> Test:
        """``'ssn' in pii_types``."""
        place = self.take("a name")
        name = self.name(place)
        if name.type != "set":
            raise ConditionError(f"{place.value} is not a list; write {place.value} in [a, b]", place.column)
        read, wanted = name.read, _pii_type(first)
        return lambda c: wanted in read(c)

    def name(self, token: _Token) -> _Name:
        word = str(token.value)
        if token.kind != "word":
            raise ConditionError(
                f"{word!r} is a value; a name should stand here, as in data_class == public", token.column
            )
        table, _, key = word.partition(".")
        if table in ("tags", "headers") and key:
            self.names.add(table)
            return _entry(table, key)
        found = _NAMES.get(word)
        if found is None:
            raise ConditionError(f"unknown name {word!r}; {did_you_mean(word, _SHOWN)}", token.column)
        self.names.add(word)
        return found

    def values(self, name: _Name, first: _Token) -> frozenset[Any]:
        self.expect("[")
        found = [self.value(name, self.take("a value"), "==")]
        while self.peek(","):
            self.at += 1
            found.append(self.value(name, self.take("a value"), "=="))
        self.expect("]")
        if name.type == "bool":
            raise ConditionError(f"{first.value} is true or false; a list makes no sense", first.column)
        return frozenset(found)

    def value(self, name: _Name, token: _Token, sign: str) -> Any:
        """A literal, checked against the name's type: a rule that can never match is an error."""
        word = token.value
        if token.kind == "op":
            raise ConditionError(f"unexpected {word!r}; a value should stand here", token.column)
        if name.type == "bool":
            if str(word).lower() not in ("true", "false") or sign not in ("==", "!="):
                raise ConditionError("it can only be == or != true or false", token.column)
            return str(word).lower() == "true"
        if name.type == "number":
            return _tokens_limit(token, sign)
        if name.type == "class":
            return _data_class(token, sign)
        if name.type == "set":
            return _pii_type(token)
        if name.type == "domain":
            return _domain(token, sign)
        if sign not in ("==", "!="):
            raise ConditionError("texts have no order; only data_class and tokens do", token.column)
        return f"{word:g}" if token.kind == "num" else str(word)


def _entry(table: str, key: str) -> _Name:
    """``tags.NAME`` or ``headers.NAME``; header names are compared in lower case, an absent entry is empty."""
    if table == "tags":
        return _Name("text", lambda c: c.tags.get(key, ""))
    lower = key.lower()
    return _Name("text", lambda c: c.headers.get(lower, ""))


def _one_of(name: _Name, values: frozenset[Any]) -> Test:
    read = name.read
    if name.type == "set":
        return lambda c: not values.isdisjoint(read(c))
    return lambda c: read(c) in values


def _and(first: Test, second: Test) -> Test:
    return lambda c: first(c) and second(c)


def _or(first: Test, second: Test) -> Test:
    return lambda c: first(c) or second(c)


def _not(test: Test) -> Test:
    return lambda c: not test(c)


def _tokens_limit(token: _Token, sign: str) -> float:
    """A number of tokens; one that no prompt can have is a mistake."""
    if token.kind != "num":
        raise ConditionError(f"{token.value!r} is not a number", token.column)
    limit: float = token.value
    is_possible = {"<": limit > 0, "<=": limit >= 0, "==": limit >= 0 and limit.is_integer()}.get(sign, True)
    if not is_possible:
        raise ConditionError(f"tokens can never be {sign} {limit:g}", token.column)
    return limit


def _data_class(token: _Token, sign: str) -> str:
    """A data class; nothing is below the first, and nothing above the last."""
    word = str(token.value).lower()
    if word not in _RANK:
        raise ConditionError(f"{token.value!r} is no data class; {did_you_mean(word, _RANK)}", token.column)
    if (sign, word) in (("<", DATA_CLASSES[0]), (">", DATA_CLASSES[-1])):
        raise ConditionError(f"data_class can never be {sign} {word}", token.column)
    return word


def _domain(token: _Token, sign: str) -> str:
    """A domain of the classifier; one it does not know can never be."""
    word = str(token.value)
    if sign not in ("==", "!="):
        raise ConditionError("domains have no order", token.column)
    if word not in DOMAINS:
        raise ConditionError(f"there is no domain {word!r}; {did_you_mean(word, DOMAINS)}", token.column)
    return word


def _pii_type(token: _Token) -> str:
    """A type of personal data. A plugin's classifier may find others than ours, so only near misses are mistakes."""
    word = str(token.value)
    near = difflib.get_close_matches(word, PII_PATTERNS, n=1, cutoff=0.75)
    if near and word not in PII_PATTERNS:
        raise ConditionError(f"{word!r} is no type of personal data; did you mean {near[0]}?", token.column)
    return word


def _compare(name: _Name, sign: str, value: Any, first: _Token) -> Test:
    read = name.read
    if name.type == "set":
        if sign not in ("==", "!="):
            raise ConditionError(f"{first.value} has no order", first.column)
        return (lambda c: value in read(c)) if sign == "==" else (lambda c: value not in read(c))
    if name.type == "class" and sign not in ("==", "!="):
        return _above(read, sign, _RANK[value])
    compare = _SIGNS[sign]
    return lambda c: compare(read(c), value)


def _above(read: Callable[[PolicyContext], Any], sign: str, limit: int) -> Test:
    """An order of data classes. One that does not exist counts as the most sensitive: mistakes fail closed."""
    compare, last = _SIGNS[sign], len(_RANK)
    return lambda c: compare(_RANK.get(read(c), last), limit)


_SIGNS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
