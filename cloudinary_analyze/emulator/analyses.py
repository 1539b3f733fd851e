"""Synthetic analyses: a pure function of model, source and parameters for every model.

For gallery images they describe the drawing. For other sources they are made up from the hash of
the source, in the shape of the service's responses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from cloudinary_analyze.emulator.gallery import (
    COLORS,
    KINDS,
    Entropy,
    Scene,
    Shape,
    find_scene,
)
from cloudinary_analyze.emulator.models import AI_VISION
from cloudinary_analyze.emulator.validation import AnalyzeRequest

Analysis = dict[str, Any]

# Per model and kind of shape: (label, category) pairs, chosen by the shape's color.
_LABELS: Final[Mapping[str, Mapping[str, tuple[tuple[str, str], ...]]]] = MappingProxyType(
    {
        "coco": {
            "rectangle": (("tv", "electronic"), ("book", "indoor"), ("person", "person")),
            "ellipse": (("sports ball", "sports"), ("orange", "food"), ("clock", "indoor")),
            "triangle": (("kite", "sports"), ("pizza", "food"), ("boat", "vehicle")),
        },
        "lvis": {
            "rectangle": (("poster", "decoration"), ("mirror", "furniture"), ("box", "container")),
            "ellipse": (("balloon", "toy"), ("plate", "kitchenware"), ("button", "accessory")),
            "triangle": (("flower arrangement", "plant"), ("tent", "shelter"), ("cone", "sign")),
        },
        "unidet": {
            "rectangle": (("table", "furniture"), ("door", "building"), ("picture frame", "art")),
            "ellipse": (("wheel", "vehicle part"), ("egg", "food"), ("lamp", "furniture")),
            "triangle": (("traffic sign", "sign"), ("roof", "building"), ("sail", "vehicle part")),
        },
        "cld_fashion": {
            "rectangle": (("coat", "outerwear"), ("top", "upper body")),
            "ellipse": (("bag", "accessory"),),
            "triangle": (("skirt", "lower body"),),
        },
        "human_anatomy": {
            "ellipse": (("left-face", "head"), ("right-face", "head"), ("left-hand", "arm")),
        },
        "cld_text": {"rectangle": (("text", ""),)},
    }
)
# The service leaves the mid out for some logos.
_LOGOS: Final = (("/m/045c7b", "google"), ("/m/0k8z", "apple"), (None, "acme"))
_FASHION: Final = MappingProxyType(
    {
        "coat": ("sleeve length", ("long (wrist)", "three quarter", "elbow")),
        "top": ("sleeve length", ("short", "elbow", "long (wrist)")),
        "skirt": ("skirt length", ("mini", "midi", "below the knee", "maxi")),
    }
)
_SUBJECTS: Final = (
    "A brown dog", "A woman in a red coat", "A bowl of fruit", "A white sneaker", "An old bicycle",
    "A man with a guitar", "A wooden chair", "A cup of coffee", "A black cat", "A small sailboat",
    "A child in a yellow raincoat", "A pair of sunglasses", "A vintage car", "A stack of books",
    "A leather handbag", "A glass of red wine",
)  # fmt: skip
_SETTINGS: Final = (
    "on a wooden table", "in front of a brick wall", "on a sandy beach", "in a sunlit room",
    "beside a window", "on a city street", "in a green meadow", "against a plain background",
    "under a cloudy sky", "next to a potted plant", "on a marble counter", "in the snow",
)  # fmt: skip
_MOODS: Final = (
    "in soft morning light", "seen from above", "with shallow depth of field", "at dusk",
    "in bright daylight", "seen from the side", "in warm colors", "in muted colors",
)  # fmt: skip
_SYNONYMS: Final = MappingProxyType(
    {
        "circle": "ellipse",
        "oval": "ellipse",
        "square": "rectangle",
        **{kind: kind for kind in KINDS},
    }
)
_WORD: Final = re.compile(r"[a-z]+")
_CLOSED_QUESTION: Final = re.compile(
    r"\s*(?:is|are|was|does|do|did|has|have|can|could|will)\b", re.IGNORECASE
)


def build_analysis(request: AnalyzeRequest) -> Analysis | None:
    """Return ``data.analysis`` for a request. ``None`` if its source cannot be fetched.

    Only gallery URLs without an image cannot be fetched.
    """
    scene = find_scene(request.source)
    if scene is None:
        return None
    model = request.model
    analysis = _BUILDERS[model.name](request, scene)
    if model.version is not None:
        analysis["model_version"] = model.version
    return analysis


def compute_cost(request: AnalyzeRequest) -> int:
    """Return the units of quota that a request uses: tokens for AI Vision, otherwise 1."""
    if request.model.feature != AI_VISION:
        return 1
    count = len(request.items)
    jitter = Entropy("cost", request.source).pick(25)
    if request.model.name == "ai_vision_tagging":
        return 520 + 33 * count + jitter
    return 650 + 40 * count + jitter if count < 3 else 450 + 208 * count + jitter


def compute_latency(request: AnalyzeRequest) -> float:
    """Return the seconds that the service would take. AI Vision answers prompts one by one."""
    spread = 0.8 + 0.4 * Entropy("latency", request.model.name, request.source).fraction()
    if request.model.feature != AI_VISION:
        return 0.8 * spread
    items = 1 if request.model.name == "ai_vision_tagging" else len(request.items)
    return (0.9 + 1.5 * items) * spread


def _build_caption(request: AnalyzeRequest, scene: Scene) -> Analysis:
    return {"data": {"caption": _caption(request.source, scene)}}


def _caption(source: str, scene: Scene) -> str:
    if scene.drawn:
        return scene.describe()
    entropy = Entropy("caption", source)
    parts = (table[entropy.pick(len(table))] for table in (_SUBJECTS, _SETTINGS, _MOODS))
    return " ".join(parts) + "."


def _build_general(request: AnalyzeRequest, scene: Scene) -> Analysis:
    return {"responses": [{"value": _reply(request, scene, prompt)} for prompt in request.items]}


def _reply(request: AnalyzeRequest, scene: Scene, prompt: str) -> str:
    caption = _caption(request.source, scene)
    if _CLOSED_QUESTION.match(prompt):
        answer = "Yes" if _judge(request.source, scene, prompt, 0.4) else "No"
        return f"{answer}. {caption}"
    if "how many" in prompt.lower():
        return f"There are {len(scene.shapes)} objects in the image. {caption}"
    return caption


def _build_moderation(request: AnalyzeRequest, scene: Scene) -> Analysis:
    answers = []
    for question in request.items:
        if not scene.drawn and Entropy("unknown", request.source, question).fraction() < 0.06:
            value = "unknown"
        else:
            value = "yes" if _judge(request.source, scene, question, 0.12) else "no"
        answers.append({"prompt": question, "value": value})
    return {"responses": answers}


def _build_tagging(request: AnalyzeRequest, scene: Scene) -> Analysis:
    return {
        "tags": [
            {"name": name}
            for name, description in request.items
            if _judge(request.source, scene, f"{name} {description}", 0.3)
        ]
    }


def _judge(source: str, scene: Scene, text: str, likelihood: float) -> bool:
    """Return whether a text is true of a scene: by its shapes and colors, otherwise by hash."""
    if scene.drawn:
        words = {word.removesuffix("s") for word in _WORD.findall(text.lower())}
        kinds = {kind for word, kind in _SYNONYMS.items() if word in words}
        colors = {color for color in COLORS if color in words}
        if kinds or colors:
            return any(
                (not kinds or shape.kind in kinds) and (not colors or shape.color in colors)
                for shape in scene.shapes
            )
    return Entropy("judge", source, text).fraction() < likelihood


def _label(model: str, shapes: Iterable[Shape]) -> list[tuple[str, str, Shape]]:
    labeled = []
    for shape in shapes:
        choices = _LABELS[model].get(shape.kind)
        if choices:
            label, category = choices[_COLOR_INDEX[shape.color] % len(choices)]
            labeled.append((label, category, shape))
    return labeled


_COLOR_INDEX: Final = {color: index for index, color in enumerate(COLORS)}


def _build_detection(request: AnalyzeRequest, scene: Scene) -> Analysis:
    tags: dict[str, list[Analysis]] = {}
    for label, category, shape in _label(request.model.name, scene.shapes):
        entry: Analysis = {
            "bounding-box": [
                float(shape.x),
                float(shape.y),
                float(shape.width),
                float(shape.height),
            ],
            "categories": [category] if category else [],
            "confidence": shape.confidence,
        }
        if request.model.name == "cld_fashion" and label in _FASHION:
            entry["attributes"] = _build_attributes(label, shape)
        tags.setdefault(label, []).append(entry)
    return {"tags": tags}


def _build_attributes(label: str, shape: Shape) -> Analysis:
    attribute, values = _FASHION[label]
    first = shape.width % len(values)
    best = round(0.5 + shape.height / 400, 4)
    second = values[(first + 1) % len(values)]
    return {attribute: [[values[first], best], [second, round((1 - best) / 2, 4)]]}


def _build_logos(_request: AnalyzeRequest, scene: Scene) -> Analysis:
    annotations = []
    for shape in scene.shapes:
        if shape.kind != "triangle":
            continue
        mid, description = _LOGOS[_COLOR_INDEX[shape.color] % len(_LOGOS)]
        left, top = shape.x, shape.y
        right, bottom = left + shape.width, top + shape.height
        corners = ((left, top), (right, top), (right, bottom), (left, bottom))
        annotation: Analysis = {} if mid is None else {"mid": mid}
        annotation["description"] = description
        annotation["score"] = shape.confidence
        annotation["bounding_poly"] = {"vertices": [{"x": x, "y": y} for x, y in corners]}
        annotations.append(annotation)
    return {"logo_annotations": annotations}


def _build_labels(_request: AnalyzeRequest, scene: Scene) -> Analysis:
    scores: dict[str, float] = {}
    for shape in scene.shapes:
        for label in (shape.kind, shape.color):
            scores[label] = max(scores.get(label, 0.0), shape.confidence)
    ranked = sorted(scores.items(), key=lambda pair: -pair[1])
    return {"label_annotations": {"labels": [{"label": k, "score": v} for k, v in ranked]}}


def _build_quality(request: AnalyzeRequest, _scene: Scene) -> Analysis:
    entropy = Entropy("quality", request.source)
    score = round(entropy.fraction(), 5)
    quality = "low" if score < 0.33 else "medium" if score < 0.66 else "high"
    confidence = round(0.6 + 0.4 * entropy.fraction(), 2)
    return {"quality": quality, "score": score, "confidence": confidence}


def _build_watermark(request: AnalyzeRequest, scene: Scene) -> Analysis:
    entropy = Entropy("watermark", request.source)
    chance, confidence = entropy.pick(100), round(0.7 + 0.3 * entropy.fraction(), 4)
    if scene.drawn or chance < 70:
        return {"detections": [{"name": "clean", "confidence": confidence}]}
    if chance < 80:
        return {"detections": []}
    name = "watermark" if chance < 92 else "banner"
    return {"detections": [{"name": name, "confidence": confidence}]}


def _build_shop(request: AnalyzeRequest, scene: Scene) -> Analysis:
    entropy = Entropy("shop", request.source)
    plain = scene.drawn or entropy.pick(2) == 0
    confidence = round(0.6 + 0.4 * entropy.fraction(), 4)
    return {
        "tags": {"studio" if plain else "natural": [{"categories": [], "confidence": confidence}]}
    }


_BUILDERS: Final[Mapping[str, Callable[[AnalyzeRequest, Scene], Analysis]]] = MappingProxyType(
    {
        "ai_vision_general": _build_general,
        "ai_vision_moderation": _build_moderation,
        "ai_vision_tagging": _build_tagging,
        "captioning": _build_caption,
        "google_logo_detection": _build_logos,
        "google_tagging": _build_labels,
        "image_quality": _build_quality,
        "shop_classifier": _build_shop,
        "watermark_detection": _build_watermark,
        **dict.fromkeys(_LABELS, _build_detection),
    }
)
