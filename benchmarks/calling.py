"""Cells that call over the network: client CPU per call, and wall time under latency."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from benchmarks import clients
from benchmarks.clients import Call, Opener, Workload
from benchmarks.model import OURS, Cell, Job, Sample, Target
from benchmarks.server import read_usage

BASELINE: Final = "aiohttp + orjson"
OPENERS: Final[dict[str, Opener]] = {
    OURS: clients.open_ours,
    BASELINE: clients.open_aiohttp_orjson,
    "aiohttp + json": clients.open_aiohttp_json,
    "httpx + orjson": clients.open_httpx,
    "vendor's SDK": clients.open_vendor,
}
IN_FLIGHT: Final = (1, 16, 64, 256)
WARM_UP: Final = 0.3  # of the measured time
LEAST_CALLS: Final = (
    10  # by each of those in flight: the first are a burst, and cost some clients far more
)
LATENCY: Final = 0.2

CAPTIONING_TARGET: Final = Target(figure="ratio", most=1.10)
COCO_TARGET: Final = Target(figure="ratio", most=1.25)
READ_TARGET: Final = Target(figure="ratio", most=1.60)
LATENCY_TARGET: Final = Target(figure="ratio", most=1.10)


async def _drive(call: Call, *, in_flight: int, seconds: float) -> int:
    """Keep `in_flight` calls going for a while, some calls each at least; return how many."""
    numbers = itertools.count()
    until = time.perf_counter() + seconds

    async def keep_calling() -> None:
        made = 0
        while made < LEAST_CALLS or time.perf_counter() < until:
            await call(next(numbers))
            made += 1

    await asyncio.gather(*[keep_calling() for _ in range(in_flight)])
    return next(numbers)


async def _measure(
    opener: Opener, load: Workload, seconds: float
) -> tuple[int, float, float, float]:
    """Return how many calls were made, and CPU, wall and the server's CPU seconds they took."""
    async with opener(load) as call:
        # the first calls make the connections and fill caches
        await _drive(call, in_flight=load.in_flight, seconds=WARM_UP * seconds)
        gc.collect()
        served = read_usage(load.url)
        cpu, wall = time.process_time(), time.perf_counter()
        calls = await _drive(call, in_flight=load.in_flight, seconds=seconds)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return calls, cpu, wall, read_usage(load.url) - served


def _measure_calls(
    opener: Opener,
    job: Job,
    *,
    model: str,
    read: bool,
    in_flight: int,
    uvloop: bool,
    by_wall: bool,
) -> Sample:
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if uvloop:
        from uvloop import new_event_loop as factory
    load = Workload(model=model, read=read, in_flight=in_flight, url=job.url)
    with asyncio.Runner(loop_factory=factory) as runner:
        calls, cpu, wall, served = runner.run(_measure(opener, load, job.seconds))
    per_call = 1e6 / calls
    return Sample(
        value=(wall if by_wall else cpu) * per_call,
        notes={
            "CPU µs a call": cpu * per_call,
            "wall µs a call": wall * per_call,
            "calls": calls,
            "server busy %": 100 * served / wall,
        },
    )


def _build_cell(
    name: str,
    *,
    model: str,
    in_flight: int,
    target: Target | None,
    read: bool = False,
    uvloop: bool = False,
    quick: bool = False,
    delay: float = 0.0,
) -> Cell:
    by_wall = delay > 0
    # the vendor's SDK loses the detections, so it cannot take part where they are read
    openers = {name: opener for name, opener in OPENERS.items() if not (read and "vendor" in name)}
    return Cell(
        name=name,
        unit="µs wall a call" if by_wall else "µs CPU a call",
        contenders={
            contender: partial(
                _measure_calls,
                opener,
                model=model,
                read=read,
                in_flight=in_flight,
                uvloop=uvloop,
                by_wall=by_wall,
            )
            for contender, opener in openers.items()
        },
        baseline=BASELINE,
        targets=(target,) if target else (),
        quick=quick,
        server=True,
        delay=delay,
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
                yield _build_cell(
                    f"{name}-{in_flight}{'-uvloop' if uvloop else ''}",
                    model=model,
                    read=read,
                    in_flight=in_flight,
                    uvloop=uvloop,
                    target=target if held else None,
                    quick=held,
                )
    yield _build_cell(
        "latency-256",
        model="captioning",
        in_flight=256,
        target=LATENCY_TARGET,
        delay=LATENCY,
    )


CELLS: Final = tuple(_build_cells())
