"""The findings of an analysis, in the forms that a page or a table can show.

Pure. The shape of the raw ``data.analysis`` decides, not the model, so that future models are shown
as well as possible. Nothing here raises, whatever was recorded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from cloudinary_analyze._wire import codec
from cloudinary_analyze.analyses import Detection, read_detections

Box = tuple[float, float, float, float]

_VERSION: Final = "model_version"


@attrs.frozen
class Mark:
    """A label in an image, with or without a position.

    Attributes:
        label: The label.
        score: The model's confidence, 0 to 1.
        box: Left, top, width and height, in pixels of the analyzed image.
        note: Further information, as text.
    """

    label: str
    score: float | None = None
    box: Box | None = None
    note: str = ""


@attrs.frozen
class Answer:
    """An answer of a vision model.

    Attributes:
        value: The answer.
        question: The rejection question. ``None`` for free prompts, which responses do not repeat.
    """

    value: str
    question: str | None = None

    @property
    def verdict(self) -> str | None:
        """``yes``, ``no`` or ``unknown`` for a rejection question. ``None`` for a free prompt."""
        if self.question is None:
            return None
        value = self.value.strip().lower()
        return value if value in {"yes", "no"} else "unknown"


@attrs.frozen
class Quality:
    """The technical quality of an image."""

    level: str
    score: float | None = None


@attrs.frozen
class Findings:
    """The findings of one analysis.

    Attributes:
        caption: The caption.
        marks: The labels, highest score first.
        answers: The answers, in the order of the prompts.
        quality: The quality of the image.
        rest: The analysis as JSON, if it has none of the known forms.
    """

    caption: str | None = None
    marks: tuple[Mark, ...] = ()
    answers: tuple[Answer, ...] = ()
    quality: Quality | None = None
    rest: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Each label once, highest score first."""
        return tuple(dict.fromkeys(mark.label for mark in self.marks))

    @property
    def rejected(self) -> bool | None:
        """Whether a rejection question was answered with yes. ``None`` if there was none."""
        verdicts = [answer.verdict for answer in self.answers if answer.verdict]
        return "yes" in verdicts if verdicts else None


NOTHING: Final = Findings()


def read_findings(analysis: Any) -> Findings:
    """Return the findings of an analysis.

    Args:
        analysis: The recorded ``data.analysis``. ``None``: there are no findings.
    """
    if analysis is None:
        return NOTHING
    if not isinstance(analysis, Mapping):
        return Findings(rest=_dump(analysis))
    marks = sorted(_read_marks(analysis), key=lambda mark: -(mark.score or 0))
    findings = Findings(
        caption=_text(_get(analysis.get("data"), "caption")),
        marks=tuple(marks),
        answers=tuple(_read_answers(analysis.get("responses"))),
        quality=_read_quality(analysis),
    )
    known = {"tags", "responses", "label_annotations", "logo_annotations", "detections", _VERSION}
    if findings == NOTHING and not known.issuperset(analysis):
        return Findings(rest=_dump(analysis))
    return findings


def read_number(value: Any) -> float | None:
    """Return a finite number as a float. ``None`` for every other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _read_marks(analysis: Mapping[str, Any]) -> Iterator[Mark]:
    tags = analysis.get("tags")
    if isinstance(tags, Mapping):
        for label, entries in tags.items():
            listed = entries if isinstance(entries, list) else [entries]
            yield from map(_read_detection, read_detections(str(label), listed))
    yield from _read_named(tags, "name", "confidence")
    yield from _read_named(analysis.get("detections"), "name", "confidence")
    yield from _read_named(_get(analysis.get("label_annotations"), "labels"), "label", "score")
    yield from _read_named(analysis.get("logo_annotations"), "description", "score")


def _read_detection(detection: Detection) -> Mark:
    box = detection.bounding_box
    corners = () if box is None else (box.x, box.y, box.width, box.height)
    note = ", ".join(
        f"{name}: {values[0].value}" for name, values in detection.attributes.items() if values
    )
    return Mark(detection.label, read_number(detection.confidence), _build_box(corners), note)


def _read_named(entries: Any, name: str, score: str) -> Iterator[Mark]:
    for entry in entries if isinstance(entries, list) else ():
        label = _text(_get(entry, name))
        if label is not None:
            box = _surround(_get(entry.get("bounding_poly"), "vertices"))
            yield Mark(label, read_number(entry.get(score)), box)


def _surround(vertices: Any) -> Box | None:
    """Return the box around a polygon. A missing coordinate is 0."""
    if not isinstance(vertices, list) or len(vertices) < 2:
        return None
    across = [read_number(_get(vertex, "x")) or 0.0 for vertex in vertices]
    down = [read_number(_get(vertex, "y")) or 0.0 for vertex in vertices]
    left, top = min(across), min(down)
    return _build_box((left, top, max(across) - left, max(down) - top))


def _build_box(corners: tuple[float, ...]) -> Box | None:
    numbers = [read_number(corner) for corner in corners]
    x, y, width, height = numbers if len(numbers) == 4 else (None,) * 4
    if x is None or y is None or not width or not height or width < 0 or height < 0:
        return None
    return x, y, width, height


def _read_answers(responses: Any) -> Iterator[Answer]:
    for response in responses if isinstance(responses, list) else ():
        value = _get(response, "value")
        if value is not None:
            text = value if isinstance(value, str) else _dump(value)
            yield Answer(text, _text(_get(response, "prompt")))


def _read_quality(analysis: Mapping[str, Any]) -> Quality | None:
    level = _text(analysis.get("quality"))
    return None if level is None else Quality(level, read_number(analysis.get("score")))


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return codec.dumps(value).decode()
