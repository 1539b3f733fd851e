"""The cell of pending tasks without a waiting handle: bytes each, polls each, lag of the loop.

The tasks are accepted and polled over real sockets. What a task costs is counted beyond its
request, which the program holds anyway.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

from benchmarks.memory import read_memory
from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.notices import build_notice
from benchmarks.payloads import ANSWERS, API_KEY, API_SECRET, CLOUD, build_image_url
from benchmarks.server import run_server

if TYPE_CHECKING:
    from cloudinary_analyze import AnalysisTask, AnalyzeSession, Captioning, Delivery

BATCH: Final = 1000
PART: Final = 10  # divides the items of a job
WATCH_SECONDS: Final = 10.0
TICK: Final = 0.002  # seconds
LAG: Final = "loop lag p99 ms"


class _Lag:
    """Samples how late the event loop runs its callbacks."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._task = asyncio.create_task(self._sample())

    async def _sample(self) -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            self.samples.append(1000 * max(0.0, time.perf_counter() - due))

    def stop(self) -> float:
        """Return the 99th percentile, in milliseconds."""
        self._task.cancel()
        return statistics.quantiles(self.samples, n=100, method="inclusive")[98]


async def _submit(session: AnalyzeSession, requests: list[Captioning]) -> list[AnalysisTask[Any]]:
    tasks: list[AnalysisTask[Any]] = []
    for index in range(0, len(requests), BATCH):
        batch = [session.submit(request) for request in requests[index : index + BATCH]]
        await asyncio.gather(*(task.accepted() for task in batch))
        tasks += batch
    return tasks


async def _measure_session(
    session: AnalyzeSession, queue: asyncio.Queue[Delivery], count: int
) -> Sample:
    from cloudinary_analyze import Captioning, Delivery

    tasks = await _submit(session, [Captioning(build_image_url(-n)) for n in range(BATCH)])
    requests = [Captioning(build_image_url(number)) for number in range(count)]
    memory, cpu = read_memory(), time.process_time()
    tasks += await _submit(session, requests)
    submitting = time.process_time() - cpu
    memory = read_memory() - memory

    gc.collect()
    polls, lag, cpu = session.stats.polls, _Lag(), time.process_time()
    await asyncio.sleep(WATCH_SECONDS)
    busy = (time.process_time() - cpu) / WATCH_SECONDS
    waiting = lag.stop()
    rate = (session.stats.polls - polls) / WATCH_SECONDS

    notices = [build_notice(task.task_id or "", ANSWERS["captioning"]) for task in tasks]
    lag, cpu = _Lag(), time.process_time()
    for body, headers in notices:
        queue.put_nowait(Delivery(body, headers))
    while session.stats.pending:
        await asyncio.sleep(0.01)
    resolving = time.process_time() - cpu
    assert all(task.done() for task in tasks)
    return Sample(
        value=memory * 2**20 / count,
        notes={
            LAG: waiting,
            "loop lag p99 ms while resolving": lag.stop(),
            "CPU % while pending": 100 * busy,
            "polls a second": rate,
            "polls a resolved task": session.stats.polls / len(tasks),
            "µs CPU a submission": 1e6 * submitting / count,
            "µs CPU a resolution": 1e6 * resolving / len(tasks),
            "tasks": count,
        },
    )


async def _run(job: Job) -> Sample:
    from cloudinary_analyze import AnalyzeSession, Credentials, Settings

    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    async with AnalyzeSession(
        Credentials(CLOUD, API_KEY, API_SECRET),
        settings=Settings(host=job.url),
        notifications=queue,
    ) as session:
        return await _measure_session(session, queue, job.items // PART)


def _measure(job: Job) -> Samples:
    yield asyncio.run(_run(job))


CELLS: Final = (
    Cell(
        name="pending-tasks",
        unit="bytes a task",
        contenders={OURS: _measure},
        baseline=OURS,
        targets=(
            Target(figure="value", most=1024),
            Target(figure="note", most=20, note=LAG),
        ),
        most_rounds=2,
        prepare=run_server,
    ),
)
