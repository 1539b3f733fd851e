"""One typed analysis per model, flat: ``analysis.caption``, not ``analysis.data.caption``.

Values only. `_wire.structure` fills them, and maps the service's names. Detections are read from
the raw JSON on first access, because most callers look at few of them; reading one never raises,
whatever the service sent, and its ``raw`` keeps what was sent.

Source: the 200 responses of ``POST /v2/analysis/{cloud}/analyze/{model}``. The docstrings below leave
out ``/v2/analysis/{cloud}``. Notifications carry the same ``data.analysis``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import attrs

from cloudinary_analyze._values import Jsonable

__all__ = [
    "AIVisionGeneralAnalysis",
    "AIVisionModerationAnalysis",
    "AIVisionTaggingAnalysis",
    "Analysis",
    "AttributeValue",
    "BoundingBox",
    "CaptioningAnalysis",
    "CldFashionAnalysis",
    "CldTextAnalysis",
    "CocoAnalysis",
    "DetectedTags",
    "Detection",
    "DetectionAnalysis",
    "GoogleLabel",
    "GoogleLogoDetectionAnalysis",
    "GoogleTaggingAnalysis",
    "HumanAnatomyAnalysis",
    "ImageQualityAnalysis",
    "Logo",
    "LogoVertex",
    "LvisAnalysis",
    "ModerationAnswer",
    "OtherAnalysis",
    "ShopClassifierAnalysis",
    "UnidetAnalysis",
    "VisionAnswer",
    "VisionTag",
    "Watermark",
    "WatermarkDetectionAnalysis",
]

ModelVersion = int | str | float | None


# a tuple is made in a third of the time, and every detection of every picture has one
class BoundingBox(NamedTuple):
    """A rectangle on the analyzed image, in its pixels. The origin is the top left corner.

    A named tuple of four numbers: ``x, y, width, height = box``. In JSON it is an array. Use
    ``box._replace(…)`` to get a changed copy.

    Source: ``bounding-box`` of an instance in ``data.analysis.tags``.

    Attributes:
        x: The left edge, in pixels.
        y: The top edge, in pixels.
        width: The width, in pixels.
        height: The height, in pixels.
    """

    x: float
    y: float
    width: float
    height: float


@attrs.frozen(repr=False, eq=False)
class AttributeValue(Jsonable):
    """One value of a garment's attribute, such as ``midi`` for ``skirt length``.

    Source: ``attributes`` of an instance in ``data.analysis.tags`` of ``POST /analyze/cld_fashion``.

    Attributes:
        value: The value.
        score: The model's confidence, 0 to 1. ``None`` if not sent.
    """

    value: str
    score: float | None = None


@attrs.frozen(repr=False, eq=False)
class Detection(Jsonable):
    """One instance of a label in an image.

    Reading one never raises: what is missing or has another shape is ``None`` or empty.

    Source: an entry of ``data.analysis.tags.{label}``.

    Attributes:
        label: The label, such as ``person``.
        confidence: The model's confidence, 0 to 1. ``None`` if not sent.
        bounding_box: The position, in pixels. ``None`` if not sent; classifiers send none.
        raw: The JSON of this instance as received.
    """

    label: str
    confidence: float | None
    bounding_box: BoundingBox | None
    raw: Any = attrs.field(repr=False, hash=False)

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories that the label belongs to. Often empty."""
        raw = self.raw.get("categories") if isinstance(self.raw, dict) else None
        return tuple(map(str, raw)) if isinstance(raw, list) else ()

    @property
    def attributes(self) -> Mapping[str, tuple[AttributeValue, ...]]:
        """The attributes of a garment: name to values, best first. Empty except for ``cld_fashion``."""
        raw = self.raw.get("attributes") if isinstance(self.raw, dict) else None
        if not isinstance(raw, dict):
            return {}
        return {name: _read_attribute(values) for name, values in raw.items()}


