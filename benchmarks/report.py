"""Reports results: the table, the JSON, and which targets were missed."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import attrs

from benchmarks.model import Target
from benchmarks.runner import Effort, Result

PACKAGES: Final = (
    "cloudinary-analyze",
    "aiohttp",
    "attrs",
    "cattrs",
    "cloudinary-analysis",
    "httpx",
    "orjson",
    "redis",
    "sniffio",
    "uvloop",
)
BUSY: Final = "server busy %"


def format_result(result: Result) -> str:
    """Return the lines of a cell: a line per contender, a line per target."""
    cell = result.cell
    against = f"; ratios to {cell.baseline}" if len(result.samples) > 1 else ""
    lines = [f"{cell.name}  ({cell.unit}{against})"]
    for contender in result.samples:
        low, high = result.find_range(contender)
        line = (
            f"  {contender:<24}{result.medians[contender]:9.2f}  [{low:.2f} to {high:.2f}]".ljust(
                58
            )
        )
        if contender != cell.baseline:
            ratios = result.list_ratios(contender)
            line += (
                f"{result.compute_ratio(contender):6.2f}x [{min(ratios):.2f} to {max(ratios):.2f}]"
            )
        if (busy := result.find_note(contender, BUSY)) is not None:
            line = f"{line:<84}server {busy:.0f} % busy"
        lines.append(line.rstrip())
    if not cell.sliced:
        noted = [contender for contender in result.samples if result.samples[contender][0].notes]
        lines += [_describe_notes(result, contender) for contender in noted]
    lines += [f"  {rival}: broke, and is left out; stderr says why" for rival in result.broken]
    lines += [f"  {describe_target(result, target)}" for target in cell.targets]
    return "\n".join(lines)


def _describe_notes(result: Result, contender: str) -> str:
    notes = result.samples[contender][0].notes
    medians = (f"{note} {result.find_note(contender, note):,.4g}" for note in notes)
    return f"  {contender}: {', '.join(medians)}"


def is_kept(result: Result, target: Target) -> bool:
    """Whether a target was met, or missed by no more than noise."""
    return result.compute_figure(target) <= target.most + target.noise


def describe_target(result: Result, target: Target) -> str:
    """Return a line that states whether a target was met."""
    figure = result.compute_figure(target)
    unit = {
        "ratio": "x",
        "excess": f" {result.cell.unit}",
        "value": f" {result.cell.unit}",
        "note": "",
    }[target.figure]
    name = {"ratio": "ratio", "excess": "its own", "value": "", "note": target.note}[target.figure]
    verdict = "MISSED"
    if is_kept(result, target):
        verdict = "kept" if figure <= target.most else "missed within the noise"
    limit = f"{target.most:g}{unit}"
    if target.noise:
        limit += f", and {target.noise:g} for noise"
    return f"target {verdict}: {f'{name} {figure:.2f}'.lstrip()}{unit}, at most {limit}"


def find_caveats(results: list[Result]) -> list[str]:
    """Return the facts about this environment that a reader of the results needs."""
    on_httpx = {"httpx + orjson", "vendor's SDK"}
    if _find_version("sniffio") is None and any(
        on_httpx & set(result.samples) for result in results
    ):
        caveat = (
            "sniffio is not installed. httpx then tries to import it again and again, which makes "
            "httpx and the vendor's SDK look worse than they are; install it and repeat."
        )
        return [caveat]
    return []


def build_document(results: list[Result], effort: Effort) -> dict[str, Any]:
    """Return everything that was measured, as values for JSON."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "packages": {name: _find_version(name) for name in PACKAGES},
        "effort": attrs.asdict(effort),
        "caveats": find_caveats(results),
        "cells": {result.cell.name: _build_cell_document(result) for result in results},
    }


def _build_cell_document(result: Result) -> dict[str, Any]:
    cell = result.cell
    return {
        "unit": cell.unit,
        "baseline": cell.baseline,
        "broken": list(result.broken),
        "contenders": {
            contender: {
                "median": result.medians[contender],
                "ratio": result.compute_ratio(contender),
                "ratios": result.list_ratios(contender),
                "samples": [attrs.asdict(sample) for sample in samples],
            }
            for contender, samples in result.samples.items()
        },
        "targets": [
            {
                **attrs.asdict(target),
                "reached": result.compute_figure(target),
                "kept": is_kept(result, target),
            }
            for target in cell.targets
        ],
    }


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
