"""What a client says of an answer it got: ``POST /v1/feedback``."""

from __future__ import annotations

from typing import Any

import attrs
import orjson

from kvfleet.errors import BadRequestError

__all__ = ["Feedback", "read_feedback"]

_KEYS = ("request_id", "trace_id", "score", "comment")


@attrs.frozen
class Feedback:
    """The identifier of a request or of its trace, and how good its answer was, 0..1."""

    identifier: str
    score: float


def read_feedback(raw: bytes) -> Feedback:
    """Read the body ``{"request_id": "...", "score": 0.9}``; ``trace_id`` may stand instead.

    A ``comment`` is accepted and not kept.

    Raises:
        BadRequestError: if it is anything else.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequestError("the body is not JSON") from error
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    unknown = next((key for key in body if key not in _KEYS), None)
    if unknown is not None:
        raise BadRequestError(f"unknown field {unknown[:64]!r}; known: {', '.join(_KEYS)}", param=unknown[:64])
    return Feedback(_identifier(body), _score(body.get("score")))


def _identifier(body: dict[str, Any]) -> str:
    given = [body[key] for key in ("request_id", "trace_id") if key in body]
    if len(given) != 1 or not isinstance(given[0], str) or not given[0]:
        raise BadRequestError("give either `request_id` or `trace_id`, as a text", param="request_id")
    return str(given[0])


def _score(score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise BadRequestError("`score` must be a number from 0 to 1", param="score")
    return float(score)