def _read_attribute(values: Any) -> tuple[AttributeValue, ...]:
    pairs = values if isinstance(values, list) else [values]
    read = []
    for pair in pairs:
        value, score = (*pair, None, None)[:2] if isinstance(pair, list) else (pair, None)
        if value is not None:
            read.append(AttributeValue(str(value), score if _is_number(score) else None))
    return tuple(read)


def _is_number(value: Any) -> bool:
    return type(value) is float or type(value) is int


class _Unfrozen(Detection):
    """A detection that is being filled. It has the same slots, so its class can be changed.

    Every detection is built this way, because frozen objects take twice as long to fill.
    """

    __slots__ = ()
    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__  # with both, CPython stores in the slots directly


_unfrozen: Final[Any] = _Unfrozen
_new: Final = object.__new__
_new_tuple: Final = tuple.__new__  # without a separate frame


def read_detections(label: str, entries: Any) -> tuple[Detection, ...]:
    """Read the instances of a label; what is missing or of another shape is ``None`` or empty."""
    if type(entries) is not list:
        return ()
    read = []
    for raw in entries:
        confidence = box = None
        if type(raw) is dict:
            confidence = raw.get("confidence")
            if type(confidence) is not float and type(confidence) is not int:
                confidence = None
            corners = raw.get("bounding-box")
            if type(corners) is list and len(corners) == 4:
                x, y, width, height = corners
                # spelled out, because a loop takes twice as long
                if (
                    (type(x) is float or type(x) is int)
                    and (type(y) is float or type(y) is int)
                    and (type(width) is float or type(width) is int)
                    and (type(height) is float or type(height) is int)
                ):
                    box = _new_tuple(BoundingBox, corners)
        found = _new(_unfrozen)
        found.label = label
        found.confidence = confidence
        found.bounding_box = box
        found.raw = raw
        found.__class__ = Detection
        read.append(found)
    return tuple(read)


class DetectedTags(Mapping[str, tuple[Detection, ...]]):
    """A mapping of labels to their instances. An instance is read when its label is first accessed.

    A label whose value is not an array stays in `raw` and has no instances.

    Source: ``data.analysis.tags``.

    Attributes:
        raw: The JSON object as received.
    """

    __slots__ = ("_read", "raw")

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw: Mapping[str, Any] = raw
        self._read: dict[str, tuple[Detection, ...]] = {}

    def __getitem__(self, label: str) -> tuple[Detection, ...]:
        found = self._read.get(label)
        if found is None:
            found = self._read[label] = read_detections(label, self.raw[label])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __repr__(self) -> str:
        return f"DetectedTags({dict(self)!r})"

    def __eq__(self, other: object) -> bool:
        return self.raw == other.raw if isinstance(other, DetectedTags) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self.raw))

    def __reduce__(self) -> tuple[Any, ...]:
        return DetectedTags, (self.raw,)


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Analysis(Jsonable):
    """The base class of all analyses.

    Source: ``data.analysis`` of ``POST /analyze/{model}``.

    Attributes:
        model_version: The version of the model as sent. ``None`` if not sent.
    """

    model_version: ModelVersion = None


@attrs.frozen(repr=False, eq=False)
class DetectionAnalysis(Analysis):
    """The base class of analyses that detect objects or classify images.

    Source: ``data.analysis`` of seven models; see the subclasses.

    Attributes:
        tags: Labels and their instances: ``analysis.tags["person"][0].bounding_box``.
    """

    tags: DetectedTags = attrs.field(factory=lambda: DetectedTags({}))

    @property
    def detections(self) -> tuple[Detection, ...]:
        """All instances, label by label, in the order of the response."""
        tags = self.tags
        return tuple([found for label in tags.raw for found in tags[label]])


# Subclasses without fields skip `@attrs.frozen`: decorating each one adds 0.2 ms to import time.
class CldFashionAnalysis(DetectionAnalysis):
    """Garments in an image, with `Detection.attributes`.

    Source: ``data.analysis`` of ``POST /analyze/cld_fashion``.
    """

    __slots__ = ()


