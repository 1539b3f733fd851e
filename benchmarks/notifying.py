"""Cells of a notification: from its bytes to a resolved task, against minimal hand-written code.

This package's part is the work of the session's listener per delivery: verify the signature in
constant time against every secret, check its age, parse it, find the task and resolve it. By hand:
one SHA-1, ``orjson.loads``, ``set_result``.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from benchmarks.clients import build_session
from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.notices import SIGNATURE_HEADER, TIMESTAMP_HEADER, build_notice
from benchmarks.payloads import ANSWERS, API_SECRET, build_task_id

if TYPE_CHECKING:
    from cloudinary_analyze import Delivery

BASELINE: Final = "by hand"
PART: Final = 500  # divides the items of a job

Resolve = Callable[["list[Delivery]", list[str]], Coroutine[Any, Any, float]]


async def _resolve_by_hand(deliveries: list[Delivery], task_ids: list[str]) -> float:
    """Return the CPU seconds that the hand-written minimum takes."""
    from orjson import loads

    loop = asyncio.get_running_loop()
    futures = {task_id: loop.create_future() for task_id in task_ids}
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    for delivery in deliveries:
        queue.put_nowait(delivery)
    secret = API_SECRET.encode()
    pending = dict(futures)
    gc.collect()
    begun = time.process_time()
    while pending:
        delivery = await queue.get()
        signed = delivery.body + delivery.headers[TIMESTAMP_HEADER].encode() + secret
        if hashlib.sha1(signed).hexdigest() == delivery.headers[SIGNATURE_HEADER]:
            content = loads(delivery.body)
            pending.pop(content["task_id"]).set_result(content)
    taken = time.process_time() - begun
    assert all(future.done() for future in futures.values())
    return taken


async def _resolve_with_ours(deliveries: list[Delivery], task_ids: list[str]) -> float:
    """Return the CPU seconds that a session takes."""
    from cloudinary_analyze import Captioning, Coco

    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    kind = Coco if b'"tags"' in deliveries[0].body else Captioning
    async with build_session(
        "http://127.0.0.1:9", notifications=queue, poll_first=3600, poll_longest=3600
    ) as session:
        tasks = [session.task(task_id, kind) for task_id in task_ids]
        tracker = session._connection.tracker  # type: ignore[union-attr]  # noqa: SLF001
        for entry in tracker.table.pending.values():
            tracker.poller.schedule(
                entry
            )  # as if accepted just now, not re-attached: no poll is due
        await asyncio.sleep(0.01)  # until the poller has seen that, too
        gc.collect()
        for delivery in deliveries:
            queue.put_nowait(delivery)
        begun = time.process_time()
        await tasks[-1]
        taken = time.process_time() - begun
        assert all(task.done() for task in tasks)
        return taken


def _measure(resolve: Resolve, job: Job, *, model: str) -> Samples:
    from cloudinary_analyze import Delivery

    task_ids = [build_task_id(number) for number in range(job.items // PART)]
    notices = [build_notice(task_id, ANSWERS[model]) for task_id in task_ids]
    deliveries = [Delivery(body, headers) for body, headers in notices]
    asyncio.run(resolve(deliveries, task_ids))
    while True:
        yield Sample(value=1e6 * asyncio.run(resolve(deliveries, task_ids)) / len(task_ids))


def _build_cells() -> Iterator[Cell]:
    for name, model in (("captioning", "captioning"), ("coco50", "coco")):
        yield Cell(
            name=f"notification-{name}",
            unit="µs CPU a notification",
            contenders={
                OURS: partial(_measure, _resolve_with_ours, model=model),
                BASELINE: partial(_measure, _resolve_by_hand, model=model),
            },
            baseline=BASELINE,
            targets=(Target(figure="ratio", most=2.5),),
            quick=name == "captioning",
            sliced=True,
        )


CELLS: Final = tuple(_build_cells())
