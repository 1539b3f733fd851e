"""What an analysis says, in the few forms that a page or a table can show.

Pure. Goes by the shape of the raw ``data.analysis`` and not by the model, so that a model that
does not exist yet is shown as well as possible; nothing raises, whatever was recorded.
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
    """A label that was found, with or without a place.

    Attributes:
        label: What it is.
        score: How sure the model is, 0 to 1.
        box: Left, top, width, height in pixels of the analysed image.
        note: What else was said of it, for people.
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
        question: The rejection question; ``None`` for free prompts, which are not echoed.
    """

    value: str
    question: str | None = None

    @property
    def verdict(self) -> str | None:
        """``yes``, ``no`` or ``unknown`` to a rejection question; ``None`` for a free prompt."""
        if self.question is None:
            return None
        value = self.value.strip().lower()
        return value if value in {"yes", "no"} else "unknown"


@attrs.frozen
class Quality:
    """How good the picture is, technically."""

    level: str
    score: float | None = None


@attrs.frozen
class Findings:
    """What one analysis says.

    Attributes:
        caption: A sentence on the picture.
        marks: Labels, the surest first.
        answers: In the order of the prompts.
        quality: The picture's quality.
        rest: The analysis as JSON, if it has none of the known forms.
    """

    caption: str | None = None
    marks: tuple[Mark, ...] = ()
    answers: tuple[Answer, ...] = ()
    quality: Quality | None = None
    rest: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The different labels, the surest first."""
        return tuple(dict.fromkeys(mark.label for mark in self.marks))

    @property
    def rejected(self) -> bool | None:
        """Whether a rejection question was answered with yes; ``None`` if none was asked."""
        verdicts = [answer.verdict for answer in self.answers if answer.verdict]
        return "yes" in verdicts if verdicts else None


NOTHING: Final = Findings()


def read_findings(analysis: Any) -> Findings:
    """Return what an analysis says.

    Args:
        analysis: ``data.analysis`` as recorded; ``None`` says nothing.
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
    """Return a finite number as a float; ``None`` for everything else."""
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
    """Return the box around a polygon; a coordinate that is not sent is 0."""
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
