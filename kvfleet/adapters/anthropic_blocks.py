"""The content blocks of an Anthropic stream, read one event at a time into deltas of OpenAI's.

Text, thoughts and the arguments of tools are handed on as they come. A block that is only good whole (a thought with
its signature, a result of Anthropic's own tools) is put together and handed on at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import orjson

__all__ = ["Blocks"]

_NOTHING: Mapping[str, Any] = {}


@attrs.define
class Blocks:
    """What is known of the open blocks, by Anthropic's index; each method gives the delta to send, or an empty one."""

    _open: dict[int, dict[str, Any]] = attrs.field(init=False, factory=dict)
    _pieces: dict[int, list[str]] = attrs.field(init=False, factory=dict)
    _tool_index: dict[int, int] = attrs.field(init=False, factory=dict)
    _counts: dict[str, int] = attrs.field(init=False, factory=dict)

    def start(self, index: int, block: Mapping[str, Any]) -> Mapping[str, Any]:
        """A block begins."""
        self._open[index], self._pieces[index] = dict(block), []
        kind = block["type"]
        if kind == "text":
            return {"content": block["text"]} if block.get("text") else _NOTHING
        if kind == "thinking" and block.get("thinking"):
            return {"reasoning_content": block["thinking"]}
        if kind != "tool_use":
            return _NOTHING
        self._tool_index[index] = len(self._tool_index)
        function = {"name": block["name"], "arguments": ""}
        return self._tool(index, {"id": block["id"], "type": "function", "function": function})

    def delta(self, index: int, delta: Mapping[str, Any]) -> Mapping[str, Any]:
        """A block goes on."""
        block, kind = self._open[index], delta["type"]
        if kind == "text_delta":
            return {"content": delta["text"]}
        if kind == "thinking_delta":
            block["thinking"] = block.get("thinking", "") + delta["thinking"]
            return {"reasoning_content": delta["thinking"]}
        if kind == "signature_delta":
            block["signature"] = block.get("signature", "") + delta["signature"]
        elif kind == "citations_delta":
            return self._listed("citations", delta["citation"])
        elif kind == "input_json_delta" and delta["partial_json"]:
            self._pieces[index].append(delta["partial_json"])
            if index in self._tool_index:
                return self._tool(index, {"function": {"arguments": delta["partial_json"]}})
        return _NOTHING

    def stop(self, index: int) -> Mapping[str, Any]:
        """A block ends."""
        block, pieces = self._open.pop(index), self._pieces.pop(index)
        kind = block["type"]
        if kind in ("thinking", "redacted_thinking"):
            return self._listed("thinking_blocks", block)
        if kind == "text":
            return _NOTHING
        if kind == "tool_use":
            # no piece came: the arguments stood at the beginning, or there are none
            whole = orjson.dumps(block.get("input") or {}).decode()
            return _NOTHING if pieces else self._tool(index, {"function": {"arguments": whole}})
        if pieces:
            block["input"] = orjson.loads("".join(pieces))
        return self._listed("content_blocks", block)

    def _tool(self, index: int, call: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"tool_calls": [{"index": self._tool_index[index], **call}]}

    def _listed(self, key: str, item: Mapping[str, Any]) -> Mapping[str, Any]:
        """One more item of a list; OpenAI's clients put lists together by the items' index."""
        count = self._counts[key] = self._counts.get(key, -1) + 1
        return {key: [{"index": count, **item}]}
