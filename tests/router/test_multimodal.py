"""Kinds of content, and who can take them."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.base import ChatMessage
from kvfleet.config.schema import ModelCapabilities, ModelConfig
from kvfleet.router.multimodal import (
    ModalityDetection,
    detect_modality,
    estimate_multimodal_cost,
    filter_json_mode_capable,
    filter_tool_capable,
    filter_vision_capable,
)

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    """One user message of some parts."""
    return [{"role": "user", "content": list(parts)}]


def model(name: str, **capabilities: Any) -> ModelConfig:
    """A model with some capabilities."""
    return ModelConfig(name=name, endpoint=f"http://{name}", capabilities=ModelCapabilities(**capabilities))


def test_the_pages_example() -> None:
    """Text and one picture: multimodal, vision, one image of 765 tokens."""
    found = detect_modality(
        user(
            {"type": "text", "text": "What's in this image?"},
            {"type": "image_url", "image_url": {"url": "https://example.com/photo.jpg"}},
        )
    )
    assert found.is_multimodal
    assert found.primary_modality == "vision"
    assert (found.image_count, found.estimated_image_tokens) == (1, 765)
    assert found.modalities == ("text", "vision")


def test_a_picture_of_low_detail_costs_85_tokens() -> None:
    """Two pictures are added up, each by its detail."""
    low = {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}}
    high = {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "high"}}
    assert detect_modality(user(low, high)).estimated_image_tokens == 850


@pytest.mark.parametrize(
    ("part", "primary", "flag"),
    [
        ({"type": "input_audio", "input_audio": {"data": "…", "format": "wav"}}, "audio", "has_audio"),
        ({"type": "audio_url", "audio_url": {"url": "https://x/y.wav"}}, "audio", "has_audio"),
        ({"type": "video_url", "video_url": {"url": "https://x/y.mp4"}}, "video", "has_video"),
        ({"type": "file", "file": {"file_id": "f"}}, "text", "has_documents"),
        ({"type": "input_image", "image_url": "https://x/y.png"}, "vision", "has_images"),
    ],
)
def test_each_kind_of_part_is_recognised(part: dict[str, Any], primary: str, flag: str) -> None:
    """Sound, video, files and pictures, by the types engines take."""
    found = detect_modality(user({"type": "text", "text": "Look."}, part))
    assert getattr(found, flag)
    assert found.is_multimodal
    assert found.primary_modality == primary


def test_video_is_more_demanding_than_sound_and_pictures() -> None:
    """The primary modality is the most demanding one."""
    every = ModalityDetection(has_images=True, has_audio=True, has_video=True)
    assert every.primary_modality == "video"
    assert ModalityDetection(has_images=True, has_audio=True).primary_modality == "audio"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": f"See {PIXEL}"},
        ChatMessage("user", f"{PIXEL}"),
        user({"type": "text", "text": PIXEL})[0],
    ],
)
def test_a_picture_within_a_text_counts(message: Any) -> None:
    """A data URL with its payload is a picture, wherever it stands."""
    assert detect_modality([message]).image_count == 1


@pytest.mark.parametrize(
    "text",
    [
        "How do I use data:image/png; in CSS?",
        "Write a function that reads photo.jpg; return its size.",
        "![a picture](https://example.com/a.png);",
        "",
    ],
)
def test_talking_of_pictures_is_no_picture(text: str) -> None:
    """A question about images goes to any model."""
    assert detect_modality([{"role": "user", "content": text}]) == ModalityDetection()


def test_strange_content_is_no_error() -> None:
    """Null content with tool calls, and parts of unknown shape, are passed over."""
    messages = [{"role": "assistant", "content": None}, {"role": "user", "content": ["text", {"type": 7}, {}]}]
    assert not detect_modality(messages).is_multimodal


def test_only_models_that_can_take_it_remain() -> None:
    """By capability or by tag; nobody, if nobody can."""
    tagged = ModelConfig(name="tagged", endpoint="http://t", tags={"vision": "true", "audio": "true"})
    models = [model("blind"), model("sees", supports_vision=True), tagged, model("watches", supports_video=True)]

    def left(**kinds: bool) -> list[str]:
        return [m.name for m in filter_vision_capable(models, ModalityDetection(**kinds))]

    assert left() == ["blind", "sees", "tagged", "watches"]
    assert left(has_images=True) == ["sees", "tagged"]
    assert left(has_images=True, has_audio=True) == ["tagged"]
    assert left(has_video=True) == ["watches"]
    assert left(has_images=True, has_video=True) == []


def test_tools_and_json_mode_are_filtered_by_capability() -> None:
    """As the models declare."""
    models = [model("a", supports_tools=True), model("b", supports_json_mode=True)]
    assert [m.name for m in filter_tool_capable(models)] == ["a"]
    assert [m.name for m in filter_json_mode_capable(models)] == ["b"]


def test_pictures_cost_prompt_tokens() -> None:
    """At the model's price; unknown if that is unknown."""
    found = ModalityDetection(has_images=True, image_count=2, estimated_image_tokens=1530)
    priced = ModelConfig(name="m", endpoint="http://m", cost_per_1k_input_tokens=0.01)
    assert estimate_multimodal_cost(priced, found) == pytest.approx(0.0153)
    assert estimate_multimodal_cost(model("m"), found) is None
