"""The models of the emulator: their quota features and required lists."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import attrs

AI_VISION: Final = "ai_vision"
OBJECT_DETECTION: Final = "object_detection"
GOOGLE_TAGGING: Final = "google_tagging"

FREE_PLAN: Final[Mapping[str, int]] = MappingProxyType(
    {AI_VISION: 100_000, OBJECT_DETECTION: 500, GOOGLE_TAGGING: 50}
)


@attrs.frozen
class Model:
    """One analysis model.

    Attributes:
        name: The name in the path.
        feature: The add-on feature whose quota a call uses.
        list_field: The list of 1 to 10 items that the body must have, if any.
        version: ``model_version`` of the responses. The Google models have none.
    """

    name: str
    feature: str = attrs.field(default=OBJECT_DETECTION, kw_only=True)
    list_field: str | None = attrs.field(default=None, kw_only=True)
    version: int | None = attrs.field(default=1, kw_only=True)


_ALL: Final = (
    Model("ai_vision_general", feature=AI_VISION, list_field="prompts"),
    Model("ai_vision_moderation", feature=AI_VISION, list_field="rejection_questions"),
    Model("ai_vision_tagging", feature=AI_VISION, list_field="tag_definitions"),
    Model("captioning", version=4),
    Model("cld_fashion", version=4),
    Model("cld_text"),
    Model("coco"),
    Model("google_logo_detection", feature=GOOGLE_TAGGING, version=None),
    Model("google_tagging", feature=GOOGLE_TAGGING, version=None),
    Model("human_anatomy"),
    Model("image_quality"),
    Model("lvis"),
    Model("shop_classifier"),
    Model("unidet"),
    Model("watermark_detection"),
)

MODELS: Final[Mapping[str, Model]] = MappingProxyType({model.name: model for model in _ALL})

# The vendor's guide writes the plural, its schema and clients the singular.
PATH_NAMES: Final[Mapping[str, Model]] = MappingProxyType(
    {**MODELS, "google_logo_detections": MODELS["google_logo_detection"]}
)
