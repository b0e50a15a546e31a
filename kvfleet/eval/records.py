"""Recorded requests: how one lies in a file, with its content or without, and how it is read again.

A record is a line of JSON. Without content, texts are replaced by filler of the same length, so that token estimates
stay what they were; what a stage would find in a text (personal data, a topic) is gone, and such decisions may differ.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Operation
from kvfleet.errors import TraceError
from kvfleet.trace import names
from kvfleet.trace.rows import pack, unpack
from kvfleet.trace.spans import Trace

__all__ = ["RecordedRequest", "read_records", "without_content"]

_VERSION = 1
_PLAIN = ("model", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "top_n", "dimensions")
_TEXTS = ("messages", "prompt", "suffix", "input", "query", "documents")
_KEPT = frozenset({"role", "type"})
_CONTENT = (names.PROMPT, names.ANSWER)


@attrs.frozen(kw_only=True)
class RecordedRequest:
    """One request that was answered, and how.

    Attributes:
        body: The OpenAI body; without its texts unless `has_content`.
        condition_headers: The headers that the policy's conditions read.
        model: The model that answered; empty if none did.
        trace: The decision's record.
        answer: The answer's text, if content was recorded.
        cost_usd, duration_s, completion_tokens: What it took; None if unknown.
    """

    operation: Operation
    body: Mapping[str, Any] = attrs.field(repr=False)
    trace: Trace = attrs.field(repr=False)
    model_requested: str = "auto"
    allowlist: tuple[str, ...] | None = None
    strategy: str = ""
    tenant: str = ""
    data_class: str = ""
    region: str = ""
    session: str = ""
    tags: Mapping[str, str] = attrs.field(factory=dict)
    condition_headers: Mapping[str, str] = attrs.field(factory=dict)
    seed: int = 0
    has_content: bool = False
    model: str = ""
    answer: str = attrs.field(default="", repr=False)
    cost_usd: float | None = None
    duration_s: float = 0.0
    completion_tokens: int | None = None

    def to_line(self) -> bytes:
        """The record as a line of JSON."""
        plain = attrs.asdict(self, recurse=False, filter=lambda a, _: a.name not in ("trace", "body"))
        body = self.body if self.has_content else without_content(self.body)
        if self.session and not self.has_content:
            plain["session"] = hashlib.blake2b(self.session.encode(errors="replace"), digest_size=8).hexdigest()
        packed = base64.b64encode(pack(self.trace if self.has_content else _bare(self.trace))).decode()
        return orjson.dumps({"v": _VERSION, **plain, "body": body, "trace": packed}) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> RecordedRequest:
        """Read a record again.

        Raises:
            TraceError: if it is none.
        """
        try:
            plain = orjson.loads(line)
            if plain.pop("v") != _VERSION:
                raise TraceError("is of another version of kvfleet")
            allowlist = plain.pop("allowlist", None)
            return cls(
                **{
                    **plain,
                    "operation": Operation(plain["operation"]),
                    "trace": unpack(base64.b64decode(plain["trace"])),
                    "allowlist": None if allowlist is None else tuple(allowlist),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error, zlib.error) as error:
            raise TraceError("is no recorded request") from error


def read_records(path: Path, limit: int | None = None) -> Iterator[RecordedRequest]:
    """The records of a file, the oldest first; the file that was full before it comes first.

    Raises:
        TraceError: naming the line, if one is no record.
        OSError: if the file cannot be read.
    """
    number = 0
    for part in (older(path), path):
        if part != path and not part.exists():
            continue
        with part.open("rb") as lines:
            for at, line in enumerate(lines, 1):
                if limit is not None and number >= limit:
                    return
                if not line.strip():
                    continue
                try:
                    yield RecordedRequest.from_line(line)
                except TraceError as error:
                    raise TraceError(f"{part}:{at}: {error}; `observe.record` writes such files") from error
                number += 1


def older(path: Path) -> Path:
    """Where a full file is put."""
    return path.with_name(path.name + ".1")


def without_content(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body of the same shape and size that says nothing.

    >>> without_content({"messages": [{"role": "user", "content": "Hello"}], "user": "ada"})
    {'messages': [{'role': 'user', 'content': 'xxxxx'}]}
    """
    kept: dict[str, Any] = {key: value for key in _PLAIN if isinstance(value := body.get(key), str | int | float)}
    kept |= {key: _filled(body[key]) for key in _TEXTS if key in body}
    if isinstance(tools := body.get("tools"), list):
        kept["tools"] = [{"type": "function", "function": {"name": f"tool_{i}"}} for i in range(len(tools))]
    if isinstance(form := body.get("response_format"), Mapping):
        kept["response_format"] = {"type": str(form.get("type", ""))}
    return kept


def _filled(value: Any, key: str = "") -> Any:
    if isinstance(value, str):
        return value if key in _KEPT else "x" * len(value.encode(errors="replace"))
    if isinstance(value, Mapping):
        return {str(name): _filled(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(item, key) for item in value]
    return value


def _bare(trace: Trace) -> Trace:
    """A trace without content, should it have been captured."""
    route = trace.route
    if not any(name in route.attributes for name in _CONTENT):
        return trace
    kept = {name: value for name, value in route.attributes.items() if name not in _CONTENT}
    return attrs.evolve(trace, spans=[attrs.evolve(route, attributes=kept), *trace.stages])
