"""Cells of admission alone: an attempt starts, succeeds and ends, with nothing sent.

The baseline is the gate that `AdmissionQueue` replaced: permits and a queue, but no pace, priorities
or outages. The difference is their cost per call to a service that does not throttle.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.services import PERMITS
from cloudinary_analyze._clock import SystemClock
from cloudinary_analyze._http.admission import Admission
from cloudinary_analyze._http.waiting import AdmissionQueue

GATE: Final = "plain gate"
SEMAPHORE: Final = "asyncio.Semaphore"
TASKS: Final = 2 * PERMITS
PART: Final = 10  # divides the items of a job

Attempt = Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]


class _Gate:
    """The unthrottled paths of the earlier gate, in order of arrival."""

    def __init__(self, permits: int) -> None:
        self.allowed = self.permits = permits
        self.in_use = 0
        self.waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    @property
    def idle(self) -> bool:
        return self.in_use < self.allowed and not self.waiters

    async def acquire(self) -> None:
        granted = asyncio.get_running_loop().create_future()
        self.waiters[granted] = None
        try:
            await granted
        except BaseException:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.release()
            else:
                self.waiters.pop(granted, None)
            raise

    def succeed(self) -> None:
        if self.allowed < self.permits:
            self.allowed += 1

    def release(self) -> None:
        self.in_use -= 1
        if self.waiters:
            self.hand_out()

    def hand_out(self) -> None:
        while self.waiters and self.in_use < self.allowed:
            granted, _ = self.waiters.popitem(last=False)
            if not granted.done():
                self.in_use += 1
                granted.set_result(None)


def _build_ours() -> Attempt:
    queue = AdmissionQueue(Admission(PERMITS), SystemClock(), lambda _: TimeoutError())

    async def attempt(work: Callable[[], Awaitable[None]]) -> None:
        # bulk work also passes the time when its call began
        started = queue.start_at_once() or await queue.start(since=0.0, patience=120.0)
        try:
            await work()
            queue.succeed(started)
        finally:
            queue.release(started)

    return attempt


def _build_gate() -> Attempt:
    gate = _Gate(PERMITS)

    async def attempt(work: Callable[[], Awaitable[None]]) -> None:
        if gate.idle:
            gate.in_use += 1
        else:
            await gate.acquire()
        try:
            await work()
            gate.succeed()
        finally:
            gate.release()

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
    builders = {GATE: _build_gate, OURS: _build_ours, SEMAPHORE: _build_semaphore}
    return Cell(
        name=name,
        unit=f"µs CPU an attempt, {tasks} tasks",
        contenders={
            contender: partial(_measure, build, tasks) for contender, build in builders.items()
        },
        baseline=GATE,
        targets=(Target(figure="excess", most=0.5),),
        sliced=True,
    )


CELLS: Final = (_build_cell("admission", 1), _build_cell("admission-queued", TASKS))
