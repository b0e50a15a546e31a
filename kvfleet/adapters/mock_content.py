"""What a mock engine says: fixed words, instances of JSON schemas, vectors and overlaps. Nothing of a prompt is echoed.

Everything here is a pure function of its arguments, so the same request has the same answer, in every process.
"""

from __future__ import annotations

import array
import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson
import xxhash

__all__ = [
    "embed",
    "filler",
    "instance_of",
    "overlap",
    "pack_floats",
    "pieces",
    "render_chat",
    "sentence",
    "text_of",
]

_WORD = re.compile(r"\S+\s*|\s+")
_MAX_SCHEMA_DEPTH = 8
_FILLER = tuple(
    f"{word} "
    for word in (
        *(
            "and",
            "ant",
            "arc",
            "ask",
            "bay",
            "bee",
            "big",
            "bit",
            "bow",
            "box",
            "can",
            "cup",
            "day",
            "dew",
            "dot",
            "ear",
        ),
        *(
            "elm",
            "end",
            "far",
            "few",
            "fig",
            "fly",
            "fog",
            "for",
            "fox",
            "gem",
            "get",
            "hay",
            "her",
            "hop",
            "ice",
            "ink",
        ),
        *(
            "ivy",
            "jar",
            "joy",
            "key",
            "lap",
            "law",
            "map",
            "mix",
            "new",
            "nut",
            "oak",
            "oar",
            "old",
            "one",
            "owl",
            "pea",
        ),
        *(
            "pen",
            "ray",
            "red",
            "row",
            "run",
            "sea",
            "sky",
            "sun",
            "tea",
            "two",
            "use",
            "way",
            "web",
            "wet",
            "yes",
            "zoo",
        ),
    )
)


def sentence(model: str) -> str:
    """The answer of a mock engine, which says what it is.

    >>> sentence("demo-8b")[:54]
    'This is demo-8b, a mock engine of kvfleet speaking. No'
    """
    return (
        f"This is {model}, a mock engine of kvfleet speaking. No language model runs here, so the words never change;"
        " the queue, the prefix cache and the time to each token behave like an engine's."
        " Put a real engine's endpoint and provider into the fleet file, and the same route leads there."
    )


def filler(seed: str, tokens: int) -> str:
    """Words without a meaning, of four bytes each with their space, so that each is a token however one counts.

    >>> filler("a question", 3) == filler("a question", 5)[:12] != filler("another", 3)
    True
    """
    state = xxhash.xxh3_64_intdigest(seed.encode("utf-8", "surrogatepass"))
    words = []
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF  # Knuth's MMIX generator
        words.append(_FILLER[state >> 58])
    return "".join(words)


def pieces(text: str) -> list[str]:
    """A text as the tokens a mock engine streams: one for each word.

    >>> pieces("No model here.")
    ['No ', 'model ', 'here.']
    """
    return _WORD.findall(text)


def text_of(content: Any) -> str:
    """A message's content as one text; parts that are not text stand in by their JSON, for they fill the cache too."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    parts = []
    for part in content:
        is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        parts.append(part["text"] if is_text else orjson.dumps(part, default=str).decode())
    return "\n".join(parts)


def render_chat(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> bytes:
    r"""A conversation as the text an engine reads; a longer conversation begins with the text of a shorter one.

    >>> render_chat([{"role": "user", "content": "Hi"}])
    b'<|user|>\nHi<|end|>\n<|assistant|>\n'
    """
    out = []
    if tools:
        out.append(f"<|tools|>\n{orjson.dumps(tools, default=str).decode()}<|end|>\n")
    for message in messages:
        calls = message.get("tool_calls")
        said = text_of(message.get("content")) + (orjson.dumps(calls, default=str).decode() if calls else "")
        out.append(f"<|{message.get('role', 'user')}|>\n{said}<|end|>\n")
    out.append("<|assistant|>\n")
    return "".join(out).encode("utf-8", "surrogatepass")


def instance_of(schema: Any, *, text: str = "mock") -> Any:
    """The plainest value a JSON schema allows: every required property, the first of each choice.

    >>> instance_of({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    {'n': 0}
    """
    return _instance(schema, text, schema, 0)


def _instance(schema: Any, text: str, root: Any, depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > _MAX_SCHEMA_DEPTH:
        return text
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    inner = _resolve(str(schema["$ref"]), root) if "$ref" in schema else None
    for key in ("anyOf", "oneOf", "allOf"):
        inner = inner or (schema[key][0] if schema.get(key) else None)
    if inner is not None:
        return _instance(inner, text, root, depth + 1)
    return _typed(schema, text, root, depth)


def _typed(schema: Mapping[str, Any], text: str, root: Any, depth: int) -> Any:
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object" or (kind is None and "properties" in schema):
        properties = schema.get("properties") or {}
        wanted = schema.get("required", properties)
        return {name: _instance(properties.get(name, {}), text, root, depth + 1) for name in wanted}
    if kind == "array":
        fewest = max(1, int(schema.get("minItems", 1)))
        return [_instance(schema.get("items", {}), text, root, depth + 1) for _ in range(fewest)]
    return _scalar(kind, schema, text)


def _scalar(kind: Any, schema: Mapping[str, Any], text: str) -> Any:
    if kind in ("integer", "number"):
        return schema.get("minimum", 0)
    if kind == "boolean":
        return True
    if kind == "null":
        return None
    longest = schema.get("maxLength")
    return text if longest is None else text[: int(longest)]


def _resolve(reference: str, root: Any) -> Any:
    found = root
    for step in reference.lstrip("#/").split("/"):
        found = found.get(step, {}) if isinstance(found, Mapping) else {}
    return found


def _words(text: str) -> Iterator[str]:
    return (word.lower() for word in re.findall(r"\w+", text))


def embed(text: str, dimensions: int) -> list[float]:
    """A unit vector for a text: texts that share words point in similar directions (feature hashing of the words).

    >>> vector = embed("a red apple", 8)
    >>> round(sum(x * x for x in vector), 6)
    1.0
    """
    vector = [0.0] * dimensions
    for word in _words(text):
        digest = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        for shift in (0, 16, 32, 48):
            bits = (digest >> shift) & 0xFFFF
            vector[(bits >> 1) % dimensions] += 1.0 if bits & 1 else -1.0
    length = math.sqrt(sum(x * x for x in vector))
    if not length:  # no words, or words that cancel out
        vector[0] = length = 1.0
    return [x / length for x in vector]


def pack_floats(vector: Sequence[float]) -> str:
    """A vector as OpenAI's ``encoding_format: base64`` has it: little-endian 32-bit floats.

    >>> pack_floats([1.0])
    'AACAPw=='
    """
    packed = array.array("f", vector)
    if packed.itemsize != 4 or array.array("H", [1]).tobytes() != b"\x01\x00":  # pragma: no cover - big-endian machines
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()


def overlap(query: str, document: str) -> float:
    """Share of the query's words that a document has, 0..1.

    >>> overlap("red apple", "An apple a day")
    0.5
    """
    wanted = set(_words(query))
    return len(wanted & set(_words(document))) / len(wanted) if wanted else 0.0
