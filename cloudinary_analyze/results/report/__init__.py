"""The HTML report of a run: one file with the images, the findings and the statistics.

The page contains its data, style and script. It fetches only the images, and its content security
policy forbids everything else. Needs the [report] extra.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from datetime import datetime
from importlib import resources
from io import TextIOWrapper
from typing import Any, Final

import attrs

from cloudinary_analyze.errors import ConfigurationError
from cloudinary_analyze.results.files import open_replacement, read_records
from cloudinary_analyze.results.findings import NOTHING, read_findings
from cloudinary_analyze.results.report.gallery import MOST_PICTURES, Gallery
from cloudinary_analyze.results.statistics import BAD_LINES, Statistics, build_axis, format_seconds

__all__ = ["MOST_PICTURES", "WrittenReport", "write_report"]

DEFAULT_TITLE: Final = "Image analysis"
_SHOWN_LABELS: Final = 20
_OFFERED_LABELS: Final = 500
_TONES: Final = {"low": "bad", "medium": "soft", "high": "good"}


@attrs.frozen
class WrittenReport:
    """The contents of a report.

    Attributes:
        results: The number of results that its statistics cover.
        pictures: The number of images that it shows.
        bad_lines: The number of lines that were not records and were skipped. The page shows it,
            too.
    """

    results: int
    pictures: int
    bad_lines: int


def write_report(
    lines: Iterable[bytes | str],
    output: str | os.PathLike[str],
    *,
    title: str = DEFAULT_TITLE,
    source: str | None = None,
    made: datetime | None = None,
) -> WrittenReport:
    """Write the HTML report of a run.

    The statistics cover all lines. The gallery shows the first `MOST_PICTURES` images, fewer if
    their results are long, and all failures. The page states what it leaves out. Memory is bounded
    for any number of lines. The page contains source URLs in full, query strings included. Images
    of a local emulator's gallery are embedded.

    Args:
        lines: The lines of ``results.jsonl``, such as a file opened in binary mode.
        output: The HTML file. It is replaced only once the new file is complete.
        title: The heading of the page.
        source: The origin of the items, such as the name of the input file. Default: not shown.
        made: The date of the page. Default: now.

    Returns:
        The counts of what was written.

    Raises:
        ConfigurationError: None of the lines is a record, or the [report] extra is missing.
        OSError: The file cannot be written.
    """
    template = _load_template()
    statistics, gallery = Statistics(), Gallery()
    bad_lines: list[int] = []
    for record in read_records(lines, on_bad_line=bad_lines.append):
        answered = record["status"] == "ok"
        findings = read_findings(record.get("analysis")) if answered else NOTHING
        statistics.add(record, findings)
        gallery.add(record, findings)
    if bad_lines and not statistics.total:
        raise ConfigurationError("None of the lines is a record of a run.")
    with open_replacement(output) as stream:
        # half a surrogate pair, which JSON can hold, has no UTF-8
        text = TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="\n")
        context = _build_context(statistics, gallery, len(bad_lines))
        context |= {"title": title, "source": source, "made": made or datetime.now().astimezone()}
        for part in template.generate(context):
            text.write(part)
        text.detach()
    return WrittenReport(statistics.total, len(gallery), len(bad_lines))


def _load_template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The report needs the package {error.name}, which is not installed: "
            "pip install 'cloudinary-analyze[report]'"
        ) from None
    environment = Environment(
        loader=PackageLoader("cloudinary_analyze.results.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = format_seconds
    return environment.get_template("report.html")


def _build_context(statistics: Statistics, gallery: Gallery, bad_lines: int) -> dict[str, Any]:
    style, script = _read_asset("report.css"), _read_asset("report.js")
    labels = statistics.labels.most_common(_OFFERED_LABELS)
    order = [*_TONES, *statistics.qualities]
    qualities = sorted(statistics.qualities.items(), key=lambda entry: order.index(entry[0]))
    return {
        "statistics": statistics,
        "models": [name for name in statistics.models if name != BAD_LINES],
        "axis": build_axis([model.durations for model in statistics.models.values()]),
        "labels": labels[:_SHOWN_LABELS],
        "offered": [label for label, _ in labels],
        "qualities": [(level, count, _TONES.get(level, "soft")) for level, count in qualities],
        "causes": sorted(statistics.causes.items(), key=lambda entry: -entry[1].count),
        "pictures": len(gallery),
        "left_out": gallery.left_out,
        "complete_failures": gallery.complete_failures,
        "shortened": gallery.shortened,
        "bad_lines": bad_lines,
        # marked as safe in the template: our own files, and escaped JSON
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "data": gallery.dump(),
    }


def _read_asset(name: str) -> str:
    return resources.files(__name__).joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash of an inline element for the content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
