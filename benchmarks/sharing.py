"""The cell of interactive calls during bulk work in one session: how long each waits."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from benchmarks.clients import build_session
from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.payloads import build_image_url
from benchmarks.server import run_server

BASELINE: Final = "interactive calls alone"
PERMITS: Final = 64
ITEMS: Final = 100_000  # more than fit into the time
LATENCY: Final = 0.1
PER_SECOND: Final = 20
SECONDS: Final = 10.0
WARM_UP: Final = 2.0

Perform = Callable[[], Awaitable[object]]


async def _call_at_a_rate(perform: Perform, seconds: float) -> list[float]:
    """Return how long each call took, in order."""

    async def measure() -> float:
        begun = time.perf_counter()
        await perform()
        return time.perf_counter() - begun

    loop = asyncio.get_running_loop()
    begun, tasks = loop.time(), []
    for number in range(int(seconds * PER_SECOND)):
        await asyncio.sleep(begun + number / PER_SECOND - loop.time())
        tasks.append(asyncio.create_task(measure()))
    return list(await asyncio.gather(*tasks))


async def _measure_calls(url: str, *, bulk: bool) -> Sample:
    from cloudinary_analyze import Captioning

    done = 0
    async with build_session(url, permits=PERMITS) as session:

        async def work() -> None:
            nonlocal done
            async with session.map(map(build_image_url, range(ITEMS)), Captioning) as outcomes:
                async for outcome in outcomes:
                    assert outcome.error is None, outcome.error
                    done += 1

        def perform() -> Awaitable[object]:
            return session.analyze(Captioning(build_image_url(0)))

        working = asyncio.create_task(work()) if bulk else None
        await _call_at_a_rate(perform, WARM_UP)
        before = done
        took = await _call_at_a_rate(perform, SECONDS)
        finished = done - before
        if working is not None:
            assert not working.done(), "The map ended before the measurement."
            working.cancel()
            await asyncio.wait([working])
    return Sample(
        value=1e3 * statistics.quantiles(took, n=20)[-1],
        notes={
            "median ms": 1e3 * statistics.median(took),
            "slowest ms": 1e3 * max(took),
            "items of the map a second": finished / SECONDS,
        },
    )


def _measure(job: Job, *, bulk: bool) -> Samples:
    while True:
        yield asyncio.run(_measure_calls(job.url, bulk=bulk))


CELLS: Final = (
    Cell(
        name="fairness",
        unit="ms, p95 of interactive calls",
        contenders={
            OURS: partial(_measure, bulk=True),
            BASELINE: partial(_measure, bulk=False),
        },
        baseline=BASELINE,
        targets=(Target(figure="ratio", most=2.0),),
        prepare=partial(run_server, delay=LATENCY),
    ),
)
