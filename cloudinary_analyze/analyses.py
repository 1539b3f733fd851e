"""One typed analysis per model, flat: ``analysis.caption``, not ``analysis.data.caption``.

Values only. `_wire.structure` fills them, and maps the service's names. Detections are read from
the raw JSON on first access, because most callers look at few of them; reading one never raises,
whatever the service sent, and its ``raw`` keeps what was sent.

Source: the 200 responses of ``POST /analyze/{model}`` of the Analyze API.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import attrs

from cloudinary_analyze._values import Jsonable

ModelVersion = int | str | float | None


# a tuple is made in a third of the time, and every detection of every picture has one
class BoundingBox(NamedTuple):
    """A rectangle on the analysed image, in its pixels, origin at the top left.

    A named tuple: unpacks as ``x, y, width, height = box``, is an array in JSON, changes with
    ``box._replace(…)``.

    Attributes:
        x: Left edge.
        y: Top edge.
        width: Extent to the right.
        height: Extent downwards.
    """

    x: float
    y: float
    width: float
    height: float


@attrs.frozen(repr=False)
class AttributeValue(Jsonable):
    """One value of a garment's attribute, such as ``midi`` for ``skirt length``.

    Attributes:
        value: The value.
        score: How sure the model is, 0 to 1; ``None`` if not sent.
    """

    value: str
    score: float | None = None


@attrs.frozen(repr=False)
class Detection(Jsonable):
    """One found instance of a label.

    Attributes:
        label: What it is.
        confidence: 0 to 1; ``None`` if not sent.
        bounding_box: Where it is; ``None`` if not sent (classifiers send none).
        raw: The JSON as received.
    """

    label: str
    confidence: float | None
    bounding_box: BoundingBox | None
    raw: Any = attrs.field(repr=False, hash=False)

    @property
    def categories(self) -> tuple[str, ...]:
        """Wider groups of the label; often empty."""
        raw = self.raw.get("categories") if isinstance(self.raw, dict) else None
        return tuple(map(str, raw)) if isinstance(raw, list) else ()

    @property
    def attributes(self) -> Mapping[str, tuple[AttributeValue, ...]]:
        """What the fashion model says of a garment: attribute name to values, best first."""
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


_new_tuple: Final = tuple.__new__  # without a separate frame


def read_detection(label: str, raw: Any) -> Detection:
    """Read one instance; what is missing or of another shape is ``None`` or empty."""
    if type(raw) is not dict:
        return Detection(label, None, None, raw)
    confidence = raw.get("confidence")
    if type(confidence) is not float and type(confidence) is not int:
        confidence = None
    box = None
    corners = raw.get("bounding-box")
    if type(corners) is list and len(corners) == 4:
        x, y, width, height = corners
        # spelled out, because every detection of every picture comes through here
        if (
            (type(x) is float or type(x) is int)
            and (type(y) is float or type(y) is int)
            and (type(width) is float or type(width) is int)
            and (type(height) is float or type(height) is int)
        ):
            box = _new_tuple(BoundingBox, corners)
    return Detection(label, confidence, box, raw)


class DetectedTags(Mapping[str, tuple[Detection, ...]]):
    """Label to found instances, read from the raw JSON when a label is first looked at.

    A label whose value is not an array is kept in `raw` and has no instances.
    """

    __slots__ = ("_read", "raw")

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw: Mapping[str, Any] = raw
        self._read: dict[str, tuple[Detection, ...]] = {}

    def __getitem__(self, label: str) -> tuple[Detection, ...]:
        found = self._read.get(label)
        if found is None:
            raw = self.raw[label]
            found = (
                tuple([read_detection(label, entry) for entry in raw]) if type(raw) is list else ()
            )
            self._read[label] = found
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


@attrs.frozen(kw_only=True, repr=False)
class Analysis(Jsonable):
    """What every analysis has.

    Attributes:
        model_version: The version of the model, as sent; ``None`` if not sent.
    """

    model_version: ModelVersion = None


@attrs.frozen(repr=False)
class DetectionAnalysis(Analysis):
    """What the models that detect or classify have in common.

    Attributes:
        tags: Label to found instances: ``analysis.tags["person"][0].bounding_box``.
    """

    tags: DetectedTags = attrs.field(factory=lambda: DetectedTags({}))

    @property
    def detections(self) -> tuple[Detection, ...]:
        """All found instances, label by label."""
        return tuple([found for label in self.tags for found in self.tags[label]])


# Subclasses without fields skip `@attrs.frozen`: decorating each one adds 0.2 ms to import time.
class CldFashionAnalysis(DetectionAnalysis):
    """Garments, with `Detection.attributes`. Model ``cld_fashion``."""

    __slots__ = ()


class CldTextAnalysis(DetectionAnalysis):
    """Blocks of text: where, not what. Model ``cld_text``."""

    __slots__ = ()


class CocoAnalysis(DetectionAnalysis):
    """80 common objects. Model ``coco``."""

    __slots__ = ()


class HumanAnatomyAnalysis(DetectionAnalysis):
    """Parts of the human body. Model ``human_anatomy``."""

    __slots__ = ()


class LvisAnalysis(DetectionAnalysis):
    """Thousands of everyday objects. Model ``lvis``."""

    __slots__ = ()


class ShopClassifierAnalysis(DetectionAnalysis):
    """Whether a product picture was taken in a studio. Model ``shop_classifier``."""

    __slots__ = ()


class UnidetAnalysis(DetectionAnalysis):
    """Objects of several datasets united. Model ``unidet``."""

    __slots__ = ()


@attrs.frozen(repr=False)
class VisionAnswer(Jsonable):
    """The answer to one prompt.

    Attributes:
        value: The answer's text; empty if it was not sent.
    """

    value: str = ""


@attrs.frozen(repr=False)
class AIVisionGeneralAnalysis(Analysis):
    """Answers to prompts, as many and in the order of the prompts. Model ``ai_vision_general``."""

    responses: tuple[VisionAnswer, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers' texts."""
        return tuple([response.value for response in self.responses])


