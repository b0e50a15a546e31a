"""What kinds of content a request carries, and which models can take it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.base import ChatMessage
from kvfleet.config.schema import ModelConfig

__all__ = [
    "ModalityDetection",
    "accepts_audio",
    "accepts_images",
    "accepts_video",
    "detect_modality",
    "estimate_multimodal_cost",
    "filter_json_mode_capable",
    "filter_tool_capable",
    "filter_vision_capable",
]

_IMAGE_TOKENS = 765
_LOW_DETAIL_TOKENS = 85
# A picture inside a text is a data URL with a payload; the mere mention of one is not.
_DATA_IMAGE = re.compile(r"data:image/[\w.+-]+;base64,[A-Za-z0-9+/]{32}")


@attrs.frozen(kw_only=True)
class ModalityDetection:
    """What a request's messages carry.

    Attributes:
        has_images, has_audio, has_video, has_documents: True if any part is of that kind.
        image_count: How many pictures there are.
        estimated_image_tokens: About how many prompt tokens they cost.
    """

    has_images: bool = False
    has_audio: bool = False
    has_video: bool = False
    has_documents: bool = False
    image_count: int = 0
    estimated_image_tokens: int = 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """The kinds of content, ``text`` first."""
        found = (
            ("vision", self.has_images),
            ("audio", self.has_audio),
            ("video", self.has_video),
            ("document", self.has_documents),
        )
        return ("text", *(name for name, is_there in found if is_there))

    @property
    def is_multimodal(self) -> bool:
        """True if there is more than text."""
        return self.has_images or self.has_audio or self.has_video or self.has_documents

    @property
    def primary_modality(self) -> str:
        """The most demanding kind: video, audio, vision, or else text (which a document is read as)."""
        if self.has_video:
            return "video"
        if self.has_audio:
            return "audio"
        return "vision" if self.has_images else "text"


TEXT_ONLY = ModalityDetection()


def detect_modality(messages: Iterable[ChatMessage | Mapping[str, Any]]) -> ModalityDetection:
    """Look through messages for pictures, sound, video and files.

    A picture counts 765 tokens, or 85 at low detail. Beside OpenAI's content parts, ``data:image/…;base64`` payloads
    within a plain text count as pictures.

    Args:
        messages: `ChatMessage` objects or OpenAI message objects.
    """
    kinds: dict[str, int] = {}
    tokens = 0
    for kind, cost in _found(messages):
        kinds[kind] = kinds.get(kind, 0) + 1
        tokens += cost
    if not kinds:
        return TEXT_ONLY
    return ModalityDetection(
        has_images="image" in kinds,
        has_audio="audio" in kinds,
        has_video="video" in kinds,
        has_documents="document" in kinds,
        image_count=kinds.get("image", 0),
        estimated_image_tokens=tokens,
    )


def _found(messages: Iterable[ChatMessage | Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    for message in messages:
        content = message.content if isinstance(message, ChatMessage) else message.get("content")
        if isinstance(content, str):
            yield from _in_text(content)
        elif isinstance(content, Sequence):
            for part in content:
                if isinstance(part, Mapping):
                    yield from _in_part(part)


def _in_text(text: str) -> Iterator[tuple[str, int]]:
    # The single character is sought first: that is 30 times as fast, and most prompts have none.
    if ";" in text and "data:image/" in text:
        for _ in _DATA_IMAGE.finditer(text):
            yield "image", _IMAGE_TOKENS


def _in_part(part: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    type_ = part.get("type")
    if type_ == "text":
        text = part.get("text")
        if isinstance(text, str):
            yield from _in_text(text)
    elif type_ in ("image_url", "image", "input_image"):
        source = part.get("image_url")
        detail = source.get("detail") if isinstance(source, Mapping) else part.get("detail")
        yield "image", _LOW_DETAIL_TOKENS if detail == "low" else _IMAGE_TOKENS
    elif isinstance(type_, str) and (kind := _KINDS.get(type_)):
        yield kind, 0


_KINDS = {
    "input_audio": "audio",
    "audio_url": "audio",
    "audio": "audio",
    "video_url": "video",
    "video": "video",
    "input_video": "video",
    "file": "document",
    "input_file": "document",
    "document": "document",
}


def accepts_images(model: ModelConfig) -> bool:
    """True if the model says so, in its capabilities or with the tag ``vision: "true"``."""
    return model.capabilities.supports_vision or model.tags.get("vision") == "true"


def accepts_audio(model: ModelConfig) -> bool:
    """True if the model says so, in its capabilities or with the tag ``audio: "true"``."""
    return model.capabilities.supports_audio or model.tags.get("audio") == "true"


def accepts_video(model: ModelConfig) -> bool:
    """True if the model says so, in its capabilities or with the tag ``video: "true"``."""
    return model.capabilities.supports_video or model.tags.get("video") == "true"


def filter_vision_capable(models: Sequence[ModelConfig], detection: ModalityDetection) -> list[ModelConfig]:
    """The models that can take every kind of content found; none, if nobody can."""
    return [
        model
        for model in models
        if (not detection.has_images or accepts_images(model))
        and (not detection.has_audio or accepts_audio(model))
        and (not detection.has_video or accepts_video(model))
    ]


def filter_tool_capable(models: Sequence[ModelConfig]) -> list[ModelConfig]:
    """The models that accept tools."""
    return [model for model in models if model.capabilities.supports_tools]


def filter_json_mode_capable(models: Sequence[ModelConfig]) -> list[ModelConfig]:
    """The models that honour ``response_format``."""
    return [model for model in models if model.capabilities.supports_json_mode]


def estimate_multimodal_cost(model: ModelConfig, detection: ModalityDetection) -> float | None:
    """What the pictures alone cost on a model, in US dollars; None if its price is not known."""
    price = model.cost_per_1k_input_tokens
    return None if price is None else detection.estimated_image_tokens * price / 1000
