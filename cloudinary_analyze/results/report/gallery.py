"""The images that the page shows, each with its findings, ready to be embedded.

Pure. Bounded: images are added in the order of their first result until the gallery is full.
Failures have reserved space, so that those at the end of a long run are also shown.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from cloudinary_analyze.results.findings import Findings, Mark, read_number
from cloudinary_analyze.results.statistics import get_error, name_cause, name_model

MOST_PICTURES: Final = 100_000
MOST_BYTES: Final = 64 * 2**20  # of embedded results
MOST_FAILURES: Final = 16 * 2**20  # bytes of embedded failures, besides
MOST_DRAWINGS: Final = 4 * 2**20  # bytes of embedded pictures, besides
_MOST_RESULTS: Final = 32  # of one picture
_MOST_MARKS: Final = 200  # of one result
_MOST_ANSWERS: Final = 20
_LONGEST_TEXT: Final = 2_000  # characters
_LONGEST_URL: Final = 8_000
# beyond the first half of the bytes, results are shortened, so that more of them are shown
_FEW_MARKS: Final = 6
_SHORT_TEXT: Final = 200
_LOCAL_GALLERY: Final = re.compile(
    r"http://(?:127(?:\.\d+){3}|localhost|\[::1\])(?::\d+)?/samples/(\w+\.png)"
)


@attrs.define(eq=False)
class Picture:
    """A source, and its results by request key: their positions in the run, and their JSON."""

    head: str
    results: dict[str, tuple[int, str]] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Gallery:
    """The pictures, in the order of the input.

    Attributes:
        most_pictures: The maximum number of images, without those of failures.
        left_out: The number of results that are not shown.
        complete_failures: Whether every failure is shown.
        shortened: Whether results are shortened.
    """

    most_pictures: int = MOST_PICTURES
    left_out: int = attrs.field(default=0, init=False)
    complete_failures: bool = attrs.field(default=True, init=False)
    shortened: bool = attrs.field(default=False, init=False)
    _pictures: dict[str, Picture] = attrs.field(factory=dict, init=False)
    _size: int = attrs.field(default=0, init=False)
    _failures: int = attrs.field(default=0, init=False)
    _drawings: int = attrs.field(default=0, init=False)

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, record: Mapping[str, Any], findings: Findings) -> None:
        """Add a result, if there is space. A later response to a request replaces its failure."""
        source = str(record.get("source") or "")
        picture = self._pictures.get(source)
        failed = record["status"] != "ok"
        if not self._has_room(picture, failed=failed):
            self.left_out += 1
            self.complete_failures &= not failed
            return
        size = 0
        if picture is None:
            drawing = self._draw(source)
            picture = self._pictures[source] = Picture(
                _build_head(source, record.get("line"), drawing)
            )
            size = len(picture.head) - len(drawing or "")
        key = str(record.get("key") or f"#{record.get('index')}")
        if key in picture.results and failed:
            return
        short = self._size >= MOST_BYTES // 2
        index, result = (
            record.get("index"),
            embed_json(_build_result(record, findings, short=short)),
        )
        self.shortened |= short
        picture.results[key] = (index if isinstance(index, int) else 0, result)
        size += len(result)
        if failed:
            self._failures += size
        else:
            self._size += size

    def _has_room(self, picture: Picture | None, *, failed: bool) -> bool:
        if picture is not None and len(picture.results) >= _MOST_RESULTS:
            return False
        if failed:
            return self._failures < MOST_FAILURES
        return self._size < MOST_BYTES and (
            picture is not None or len(self._pictures) < self.most_pictures
        )

    def _draw(self, source: str) -> str | None:
        """Return an image of an emulator's gallery on this machine, whose URL may no longer work."""
        known = _LOCAL_GALLERY.fullmatch(source)
        if known is None:
            return None
        # not at the top: the emulator imports aiohttp
        from cloudinary_analyze.emulator.gallery import read_picture_number, render_picture

        number = read_picture_number(known[1])
        if number is None or self._drawings >= MOST_DRAWINGS:
            return None
        drawing = base64.b64encode(render_picture(number)).decode()
        self._drawings += len(drawing)
        return f"data:image/png;base64,{drawing}"

    def dump(self) -> Iterator[str]:
        """Yield the JSON of each picture, safe inside a ``<script>`` element."""
        for picture in sorted(self._pictures.values(), key=lambda each: min(each.results.values())):
            results = ",".join(result for _, result in sorted(picture.results.values()))
            yield f'{picture.head[:-1]},"results":[{results}]}}'


def find_address(source: str) -> str | None:
    """Return the URL of an image that a browser may open. ``None`` unless it is http(s)."""
    scheme, separator, rest = source.partition("://")
    if separator and rest and scheme.lower() in {"http", "https"} and len(source) <= _LONGEST_URL:
        return source
    return None


def embed_json(value: Any) -> str:
    """Return JSON that stays data inside a ``<script>``: ASCII without ``<``, ``>`` and ``&``."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _build_head(source: str, line: Any, drawing: str | None) -> str:
    return embed_json(
        {
            "source": source[:_LONGEST_URL],
            "url": drawing or find_address(source),
            "line": line if isinstance(line, int) else None,
        }
    )


def _build_result(record: Mapping[str, Any], findings: Findings, *, short: bool) -> dict[str, Any]:
    marks = findings.marks[: _FEW_MARKS if short else _MOST_MARKS]
    result: dict[str, Any] = {
        "model": name_model(record),
        "ok": record["status"] == "ok",
        "seconds": read_number(record.get("seconds")),
        "request": None if short else _cut(record.get("request_id")),
        "caption": _cut(findings.caption),
        "marks": [_build_mark(mark) for mark in marks] or None,
        "more": len(findings.marks) - len(marks) or None,
        "answers": [
            [_cut(answer.value), _cut(answer.question), answer.verdict]
            for answer in findings.answers[:_MOST_ANSWERS]
        ]
        or None,
        "rejected": findings.rejected,
        "rest": _cut(findings.rest, _SHORT_TEXT if short else _LONGEST_TEXT),
    }
    if findings.quality is not None:
        result["quality"] = [_cut(findings.quality.level), findings.quality.score]
    if not result["ok"]:
        error = get_error(record)
        result["error"] = {
            "cause": name_cause(record),
            "message": _cut(error.get("message")),
            "charged": error.get("ambiguous") is True,
        }
    return {name: value for name, value in result.items() if value is not None}


def _build_mark(mark: Mark) -> list[Any]:
    """Return label, score, box and note, without missing values at the end."""
    score = None if mark.score is None else round(mark.score, 4)
    box = None if mark.box is None else [round(number, 2) for number in mark.box]
    entry = [_cut(mark.label), score, box, _cut(mark.note) or None]
    while len(entry) > 1 and entry[-1] is None:
        entry.pop()
    return entry


def _cut(value: Any, most: int = _LONGEST_TEXT) -> str | None:
    if value is None:
        return None
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}…"
