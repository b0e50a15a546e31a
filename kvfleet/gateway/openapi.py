"""The gateway's own page for programs, ``GET /openapi.json``: its routes, and of bodies what the gateway itself checks.

It is made of the table of routes. What a body may hold beyond that is the engine's to judge, so nothing is forbidden
here that the gateway lets through. The format is OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import attrs

from kvfleet.gateway.table import Access, Route
from kvfleet.gateway.wire import LONGEST_NAME, MOST_MESSAGES

__all__ = ["openapi"]

Schema = Mapping[str, Any]

_ANY_OBJECT: Schema = {"type": "object"}
_OBJECTS: Schema = {"type": "array", "items": _ANY_OBJECT}
_MODEL: Schema = {
    "type": ["string", "null"],
    "minLength": 1,
    "maxLength": LONGEST_NAME,
    "description": "`auto`, an alias, or a model of the fleet.",
}
_STREAM: Schema = {"type": ["boolean", "null"]}
_TOKENS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
_TEXTS: Schema = {"type": "array", "minItems": 1, "items": {"type": "string"}}
_TEXT_OR_LIST: Schema = {"anyOf": [{"type": "string"}, _TEXTS, _TOKENS]}
_USUAL: Mapping[str, Schema] = {"model": _MODEL, "stream": _STREAM}


def _body(required: Iterable[str] = (), **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**_USUAL, **properties}}


def _messages(roles: Schema, parts: Schema, *, may_be_null: bool) -> Schema:
    kinds: list[Schema] = [{"type": "string"}, {"type": "array", "items": parts}]
    content = {"anyOf": [*kinds, {"type": "null"}] if may_be_null else kinds}
    needed = ["role"] if may_be_null else ["role", "content"]
    message = {"type": "object", "required": needed, "properties": {"role": roles, "content": content}}
    return {"type": "array", "minItems": 1, "maxItems": MOST_MESSAGES, "items": message}


_TEXT_BLOCK: Schema = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_INPUT_TEXT: Schema = {**_TEXT_BLOCK, "properties": {"type": {"const": "input_text"}, "text": {"type": "string"}}}
_COUNT: Schema = {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31 - 1}
_TOOLS: Schema = {"anyOf": [_OBJECTS, {"type": "null"}]}
_INPUTS = _messages({"enum": ["user", "system", "developer", "assistant"]}, _INPUT_TEXT, may_be_null=False)

SCHEMAS: Mapping[str, Schema] = {
    "Chat": _body(["messages"], messages=_messages({"type": "string"}, _ANY_OBJECT, may_be_null=True), tools=_TOOLS),
    "Completion": _body(["prompt"], prompt=_TEXT_OR_LIST),
    "Embedding": {"type": "object", "required": ["input"], "properties": {"model": _MODEL, "input": _TEXT_OR_LIST}},
    "Rerank": {
        "type": "object",
        "required": ["query", "documents"],
        "properties": {
            "model": _MODEL,
            "query": {"type": "string"},
            "documents": {"type": "array", "minItems": 1, "items": {"type": ["string", "object"]}},
        },
    },
    "Message": _body(
        ["messages"],
        messages=_messages({"enum": ["user", "assistant", "system"]}, _TEXT_BLOCK, may_be_null=False),
        max_tokens=_COUNT,
        system={"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_BLOCK}, {"type": "null"}]},
    ),
    "Response": _body(
        ["input"],
        input={"anyOf": [{"type": "string"}, _INPUTS]},
        instructions={"type": ["string", "null"]},
        store={"enum": [False, None], "description": "The gateway keeps no conversation."},
        previous_response_id={"type": "null"},
        conversation={"type": "null"},
    ),
    "Feedback": {
        "type": "object",
        "required": ["request_id", "score"],
        "properties": {
            "request_id": {"type": "string", "minLength": 1},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "comment": {},
        },
        "additionalProperties": False,
    },
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": ["string", "null"]},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                    "kvfleet": _ANY_OBJECT,
                },
            }
        },
    },
    "MessageError": {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
            "request_id": {"type": ["string", "null"]},
        },
    },
}

JSON, EVENTS, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"


@attrs.frozen
class _Page:
    """What is said of one route.

    Attributes:
        summary: What it does.
        body: The name of its body's schema; empty for none.
        types: Media types of its answers.
        error: The name of its errors' schema.
    """

    summary: str
    body: str = ""
    types: tuple[str, ...] = (JSON,)
    error: str = "Error"


_WHOLE_OR_STREAMED = (JSON, EVENTS)
_EXPLAINED = "Decide as for such a body, call nobody, and explain the decision."
_PAGES: Mapping[str, _Page] = {
    "/v1/chat/completions": _Page("Chat.", "Chat", _WHOLE_OR_STREAMED),
    "/v1/completions": _Page("Complete a text.", "Completion", _WHOLE_OR_STREAMED),
    "/v1/embeddings": _Page("Embed texts.", "Embedding"),
    "/v1/rerank": _Page("Rank documents by a query.", "Rerank"),
    "/v2/rerank": _Page("Rank documents by a query.", "Rerank"),
    "/rerank": _Page("Rank documents by a query.", "Rerank"),
    "/v1/messages": _Page("Chat, in the words of Anthropic's API.", "Message", _WHOLE_OR_STREAMED, "MessageError"),
    "/v1/messages/count_tokens": _Page("How long a prompt is.", "Message", error="MessageError"),
    "/v1/responses": _Page("Chat, in the words of OpenAI's Responses API.", "Response", _WHOLE_OR_STREAMED),
    "/v1/route/explain": _Page(_EXPLAINED, "Chat"),
    "/v1/route/explain/messages": _Page(_EXPLAINED, "Message"),
    "/v1/route/explain/responses": _Page(_EXPLAINED, "Response"),
    "/v1/feedback": _Page("Say how good an answer was.", "Feedback"),
    "/v1/models": _Page("What may be asked for."),
    "/v1/models/{id}": _Page("One of them."),
    "/v1/tenants": _Page("The month's statement of each budget."),
    "/health": _Page("The fleet, as the gateway knows it."),
    "/metrics": _Page("Metrics for Prometheus.", types=(TEXT, "application/openmetrics-text")),
    "/-/reload": _Page("Read the fleet file again."),
    "/dashboard": _Page("The dashboard's page.", types=(HTML,)),
    "/dashboard/api/state": _Page("What the dashboard shows."),
    "/dashboard/api/route/{id}": _Page("One recent decision."),
    "/dashboard/events": _Page("The dashboard's changes.", types=(EVENTS,)),
    "/openapi.json": _Page("This page."),
    "/livez": _Page("The process is alive."),
    "/readyz": _Page("Requests may be sent here."),
}


def openapi(routes: Iterable[Route], *, has_keys: bool) -> dict[str, Any]:
    """The page.

    Args:
        routes: Those to describe.
        has_keys: True if the gateway asks for keys.
    """
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, has_keys=has_keys)
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvfleet", "version": version("kvfleet")},
        "paths": paths,
        "components": {"schemas": dict(SCHEMAS), **({"securitySchemes": keys} if has_keys else {})},
    }


def _operation(route: Route, *, has_keys: bool) -> dict[str, Any]:
    page = _PAGES[route.path]
    error = {"description": "An error.", "content": {JSON: {"schema": _ref(page.error)}}}
    told: dict[str, Any] = {
        "summary": page.summary,
        "responses": {"200": {"description": "The answer.", "content": {one: {} for one in page.types}}, "4XX": error},
    }
    told["responses"]["5XX"] = {"description": "An error, or a state.", "content": {JSON: {"schema": _ANY_OBJECT}}}
    if page.body:
        told["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref(page.body)}}}
    if "{" in route.path:
        name = route.path.partition("{")[2].rstrip("}")
        told["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    if has_keys and route.access is not Access.OPEN:
        told["security"] = [{"bearer": []}, {"x-api-key": []}]
    return told


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
