"""A conversation as the text a model reads: a chat template, as Hugging Face's tokenizers carry one, run in a sandbox.

What engines do to a request before the template sees it is done here too, as vLLM 0.32 does it (in its
``entrypoints/chat_utils.py`` and the models of its requests): tools have the fields that are known of them, in one
order and null where absent; the arguments of tool calls become objects; texts in parts become one text unless the
template wants the parts; a developer is the system where the template knows none.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import orjson

from kvfleet.errors import ComponentError

__all__ = ["ChatTemplate", "UnrenderableError"]

# A template that looks what content is, or goes through it, takes parts as they are.
_TAKES_PARTS = re.compile(r"content\b[^%}]{0,20} is (?:not )?(?:string|iterable|sequence)|for \w+ in [^%}]*content\b")


class UnrenderableError(ValueError):
    """A conversation that cannot be laid out here: it has pictures, or the template refuses it."""


@attrs.frozen
class ChatTemplate:
    """A chat template, compiled.

    Attributes:
        takes_parts: True if it understands content in parts.
        knows_developers: True if it has a word for the role ``developer``.
    """

    _template: Any = attrs.field(repr=False)
    _words: Mapping[str, Any] = attrs.field(repr=False)
    takes_parts: bool = False
    knows_developers: bool = False

    @classmethod
    def load(cls, folder: Path, file: Path | None = None) -> ChatTemplate | None:
        """The template of a tokenizer's folder; None if it has none.

        Args:
            folder: Holds ``tokenizer_config.json``, and newer ones ``chat_template.jinja``.
            file: Another template than the folder's.

        Raises:
            ComponentError: if it cannot be read, or the extra is not installed.
        """
        try:
            config = _config(folder / "tokenizer_config.json")
            source = _source(folder, file, config)
        except (OSError, ValueError) as error:
            raise ComponentError(f"the chat template in {folder} cannot be read: {error}") from error
        if source is None:
            return None
        words = {key: value for key, value in config.items() if key.endswith("_token")}
        tokens = {key: value.get("content") if isinstance(value, Mapping) else value for key, value in words.items()}
        return cls(_compiled(source), tokens, _TAKES_PARTS.search(source) is not None, "developer" in source)

    def render(self, body: Mapping[str, Any]) -> str:
        """A chat request's prompt.

        Raises:
            UnrenderableError: if it has more than text in it, or the template refuses it.
        """
        if body.get("continue_final_message") or body.get("chat_template"):
            raise UnrenderableError("the request brings a way of its own to lay it out")
        messages = [self._message(message) for message in body.get("messages") or ()]
        more = body.get("chat_template_kwargs")
        words = {
            **self._words,
            "messages": messages,
            "tools": [_tool(tool) for tool in body.get("tools") or ()] or None,
            "documents": body.get("documents"),
            **({"reasoning_effort": body["reasoning_effort"]} if body.get("reasoning_effort") else {}),
            "add_generation_prompt": body.get("add_generation_prompt", True),
            **(more if isinstance(more, Mapping) else {}),
        }
        try:
            return str(self._template.render(words))
        except Exception as error:  # a template may raise anything, and refuses by raising
            raise UnrenderableError(f"the chat template refuses the messages ({type(error).__name__})") from error

    def _message(self, message: Any) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise UnrenderableError("a message is not an object")
        found = {**message, "content": self._content(message.get("content"))}
        if found.get("role") == "developer" and not self.knows_developers:
            found["role"] = "system"
        if isinstance(calls := message.get("tool_calls"), Sequence):
            found["tool_calls"] = [_with_arguments(call) for call in calls]
        return found

    def _content(self, content: Any) -> Any:
        if content is None or isinstance(content, str):
            return content or ""
        texts = [text for part in content if isinstance(text := _text_of(part), str)]
        if len(texts) < len(content):
            raise UnrenderableError("a message has more than text in it")
        return [{"type": "text", "text": text} for text in texts] if self.takes_parts else "\n".join(texts)


def _tool(tool: Any) -> Any:
    """A tool with the fields that an engine's own model of it has."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        return tool
    known = {key: function.get(key) for key in ("name", "description", "parameters")}
    return {"type": "function", "function": known | {key: function[key] for key in ("strict",) if key in function}}


def _text_of(part: Any) -> Any:
    return part.get("text") if isinstance(part, Mapping) else part


def _with_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates want them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": orjson.loads(arguments or "{}")}}
    except orjson.JSONDecodeError:
        return call


def _config(path: Path) -> Mapping[str, Any]:
    found = orjson.loads(path.read_bytes()) if path.exists() else {}
    return found if isinstance(found, Mapping) else {}


def _source(folder: Path, file: Path | None, config: Mapping[str, Any]) -> str | None:
    beside = file or folder / "chat_template.jinja"
    if file is not None or beside.exists():
        return beside.read_text()
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _compiled(source: str) -> Any:
    """The template, in a sandbox with what Hugging Face's ``apply_chat_template`` gives to templates.

    Raises:
        ComponentError: if it is no template, or the extra is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415 - an extra, imported when it is used
        from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415 - the same
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415 - the same
    except ImportError as error:
        raise ComponentError("chat templates need jinja2: pip install 'kvfleet[tokenizers]'") from error

    def parse(_: Any, parser: Any) -> Any:
        """``{% generation %}`` marks what an assistant wrote, for training; here it is only passed through."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    generation = type("Generation", (Extension,), {"tags": {"generation"}, "parse": parse})
    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, generation])
    world.filters["tojson"] = _to_json
    world.globals["raise_exception"] = _refuse
    world.globals["strftime_now"] = _now
    try:
        return world.from_string(source)
    except jinja2.TemplateError as error:
        raise ComponentError(f"the chat template is not one: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)


def _refuse(message: str) -> None:
    raise UnrenderableError(message)


def _now(form: str) -> str:
    """Today, as engines put it into prompts."""
    return dt.datetime.now().astimezone().strftime(form)
