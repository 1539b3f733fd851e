"""Cells of decoding alone: the bytes of a 200 to the value the caller works with."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from benchmarks.clients import read_typed_detections
from benchmarks.model import OURS, Cell, Job, Sample, Samples
from benchmarks.payloads import ANSWERS, build_image_url, read_plain_detections

BASELINE: Final = "orjson"
BATCH: Final = 100

Decode = Callable[[bytes], object]


def _build_ours(model: str, *, read: bool) -> Decode:
    from cloudinary_analyze import AnalyzeRequest, Captioning, Coco
    from cloudinary_analyze._wire.protocol import read_response

    coco = Coco(build_image_url(1))
    request: AnalyzeRequest[Any] = Captioning(build_image_url(1)) if model == "captioning" else coco
    if read:
        return lambda body: read_typed_detections(read_response(coco, body).analysis)
    return lambda body: read_response(request, body)


def _build_orjson(model: str, *, read: bool) -> Decode:
    from orjson import loads

    return (lambda body: read_plain_detections(loads(body))) if read else loads


def _build_json(model: str, *, read: bool) -> Decode:
    return (lambda body: read_plain_detections(json.loads(body))) if read else json.loads


def _build_vendor(model: str, *, read: bool) -> Decode:
    from cloudinary_analysis import models, utils

    kind = getattr(models, f"Analyze{model.capitalize()}Response")
    return lambda body: utils.unmarshal_json(body.decode(), kind)


def _measure(
    build: Callable[..., Decode],
    job: Job,
    *,
    model: str,
    read: bool,
) -> Samples:
    decode = build(model, read=read)
    body = ANSWERS[model]
    for _ in range(BATCH):
        decode(body)
    gc.collect()
    while True:
        done = 0
        until = time.perf_counter() + job.seconds
        cpu = time.process_time()
        while time.perf_counter() < until:
            for _ in range(BATCH):
                decode(body)
            done += BATCH
        yield Sample(value=(time.process_time() - cpu) * 1e6 / done)


def _build_cells() -> Iterator[Cell]:
    builders: dict[str, Callable[..., Decode]] = {
        OURS: _build_ours,
        BASELINE: _build_orjson,
        "json": _build_json,
        "vendor's SDK": _build_vendor,
    }
    for name, model, read in (
        ("decode-captioning", "captioning", False),
        ("decode-coco50", "coco", False),
        ("decode-coco50-read", "coco", True),
    ):
        yield Cell(
            name=name,
            unit="µs CPU a body",
            contenders={
                contender: partial(_measure, build, model=model, read=read)
                for contender, build in builders.items()
                if not (read and "vendor" in contender)
            },
            baseline=BASELINE,
            sliced=True,
        )


CELLS: Final = tuple(_build_cells())
