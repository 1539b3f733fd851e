"""The canned responses, and plain code that reads them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

CLOUD: Final = "emulator-benchmarks"
API_KEY: Final = "key"
API_SECRET: Final = "secret"

DETECTIONS: Final = 50
_LABELS: Final = ("person", "car", "dog", "chair", "bottle", "cup", "traffic light", "handbag")


def build_image_url(number: int) -> str:
    """Return a URL that differs from call to call, as in real use."""
    return f"https://res.cloudinary.com/demo/image/upload/v1/folder/{number}.jpg"


def write_urls(path: Path, count: int) -> None:
    """Write the input of a command: one URL a line."""
    path.write_text("".join(f"{build_image_url(number)}\n" for number in range(count)))


def build_cloudinary_url(url: str) -> str:
    """Return the ``CLOUDINARY_URL`` of the server at `url`."""
    return f"cloudinary://{API_KEY}:{API_SECRET}@{CLOUD}?upload_prefix={url}"


def build_task_id(number: int) -> str:
    """Return the id of a task: 160 hexadecimal digits in any order, like the service's."""
    return hashlib.shake_256(str(number).encode()).hexdigest(80)


def _build_answer(analysis: dict[str, Any]) -> bytes:
    answer = {
        "limits": {
            "addons_quota": [
                {
                    "type": "object_detection",
                    "used_by_request": 1,
                    "remaining": 499,
                    "limit": 500,
                }
            ]
        },
        "request_id": "17c3b70c5096df0e77e838323abb7029",
        "data": {"entity": build_image_url(1), "analysis": analysis},
    }
    return json.dumps(answer, separators=(",", ":")).encode()


def _build_coco() -> dict[str, Any]:
    tags: dict[str, list[dict[str, Any]]] = {}
    for number in range(DETECTIONS):
        label = _LABELS[number % len(_LABELS)]
        tags.setdefault(label, []).append(
            {
                "bounding-box": [
                    12.25 + 7 * number,
                    30.5 + 3 * number,
                    161.75 + number,
                    389.5 - number,
                ],
                "categories": ["object"],
                "confidence": round(0.9912 - number / 100, 4),
            }
        )
    return {"tags": tags, "model_version": 1}


ANSWERS: Final = {
    "captioning": _build_answer(
        {
            "data": {
                "caption": "A white and tan sneaker with pink accents floats in the foreground "
                "against a solid pink background."
            },
            "model_version": 4,
        }
    ),
    "coco": _build_answer(_build_coco()),
}


def read_plain_detections(answer: Any) -> float:
    """Read label, confidence and box of every detection of a parsed response."""
    total = 0.0
    for label, entries in answer["data"]["analysis"]["tags"].items():
        for entry in entries:
            x, y, width, height = entry["bounding-box"]
            total += len(label) + entry["confidence"] + x + y + width + height
    return total