class CldTextAnalysis(DetectionAnalysis):
    """Blocks of text in an image: their positions, not their content.

    Source: ``data.analysis`` of ``POST /analyze/cld_text``.
    """

    __slots__ = ()


class CocoAnalysis(DetectionAnalysis):
    """Objects of 80 common kinds.

    Source: ``data.analysis`` of ``POST /analyze/coco``.
    """

    __slots__ = ()


class HumanAnatomyAnalysis(DetectionAnalysis):
    """Parts of the human body in an image.

    Source: ``data.analysis`` of ``POST /analyze/human_anatomy``.
    """

    __slots__ = ()


class LvisAnalysis(DetectionAnalysis):
    """Everyday objects of more than a thousand kinds.

    Source: ``data.analysis`` of ``POST /analyze/lvis``.
    """

    __slots__ = ()


class ShopClassifierAnalysis(DetectionAnalysis):
    """Whether a product picture was taken in a studio.

    Source: ``data.analysis`` of ``POST /analyze/shop_classifier``.
    """

    __slots__ = ()


class UnidetAnalysis(DetectionAnalysis):
    """Objects, by a detector that was trained on several datasets.

    Source: ``data.analysis`` of ``POST /analyze/unidet``.
    """

    __slots__ = ()


@attrs.frozen(repr=False, eq=False)
class VisionAnswer(Jsonable):
    """The answer to one prompt.

    Source: an entry of ``data.analysis.responses`` of ``POST /analyze/ai_vision_general``.

    Attributes:
        value: The text of the answer. Empty if not sent.
    """

    value: str = ""


