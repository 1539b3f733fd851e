"""The cell of pending tasks without a waiting handle: bytes each, polls each, lag of the loop.

The tasks are accepted and polled over real sockets. What a task costs is counted beyond its
request, which the program holds anyway.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import TYPE_CHECKING, Any, Final

from benchmarks.clients import build_session
from benchmarks.lag import LoopLag, compute_p99
from benchmarks.memory import read_memory
from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.notices import build_notice
from benchmarks.payloads import ANSWERS, build_image_url
from benchmarks.server import run_server

if TYPE_CHECKING:
    from cloudinary_analyze import AnalysisTask, AnalyzeSession, Captioning, Delivery

BATCH: Final = 1000
PART: Final = 10  # divides the items of a job
WATCH_SECONDS: Final = 10.0
LAG: Final = "loop lag p99 ms"


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
    polls, lag, cpu = session.stats.polls, LoopLag(), time.process_time()
    await asyncio.sleep(WATCH_SECONDS)
    busy = (time.process_time() - cpu) / WATCH_SECONDS
    waiting = compute_p99(lag.stop())
    rate = (session.stats.polls - polls) / WATCH_SECONDS

    notices = [build_notice(task.task_id or "", ANSWERS["captioning"]) for task in tasks]
    lag, cpu = LoopLag(), time.process_time()
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
            "loop lag p99 ms while resolving": compute_p99(lag.stop()),
            "CPU % while pending": 100 * busy,
            "polls a second": rate,
            "polls a resolved task": session.stats.polls / len(tasks),
            "µs CPU a submission": 1e6 * submitting / count,
            "µs CPU a resolution": 1e6 * resolving / len(tasks),
            "tasks": count,
        },
    )


async def _run(job: Job) -> Sample:
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    async with build_session(job.url, notifications=queue) as session:
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
