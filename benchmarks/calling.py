"""Cells that call over the network: client CPU per call, and wall time under latency."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from benchmarks import clients
from benchmarks.clients import Call, Opener, Workload
from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.server import read_usage, run_server

BASELINE: Final = "aiohttp + orjson"
OPENERS: Final[dict[str, Opener]] = {
    OURS: clients.open_ours,
    BASELINE: clients.open_aiohttp_orjson,
    "aiohttp + json": clients.open_aiohttp_json,
    "httpx + orjson": clients.open_httpx,
    "vendor's SDK": clients.open_vendor,
}
CONTROL: Final = "aiohttp + orjson, again"  # the same code again, to show the noise
SPEEDUPS: Final = ("aiodns", "brotli", "brotlicffi", "backports.zstd")
IN_FLIGHT: Final = (1, 16, 64, 256)
WARM_UP: Final = 5  # calls of each caller before the measurement
SECONDS_PER_CALLER: Final = 5e-4  # of a slice, so that it holds sends and responses of all
WAVES: Final = 10
LATENCY: Final = 0.2
SHORT_LATENCY: Final = 0.05  # for thousands of calls in flight

NOISE: Final = 0.03  # the control's distance from 1 on two shared cores
CAPTIONING_TARGET: Final = Target(figure="ratio", most=1.05, noise=NOISE)
COCO_TARGET: Final = Target(figure="ratio", most=1.05, noise=NOISE)
READ_TARGET: Final = Target(figure="ratio", most=1.50, noise=NOISE)
MANY_TARGET: Final = Target(figure="ratio", most=1.05, noise=NOISE)
LATENCY_TARGET: Final = Target(figure="ratio", most=1.10)


def _run_loop(*, uvloop: bool) -> asyncio.Runner:
    if not uvloop:
        return asyncio.Runner()
    from uvloop import new_event_loop

    return asyncio.Runner(loop_factory=new_event_loop)


def _measure_cpu(
    opener: Opener, job: Job, *, model: str, read: bool, in_flight: int, uvloop: bool
) -> Samples:
    """Keep a number of calls in flight, and stop the event loop between the slices."""
    load = Workload(model=model, read=read, in_flight=in_flight, url=job.url)
    seconds = max(job.seconds, in_flight * SECONDS_PER_CALLER)
    done = 0

    async def keep_calling(call: Call, numbers: Iterator[int]) -> None:
        nonlocal done
        for number in numbers:
            await call(number)
            done += 1

    async def begin(stack: contextlib.AsyncExitStack) -> list[asyncio.Task[None]]:
        call = await stack.enter_async_context(opener(load))
        numbers = itertools.count()
        tasks = [asyncio.create_task(keep_calling(call, numbers)) for _ in range(in_flight)]
        # the first calls make the connections and fill caches
        while done < WARM_UP * in_flight:
            await asyncio.sleep(seconds)
            check(tasks)
        return tasks

    def check(tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            if task.done():
                task.result()  # raises the error that ended it

    async def end(tasks: list[asyncio.Task[None]], stack: contextlib.AsyncExitStack) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await stack.aclose()

    with _run_loop(uvloop=uvloop) as runner:
        stack = contextlib.AsyncExitStack()
        tasks = runner.run(begin(stack))
        try:
            while True:
                gc.collect()
                served, calls = read_usage(job.url), done
                cpu, wall = time.process_time(), time.perf_counter()
                runner.run(asyncio.sleep(seconds))
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                calls = done - calls
                check(tasks)
                yield Sample(
                    value=cpu * 1e6 / calls,
                    notes={
                        "wall µs a call": wall * 1e6 / calls,
                        "calls": calls,
                        "server busy %": 100 * (read_usage(job.url) - served) / wall,
                    },
                )
        finally:
            runner.run(end(tasks, stack))


async def _call_in_waves(opener: Opener, load: Workload) -> float:
    """Return the wall seconds of a call, where each caller makes the same number of them."""
    async with opener(load) as call:

        async def call_often(times: int) -> None:
            for number in range(times):
                await call(number)

        await asyncio.gather(*[call_often(1) for _ in range(load.in_flight)])
        gc.collect()
        begun = time.perf_counter()
        await asyncio.gather(*[call_often(WAVES) for _ in range(load.in_flight)])
        return (time.perf_counter() - begun) / (WAVES * load.in_flight)


def _measure_wall(opener: Opener, job: Job, *, in_flight: int) -> Samples:
    load = Workload(model="captioning", read=False, in_flight=in_flight, url=job.url)
    yield Sample(value=1e6 * asyncio.run(_call_in_waves(opener, load)))


def _build_cpu_cell(
    name: str,
    *,
    in_flight: int,
    model: str = "captioning",
    read: bool = False,
    uvloop: bool = False,
    target: Target | None = None,
    delay: float = 0.0,
) -> Cell:
    measure = partial(_measure_cpu, model=model, read=read, in_flight=in_flight, uvloop=uvloop)
    # the vendor's SDK drops the detections, so it is left out of cells that read them
    openers = {name: opener for name, opener in OPENERS.items() if not (read and "vendor" in name)}
    if target is not None:
        openers[CONTROL] = openers[BASELINE]
    return Cell(
        name=name,
        unit="µs CPU a call",
        contenders={name: partial(measure, opener) for name, opener in openers.items()},
        baseline=BASELINE,
        targets=(target,) if target else (),
        quick=target is not None and not delay,
        sliced=True,
        prepare=partial(run_server, delay=delay),
    )


def _build_cells() -> Iterator[Cell]:
    kinds = (
        ("captioning", "captioning", False, CAPTIONING_TARGET),
        ("coco50", "coco", False, COCO_TARGET),
        ("coco50-read", "coco", True, READ_TARGET),
    )
    for uvloop in (False, True):
        for name, model, read, target in kinds:
            for in_flight in IN_FLIGHT:
                held = in_flight == 64 and not uvloop  # where the targets are set
                yield _build_cpu_cell(
                    f"{name}-{in_flight}{'-uvloop' if uvloop else ''}",
                    model=model,
                    read=read,
                    in_flight=in_flight,
                    uvloop=uvloop,
                    target=target if held else None,
                )
    for in_flight in (1024, 4096):
        yield _build_cpu_cell(
            f"in-flight-{in_flight}", in_flight=in_flight, target=MANY_TARGET, delay=SHORT_LATENCY
        )
    yield Cell(
        name="latency-256",
        unit="µs wall a call",
        contenders={
            name: partial(_measure_wall, opener, in_flight=256) for name, opener in OPENERS.items()
        },
        baseline=BASELINE,
        targets=(LATENCY_TARGET,),
        prepare=partial(run_server, delay=LATENCY),
    )


def _measure_with_parts(
    job: Job, *, hidden: Sequence[str], model: str, read: bool, uvloop: bool
) -> Samples:
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
    yield from _measure_cpu(
        clients.open_ours, job, model=model, read=read, in_flight=64, uvloop=uvloop
    )


def _build_speed_cells() -> Iterator[Cell]:
    parts = {
        "without any": (("orjson", *SPEEDUPS), False),
        "aiohttp[speedups]": (("orjson",), False),
        "orjson": (SPEEDUPS, False),
        "uvloop": (("orjson", *SPEEDUPS), True),
        "all of [speed]": ((), True),
    }
    for name, model, read in (
        ("captioning", "captioning", False),
        ("coco50", "coco", False),
        ("coco50-read", "coco", True),
    ):
        yield Cell(
            name=f"speed-{name}-64",
            unit="µs CPU a call",
            contenders={
                part: partial(
                    _measure_with_parts, hidden=hidden, model=model, read=read, uvloop=uvloop
                )
                for part, (hidden, uvloop) in parts.items()
            },
            baseline="without any",
            subject="all of [speed]",
            sliced=True,
            prepare=run_server,
        )


CELLS: Final = (*_build_cells(), *_build_speed_cells())
