"""Cells of `map`: the cost of the stream per item, and whether its memory is constant.

A coroutine that costs nothing replaces the call. The rest is compared with a hand-written loop. If
the coroutine returns at once, that is one task that calls it item by item. If it waits for a turn
of the event loop, that is a pool of tasks over a shared iterator.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from benchmarks.memory import read_peak_memory
from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.payloads import ANSWERS, build_image_url

BASELINE: Final = "bare loop"
WINDOW: Final = 128
WARM_UP_ITEMS: Final = 10_000
GROWTH: Final = "memory growth MiB"

Perform = Callable[[Any], Awaitable[Any]]


def _build_perform(*, switch: bool) -> Perform:
    from cloudinary_analyze import Captioning, Response
    from cloudinary_analyze._wire.protocol import read_response

    response: Response[Any] = read_response(Captioning(build_image_url(1)), ANSWERS["captioning"])

    async def perform(_: Any) -> Any:
        return response

    async def perform_with_switch(_: Any) -> Any:
        await asyncio.sleep(0)
        return response

    return perform_with_switch if switch else perform


async def _stream(items: int, perform: Perform, *, ordered: bool) -> None:
    from cloudinary_analyze import Captioning, OutcomeStream, Settings
    from cloudinary_analyze._clock import SYSTEM_CLOCK

    stream = OutcomeStream(
        map(build_image_url, range(items)),
        Captioning,
        perform,
        settings=Settings(),
        clock=SYSTEM_CLOCK,
        window=WINDOW,
        ordered=ordered,
    )
    seen = 0
    async with stream:
        async for outcome in stream:
            assert outcome.response is not None
            seen += 1
    assert seen == items


async def _loop(items: int, perform: Perform, *, workers: int) -> None:
    from cloudinary_analyze import Captioning

    urls = map(build_image_url, range(items))
    seen = 0

    async def work() -> None:
        nonlocal seen
        for url in urls:
            response = await perform(Captioning(url))
            assert response is not None
            seen += 1

    await asyncio.gather(*[work() for _ in range(workers)])
    assert seen == items


async def _measure_run(
    run: Callable[[int, Perform], Awaitable[None]], job: Job, *, switch: bool
) -> Sample:
    perform = _build_perform(switch=switch)
    await run(WARM_UP_ITEMS, perform)
    gc.collect()
    peak, cpu = read_peak_memory(), time.process_time()
    await run(job.items, perform)
    cpu = time.process_time() - cpu
    return Sample(
        value=cpu * 1e6 / job.items,
        notes={GROWTH: read_peak_memory() - peak, "items": job.items},
    )


def _measure(run: Callable[[int, Perform], Awaitable[None]], job: Job, *, switch: bool) -> Samples:
    yield asyncio.run(_measure_run(run, job, switch=switch))


def _build_cell(name: str, *, switch: bool, ordered: bool, quick: bool) -> Cell:
    return Cell(
        name=name,
        unit="µs CPU an item",
        contenders={
            OURS: partial(_measure, partial(_stream, ordered=ordered), switch=switch),
            BASELINE: partial(
                _measure, partial(_loop, workers=WINDOW if switch else 1), switch=switch
            ),
        },
        baseline=BASELINE,
        targets=(
            Target(figure="excess", most=10),
            Target(figure="note", most=50, note=GROWTH),
        ),
        quick=quick,
    )


CELLS: Final = (
    _build_cell("map", switch=False, ordered=False, quick=True),
    _build_cell("map-ordered", switch=False, ordered=True, quick=False),
    _build_cell("map-switching", switch=True, ordered=False, quick=False),
)