@attrs.frozen(repr=False, eq=False)
class AIVisionGeneralAnalysis(Analysis):
    """The answers to the prompts of a request.

    Source: ``data.analysis`` of ``POST /analyze/ai_vision_general``.

    Attributes:
        responses: One answer per prompt, in the order of the prompts.
    """

    responses: tuple[VisionAnswer, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts of the answers, in the order of the prompts."""
        return tuple([response.value for response in self.responses])


@attrs.frozen(repr=False, eq=False)
class ModerationAnswer(Jsonable):
    """The answer to one rejection question.

    Source: an entry of ``data.analysis.responses`` of ``POST /analyze/ai_vision_moderation``.

    Attributes:
        value: ``"yes"``, ``"no"``, ``"unknown"``, or any other text as sent. Empty if not sent.
        prompt: The question. ``None`` if not sent.
    """

    value: str = ""
    prompt: str | None = None


@attrs.frozen(repr=False, eq=False)
class AIVisionModerationAnalysis(Analysis):
    """The answers to the rejection questions of a request.

    Source: ``data.analysis`` of ``POST /analyze/ai_vision_moderation``.

    Attributes:
        responses: One answer per question, in the order of the response.
    """

    responses: tuple[ModerationAnswer, ...]

    @property
    def rejected(self) -> bool:
        """Whether the answer to any question is *yes*, ignoring case."""
        return any(response.value.strip().lower() == "yes" for response in self.responses)


@attrs.frozen(repr=False, eq=False)
class VisionTag(Jsonable):
    """A tag whose description fits the image.

    Source: an entry of ``data.analysis.tags`` of ``POST /analyze/ai_vision_tagging``.

    Attributes:
        name: The name of the tag as defined in the request. Empty if not sent.
    """

    name: str = ""


@attrs.frozen(repr=False, eq=False)
class AIVisionTaggingAnalysis(Analysis):
    """The tags of the request that fit the image.

    Source: ``data.analysis`` of ``POST /analyze/ai_vision_tagging``.

    Attributes:
        tags: The tags that fit. Empty if none does.
    """

    tags: tuple[VisionTag, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tags that fit."""
        return tuple([tag.name for tag in self.tags])


@attrs.frozen(repr=False, eq=False)
class CaptioningAnalysis(Analysis):
    """A caption.

    Source: ``data.analysis`` of ``POST /analyze/captioning``.

    Attributes:
        caption: A sentence that describes the image (``data.analysis.data.caption``).
    """

    caption: str


@attrs.frozen(repr=False, eq=False)
class LogoVertex(Jsonable):
    """A corner of the polygon around a logo, in pixels of the image.

    Source: ``bounding_poly.vertices`` of an entry of ``data.analysis.logo_annotations``.

    Attributes:
        x: Pixels from the left edge. 0 if not sent.
        y: Pixels from the top edge. 0 if not sent.
    """

    x: int = 0
    y: int = 0


@attrs.frozen(repr=False, eq=False)
class Logo(Jsonable):
    """A logo in an image.

    Source: an entry of ``data.analysis.logo_annotations`` of ``POST /analyze/google_logo_detection``.

    Attributes:
        description: The name of the brand. Empty if not sent.
        score: The model's confidence, 0 to 1. ``None`` if not sent.
        vertices: The polygon around it: normally four corners, empty if not sent.
        mid: Google's id of the brand, such as ``/m/045c7b``. ``None`` if not sent.
    """

    description: str = ""
    score: float | None = None
    vertices: tuple[LogoVertex, ...] = ()
    mid: str | None = None


@attrs.frozen(repr=False, eq=False)
class GoogleLogoDetectionAnalysis(Analysis):
    """The logos in an image.

    Source: ``data.analysis`` of ``POST /analyze/google_logo_detection``.

    Attributes:
        logos: The logos (``logo_annotations``). Empty if there are none.
    """

    logos: tuple[Logo, ...]


@attrs.frozen(repr=False, eq=False)
class GoogleLabel(Jsonable):
    """A label that fits the image.

    Source: an entry of ``label_annotations.labels`` of ``POST /analyze/google_tagging``.

    Attributes:
        label: The label. Empty if not sent.
        score: The model's confidence, 0 to 1. ``None`` if not sent.
    """

    label: str = ""
    score: float | None = None


@attrs.frozen(repr=False, eq=False)
class GoogleTaggingAnalysis(Analysis):
    """The labels of Google's tagging service.

    Source: ``data.analysis`` of ``POST /analyze/google_tagging``.

    Attributes:
        labels: The labels (``label_annotations.labels``), in the order of the response. May be empty.
    """

    labels: tuple[GoogleLabel, ...] = ()


@attrs.frozen(repr=False, eq=False)
class ImageQualityAnalysis(Analysis):
    """The technical quality of an image.

    Source: ``data.analysis`` of ``POST /analyze/image_quality``.

    Attributes:
        quality: ``"low"``, ``"medium"``, ``"high"``, or any other text as sent. Empty if not sent.
        score: The quality, 0 to 1. ``None`` if not sent.
        confidence: The model's confidence, 0 to 1. ``None`` if not sent.
    """

    quality: str = ""
    score: float | None = None
    confidence: float | None = None


@attrs.frozen(repr=False, eq=False)
class Watermark(Jsonable):
    """A watermark, a banner, or the finding that there is none.

    Source: an entry of ``data.analysis.detections`` of ``POST /analyze/watermark_detection``.

    Attributes:
        name: ``"banner"``, ``"watermark"``, ``"clean"``, or any other text as sent. Empty if not
            sent.
        confidence: The model's confidence, 0 to 1. ``None`` if not sent.
    """

    name: str = ""
    confidence: float | None = None


@attrs.frozen(repr=False, eq=False)
class WatermarkDetectionAnalysis(Analysis):
    """The watermarks and banners in an image.

    Source: ``data.analysis`` of ``POST /analyze/watermark_detection``.

    Attributes:
        detections: What was detected. May be empty.
    """

    detections: tuple[Watermark, ...] = ()


@attrs.frozen(repr=False, eq=False)
class OtherAnalysis(Analysis):
    """The analysis of a model that this package does not know, as received.

    Source: ``data.analysis`` of ``POST /analyze/{model}``.

    Attributes:
        raw: The JSON object ``data.analysis``.
    """

    raw: Mapping[str, Any] = attrs.field(factory=dict, hash=False)
