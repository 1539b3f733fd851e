"""Cells of deliveries that arrive at once, and of the memory of answered tasks.

``queued-deliveries``: the loop must stay responsive while the listener processes a backlog. A
stall is the CPU time between two turns of the loop, so other processes do not count. `gc.freeze`
excludes earlier objects from collections. One full collection of what the session and
100,000 handles then hold takes about 50 ms, so stalls are also given without collections.

``answered-memory``: tasks answered with fifty detections and kept for later handles.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Final

from benchmarks.clients import build_session
from benchmarks.lag import TICK, LoopLag, compute_p99
from benchmarks.memory import read_memory
from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.notices import build_notice
from benchmarks.payloads import ANSWERS, build_task_id
from cloudinary_analyze import AnalyzeSession, Captioning, Coco, Delivery

DELIVERIES_PART: Final = 10  # divides the items of a job
ANSWERED: Final = 10_000
BATCH: Final = 500
STALL: Final = "longest without collections ms CPU"
LAG: Final = "loop lag p99 ms"
WARM_UP: Final = 200


def _open(queue: asyncio.Queue[Delivery], *, kept: int = 10_000) -> AnalyzeSession:
    return build_session(
        "http://127.0.0.1:9",
        notifications=queue,
        poll_first=3600,
        poll_longest=3600,
        polls_per_second=0.001,  # re-attached tasks are polled soon; nothing listens here
        answered_count=kept,
    )


class _Watch:
    """Samples the CPU time of each turn of the loop, and the loop's lag."""

    def __init__(self) -> None:
        self.longest = self.longest_without_collections = 0.0
        self._collecting = self._collection_began = 0.0
        gc.callbacks.append(self._note_collection)
        self._turns = asyncio.create_task(self._turn())
        self._lag = LoopLag()

    def _note_collection(self, phase: str, _info: object) -> None:
        if phase == "start":
            self._collection_began = time.process_time()
        else:
            self._collecting += time.process_time() - self._collection_began

    async def _turn(self) -> None:
        before = time.process_time()
        while True:
            self._collecting = 0.0
            await asyncio.sleep(0)
            now = time.process_time()
            taken = now - before
            self.longest = max(self.longest, taken)
            self.longest_without_collections = max(
                self.longest_without_collections, taken - self._collecting
            )
            before = now

    async def stop(self) -> list[float]:
        """Return the lags in milliseconds."""
        await asyncio.sleep(2 * TICK)  # sees the last turn, too
        gc.callbacks.remove(self._note_collection)
        self._turns.cancel()
        return self._lag.stop()


async def _resolve(queue: asyncio.Queue[Delivery], session: AnalyzeSession, count: int) -> Sample:
    task_ids = [build_task_id(number) for number in range(count + WARM_UP)]
    notices = [build_notice(task_id, ANSWERS["captioning"]) for task_id in task_ids]
    deliveries = [Delivery(body, headers) for body, headers in notices]
    tracker = session._connection.tracker  # type: ignore[union-attr]  # noqa: SLF001
    # as a stream does with a ledger's tasks; the public way bounds the ids that may be made up
    tasks = [tracker.attach(each, Captioning, trusted=True) for each in task_ids]
    for delivery in deliveries[count:]:  # imports and caches
        queue.put_nowait(delivery)
    await tasks[-1]
    del notices
    gc.collect()
    gc.freeze()
    for delivery in deliveries[:count]:
        queue.put_nowait(delivery)
    begun = time.process_time()
    watch = _Watch()
    await tasks[count - 1]
    taken = time.process_time() - begun
    lags = await watch.stop()
    assert all(task.done() for task in tasks)
    return Sample(
        value=1e3 * watch.longest,
        notes={
            STALL: 1e3 * watch.longest_without_collections,
            LAG: compute_p99(lags),
            "most loop lag ms": max(lags),
            "µs CPU a delivery": 1e6 * taken / count,
            "deliveries": count,
        },
    )


async def _measure_deliveries(job: Job) -> Sample:
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    async with _open(queue) as session:
        return await _resolve(queue, session, job.items // DELIVERIES_PART)


async def _answer(queue: asyncio.Queue[Delivery], session: AnalyzeSession, numbers: range) -> None:
    """Let tasks be answered, and keep neither handles nor deliveries."""
    tasks = []
    for number in numbers:
        tasks.append(session.task(build_task_id(number), Coco))
        body, headers = build_notice(build_task_id(number), ANSWERS["coco"])
        queue.put_nowait(Delivery(body, headers))
    await asyncio.gather(*tasks)


async def _measure_answered(job: Job) -> Sample:
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    async with _open(queue, kept=ANSWERED) as session:
        await _answer(queue, session, range(-BATCH, 0))
        before = read_memory()
        for first in range(0, ANSWERED, BATCH):
            await _answer(queue, session, range(first, first + BATCH))
        grown = read_memory() - before
        began = time.process_time()
        gc.collect()
        return Sample(
            value=grown,
            notes={
                "tasks": ANSWERED,
                "KiB a notification": len(build_notice("t", ANSWERS["coco"])[0]) / 1024,
                "ms CPU a full collection": 1e3 * (time.process_time() - began),
            },
        )


def _measure_queued(job: Job) -> Samples:
    yield asyncio.run(_measure_deliveries(job))


def _measure_kept(job: Job) -> Samples:
    yield asyncio.run(_measure_answered(job))


CELLS: Final = (
    Cell(
        name="queued-deliveries",
        unit="ms CPU of the longest stall",
        contenders={OURS: _measure_queued},
        baseline=OURS,
        targets=(
            Target(figure="value", most=75),  # 25, and 50 for a full collection
            Target(figure="note", most=25, note=STALL),
            Target(figure="note", most=8, note=LAG),
        ),
    ),
    Cell(
        name="answered-memory",
        unit="MiB of 10,000 answered tasks",
        contenders={OURS: _measure_kept},
        baseline=OURS,
        targets=(Target(figure="value", most=60),),
    ),
)