@attrs.frozen(repr=False)
class ModerationAnswer(Jsonable):
    """The answer to one rejection question.

    Attributes:
        value: ``"yes"``, ``"no"``, ``"unknown"``, or any other text as sent; empty if it was not
            sent.
        prompt: The question; ``None`` if it was not sent.
    """

    value: str = ""
    prompt: str | None = None


@attrs.frozen(repr=False)
class AIVisionModerationAnalysis(Analysis):
    """Answers to rejection questions. Model ``ai_vision_moderation``."""

    responses: tuple[ModerationAnswer, ...]

    @property
    def rejected(self) -> bool:
        """Whether any question was answered with yes."""
        return any(response.value.strip().lower() == "yes" for response in self.responses)


@attrs.frozen(repr=False)
class VisionTag(Jsonable):
    """A tag whose description fits the image.

    Attributes:
        name: The tag's name, as defined in the request; empty if it was not sent.
    """

    name: str = ""


@attrs.frozen(repr=False)
class AIVisionTaggingAnalysis(Analysis):
    """The defined tags that fit; empty if none does. Model ``ai_vision_tagging``."""

    tags: tuple[VisionTag, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tags' names."""
        return tuple([tag.name for tag in self.tags])


@attrs.frozen(repr=False)
class CaptioningAnalysis(Analysis):
    """A sentence on what the image shows. Model ``captioning``."""

    caption: str


@attrs.frozen(repr=False)
class LogoVertex(Jsonable):
    """A corner of the polygon around a logo, in pixels; what is not sent is 0."""

    x: int = 0
    y: int = 0


@attrs.frozen(repr=False)
class Logo(Jsonable):
    """A logo that was found.

    Attributes:
        description: The name of the brand; empty if it was not sent.
        score: 0 to 1; ``None`` if not sent.
        vertices: The polygon around it, normally four corners; may be empty.
        mid: Google's id of it, if sent.
    """

    description: str = ""
    score: float | None = None
    vertices: tuple[LogoVertex, ...] = ()
    mid: str | None = None


@attrs.frozen(repr=False)
class GoogleLogoDetectionAnalysis(Analysis):
    """Logos of known products. Model ``google_logo_detection``."""

    logos: tuple[Logo, ...]


@attrs.frozen(repr=False)
class GoogleLabel(Jsonable):
    """A label that fits the image.

    Attributes:
        label: The label; empty if it was not sent.
        score: 0 to 1; ``None`` if not sent.
    """

    label: str = ""
    score: float | None = None


@attrs.frozen(repr=False)
class GoogleTaggingAnalysis(Analysis):
    """Labels by Google's tagging service; may be empty. Model ``google_tagging``."""

    labels: tuple[GoogleLabel, ...] = ()


@attrs.frozen(repr=False)
class ImageQualityAnalysis(Analysis):
    """How good the picture is, technically. Model ``image_quality``.

    Attributes:
        quality: ``"low"``, ``"medium"``, ``"high"``, or any other text as sent; empty if it was
            not sent.
        score: 0 to 1; ``None`` if not sent.
        confidence: 0 to 1; ``None`` if not sent.
    """

    quality: str = ""
    score: float | None = None
    confidence: float | None = None


@attrs.frozen(repr=False)
class Watermark(Jsonable):
    """What was found in place of a watermark.

    Attributes:
        name: ``"banner"``, ``"watermark"``, ``"clean"``, or any other text as sent; empty if it
            was not sent.
        confidence: 0 to 1; ``None`` if not sent.
    """

    name: str = ""
    confidence: float | None = None


@attrs.frozen(repr=False)
class WatermarkDetectionAnalysis(Analysis):
    """Watermarks and banners; may be empty. Model ``watermark_detection``."""

    detections: tuple[Watermark, ...] = ()


@attrs.frozen(repr=False)
class OtherAnalysis(Analysis):
    """The analysis of a model that this package does not know, as received.

    Attributes:
        raw: The ``data.analysis`` object.
    """

    raw: Mapping[str, Any] = attrs.field(factory=dict, hash=False)
