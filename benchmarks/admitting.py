"""Cells of admission alone: an attempt starts, succeeds and ends, with nothing sent.

The baseline is a semaphore: permits and a queue, but no pace, priorities or outages. The difference is
their cost per call to a service that does not throttle.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.services import PERMITS
from cloudinary_analyze._clock import SystemClock
from cloudinary_analyze._http.admission import Admission
from cloudinary_analyze._http.waiting import AdmissionQueue

BASELINE: Final = "asyncio.Semaphore"
TASKS: Final = 2 * PERMITS
PART: Final = 10  # divides the items of a job

Attempt = Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]


def _build_ours() -> Attempt:
    queue = AdmissionQueue(Admission(PERMITS), SystemClock())

    async def attempt(work: Callable[[], Awaitable[None]]) -> None:
        # bulk work also passes the time when its call began
        started = queue.start_at_once() or await queue.start(since=0.0, patience=120.0)
        try:
            await work()
            queue.succeed(started)
        finally:
            queue.release(started)

    return attempt


def _build_semaphore() -> Attempt:
    semaphore = asyncio.Semaphore(PERMITS)

    async def attempt(work: Callable[[], Awaitable[None]]) -> None:
        async with semaphore:
            await work()

    return attempt


async def _yield() -> None:
    await asyncio.sleep(0)


async def _go_on() -> None: ...


async def _run(attempt: Attempt, tasks: int, each: int) -> float:
    """Return the CPU seconds of the attempts of some tasks."""
    work = _yield if tasks > 1 else _go_on

    async def repeat() -> None:
        for _ in range(each):
            await attempt(work)

    gc.collect()
    begun = time.process_time()
    await asyncio.gather(*[repeat() for _ in range(tasks)])
    return time.process_time() - begun


def _measure(build: Callable[[], Attempt], tasks: int, job: Job) -> Samples:
    each = max(1, job.items // PART // tasks)

    def run() -> float:
        return asyncio.run(_run(build(), tasks, each))

    run()
    while True:
        yield Sample(value=1e6 * run() / (tasks * each))


def _build_cell(name: str, tasks: int) -> Cell:
    builders = {OURS: _build_ours, BASELINE: _build_semaphore}
    return Cell(
        name=name,
        unit=f"µs CPU an attempt, {tasks} tasks",
        contenders={
            contender: partial(_measure, build, tasks) for contender, build in builders.items()
        },
        baseline=BASELINE,
        targets=(Target(figure="excess", most=0.5),),
        sliced=True,
    )


CELLS: Final = (_build_cell("admission", 1), _build_cell("admission-queued", TASKS))
