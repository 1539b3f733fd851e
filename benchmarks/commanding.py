"""Cells of the command line: `run` with its ledger and output, against a bare `session.map`.

Both make the same calls in a process that has imported everything, against a service that answers
after 50 ms. The command reads a file, records each response durably, and writes the results.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.clients import build_session
from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.payloads import build_cloudinary_url, build_image_url, write_urls
from benchmarks.server import run_server

BASELINE: Final = "bare map"
LATENCY: Final = 0.05
PERMITS: Final = 64
MODEL: Final = "captioning"
WARM_UP_ITEMS: Final = 500
MOST_ITEMS: Final = 10_000  # the service allows 1,280 a second
CPU: Final = "CPU µs an item"
WALL: Final = "wall µs an item"

Run = Callable[[str, int], None]


def _run_command(url: str, items: int) -> None:
    from cloudinary_analyze.cli import main

    os.environ["CLOUDINARY_URL"] = build_cloudinary_url(url)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()) as said:
        folder = Path(name)
        write_urls(folder / "input.txt", items)
        files = ("--input", f"{folder}/input.txt", "--output", f"{folder}/results.jsonl")
        sys.argv[1:] = ["run", MODEL, *files, "--permits", str(PERMITS)]
        code = main()  # with the command's tuning of the collector
        assert code == 0, said.getvalue()
        assert (folder / "results.jsonl").read_bytes().count(b"\n") == items


def _run_map(url: str, items: int) -> None:
    asyncio.run(_map(url, items))


async def _map(url: str, items: int) -> None:
    from cloudinary_analyze import Captioning

    seen = 0
    async with build_session(url, permits=PERMITS) as session:
        urls = map(build_image_url, range(items))
        async with session.map(urls, Captioning) as stream:
            async for outcome in stream:
                assert outcome.response is not None
                seen += 1
    assert seen == items


def _measure(run: Run, job: Job, *, wall: bool) -> Samples:
    items = min(job.items, MOST_ITEMS)
    run(job.url, WARM_UP_ITEMS)
    gc.collect()
    cpu, begun = time.process_time(), time.perf_counter()
    run(job.url, items)
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - begun
    figures = {CPU: cpu * 1e6 / items, WALL: seconds * 1e6 / items}
    value = figures.pop(WALL if wall else CPU)
    yield Sample(value=value, notes=figures | {"items": items})


def _build_cell(name: str, unit: str, target: float, *, wall: bool) -> Cell:
    return Cell(
        name=name,
        unit=unit,
        contenders={
            OURS: partial(_measure, _run_command, wall=wall),
            BASELINE: partial(_measure, _run_map, wall=wall),
        },
        baseline=BASELINE,
        targets=(Target(figure="ratio", most=target),),
        prepare=partial(run_server, delay=LATENCY),
    )


CELLS: Final = (
    _build_cell("command-line", "µs CPU an item", 1.6, wall=False),
    _build_cell("command-line-wall", "µs wall an item", 1 / 0.93, wall=True),
)
