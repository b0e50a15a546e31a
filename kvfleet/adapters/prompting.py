"""Conversations as one text, for engines that apply no chat template themselves.

A template is three texts: what stands before everything, one message with ``{role}`` and ``{content}``, and what makes
the model answer. A message's text is put in as it is and never read as a template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.refusals import refuse, text_of

__all__ = ["TEMPLATES", "PromptTemplate", "template_of"]

_FIELD = re.compile(r"\{(role|content)\}")


@attrs.frozen(kw_only=True)
class PromptTemplate:
    r"""How a conversation is written down.

    >>> template = TEMPLATES["chatml"]
    >>> template.render([{"role": "user", "content": "What does {role} mean?"}], "the engine")
    '<|im_start|>user\nWhat does {role} mean?<|im_end|>\n<|im_start|>assistant\n'
    """

    start: str = ""
    message: str
    answer: str

    def render(self, messages: Any, engine: str) -> str:
        """The conversation as one text.

        Raises:
            BackendError: (`Fault.BAD_REQUEST`) for what is not text: images, tool calls and their results.
        """
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise refuse("messages must be a list of messages", "messages")
        return self.start + "".join(self._one(message, engine) for message in messages) + self.answer

    def _one(self, message: Mapping[str, Any], engine: str) -> str:
        role = str(message.get("role", "user"))
        if role == "tool" or message.get("tool_calls"):
            raise refuse(f"{engine} takes no tool calls and no results of tools", "messages")
        fields = {"role": "system" if role == "developer" else role}
        fields["content"] = text_of(message.get("content"), engine)
        return _FIELD.sub(lambda found: fields[found[1]], self.message)


TEMPLATES: Mapping[str, PromptTemplate] = {
    "plain": PromptTemplate(message="{role}: {content}\n", answer="assistant: "),
    "chatml": PromptTemplate(message="<|im_start|>{role}\n{content}<|im_end|>\n", answer="<|im_start|>assistant\n"),
    "llama3": PromptTemplate(
        start="<|begin_of_text|>",
        message="<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}
"""The templates that have a name; `plain` suits models without chat training and nothing else."""


def template_of(name: str, message: str, answer: str) -> PromptTemplate:
    """The named template, with its message and its answer replaced where they are given."""
    named = TEMPLATES[name]
    return attrs.evolve(named, message=message or named.message, answer=answer or named.answer)
