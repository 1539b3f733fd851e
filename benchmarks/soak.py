"""``python -m benchmarks soak``: one session at full rate for minutes, while the service fails.

A stream of calls and a stream of tasks run without end, in one session, against an emulator with
mixed faults. Webhooks arrive over HTTP. Each second the process's memory, descriptors, loop lag and
outcomes are noted. The last lines say whether memory and descriptors stayed constant.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import attrs
from aiohttp import web

from benchmarks.drawing import Line, Panel, draw
from benchmarks.lag import LoopLag
from benchmarks.memory import read_allocated, read_resident
from benchmarks.processes import ROOT
from benchmarks.soaking import run_faulty_service
from cloudinary_analyze import AnalyzeSession, Captioning, Credentials, Delivery, Settings
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver
from cloudinary_analyze.serialization import to_dict

SECONDS: Final = 600
LEAST_SECONDS: Final = 10
SPARE_DESCRIPTORS: Final = 8  # for the connections of one more burst
# The shares by which allocated and resident memory may grow over the second half. Free memory
# between allocations grows for a while, faster while the rate rises.
LARGEST_GROWTH: Final = 0.05
LARGEST_GROWTH_OF_RESIDENT: Final = 0.25


@attrs.frozen(kw_only=True)
class Sample:
    """One second.

    Attributes:
        at: Seconds since the start.
        resident: MiB.
        allocated: MiB of them that malloc has allocated.
        blocks: Blocks of small objects in use by Python's allocator.
        descriptors: Open descriptors.
        lag: The longest time that the loop was late, in milliseconds.
        answered: Outcomes with a response.
        failed: Outcomes with an error.
    """

    at: float
    resident: float
    allocated: float
    blocks: int
    descriptors: int
    lag: float
    answered: int
    failed: int


@attrs.define
class Soak:
    """A run and its samples."""

    samples: list[Sample] = attrs.field(factory=list)
    answered: int = 0
    failures: Counter[str] = attrs.field(factory=Counter)
    stats: dict[str, Any] = attrs.field(factory=dict)

    async def run(self, cloudinary_url: str, seconds: float) -> None:
        """Run for some seconds, then close everything."""
        credentials = Credentials.from_url(cloudinary_url)
        deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        settings = Settings(
            backoff_first=0.05,
            backoff_max=1,
            poll_first=2,
            poll_longest=5,
            polls_per_second=500,
            result_grace=5,
            failure_grace=2,
            # memory reaches its plateau within a minute
            answered_count=2_000,
            answered_seconds=30,
            parked_seconds=30,
        )
        async with (
            _receive(deliveries, credentials) as hook,
            AnalyzeSession(
                credentials, settings=settings, notifications=deliveries, notification_url=hook
            ) as session,
        ):
            tasks = [
                asyncio.create_task(self._stream(session, "call")),
                asyncio.create_task(self._stream(session, "task")),
                asyncio.create_task(self._take_samples()),
            ]
            done, _ = await asyncio.wait(
                tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in done:  # it ends only with an error
                task.result()
            self.stats = to_dict(session.stats)

    async def _stream(self, session: AnalyzeSession, mode: Literal["call", "task"]) -> None:
        numbers = itertools.count()
        urls = (f"https://pictures.example.com/{mode}/{number}.jpg" for number in numbers)
        async with session.map(urls, Captioning, mode=mode, window=256) as stream:
            async for outcome in stream:
                if outcome.error is None:
                    self.answered += 1
                else:
                    self.failures[type(outcome.error).__name__] += 1

    async def _take_samples(self) -> None:
        begun, lag = time.monotonic(), LoopLag()
        answered = failed = 0
        for second in itertools.count(1):
            await asyncio.sleep(begun + second - time.monotonic())
            self.samples.append(
                Sample(
                    at=time.monotonic() - begun,
                    resident=read_resident(),
                    allocated=read_allocated(),
                    blocks=sys.getallocatedblocks(),
                    descriptors=len([*Path("/proc/self/fd").iterdir()]),
                    lag=max(lag.take(), default=0.0),
                    answered=self.answered - answered,
                    failed=self.failures.total() - failed,
                )
            )
            answered, failed = self.answered, self.failures.total()

    def judge(self) -> tuple[list[str], bool]:
        """Return what the samples say, and whether memory and descriptors stayed constant."""
        half = len(self.samples) // 2
        first, second = self.samples[:half], self.samples[half:]
        growth, most = _measure_growth([sample.resident for sample in second])
        allocated = _measure_growth([sample.allocated for sample in second])
        blocks = _measure_growth([sample.blocks for sample in second])
        memory_kept = growth < LARGEST_GROWTH_OF_RESIDENT * most and all(
            grown < LARGEST_GROWTH * greatest for grown, greatest in (allocated, blocks)
        )
        before = max(sample.descriptors for sample in first)
        after = max(sample.descriptors for sample in second)
        descriptors_kept = after <= before + SPARE_DESCRIPTORS
        lags = sorted(sample.lag for sample in self.samples)
        throughput = f"{self.answered:,} answered, {self.answered / len(self.samples):.0f}/s"
        lag = (
            f"median of the longest of each second {statistics.median(lags):.1f} ms, "
            f"p99 {lags[int(0.99 * len(lags))]:.1f} ms, longest {lags[-1]:.1f} ms"
        )
        memory = (
            f"{60 * growth / len(second):+.2f} MiB a minute resident over the second half, "
            f"{growth:+.1f} in all, at most {most:.1f}; malloc {allocated[0]:+.2f} of "
            f"{allocated[1]:.1f} MiB; small objects {100 * blocks[0] / blocks[1]:+.1f} %: "
            f"{'constant' if memory_kept else 'GROWS'}"
        )
        descriptors = (
            f"at most {before} in the first half and {after} in the second: "
            f"{'constant' if descriptors_kept else 'GROW'}"
        )
        failed = f"{self.failures.total():,} failed ({_list_counts(self.failures)})"
        lines = [
            f"throughput: {throughput}; {failed}",
            f"loop lag: {lag}",
            f"memory: {memory}",
            f"descriptors: {descriptors}",
        ]
        return lines, memory_kept and descriptors_kept

    def draw(self) -> str:
        """Return the picture."""

        def take(name: str) -> list[float]:
            return [getattr(sample, name) for sample in self.samples]

        return draw(
            "A session at full rate while the service fails",
            [
                Panel(
                    title="Memory, MiB",
                    lines=[
                        Line(name="resident", values=take("resident")),
                        Line(name="malloc", values=take("allocated")),
                    ],
                ),
                Panel(title="Descriptors", lines=[Line(values=take("descriptors"))]),
                Panel(
                    title="Longest loop lag in each second, ms", lines=[Line(values=take("lag"))]
                ),
                Panel(
                    title="Outcomes per second",
                    lines=[
                        Line(name="answered", values=take("answered")),
                        Line(name="failed", values=take("failed")),
                    ],
                ),
            ],
        )


def _measure_growth(values: Sequence[float]) -> tuple[float, float]:
    """Return how much the values grew, by linear regression, and the greatest."""
    slope, _ = statistics.linear_regression(range(len(values)), values)
    return slope * len(values), max(values)


def _list_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "none"


@contextlib.asynccontextmanager
async def _receive(
    deliveries: asyncio.Queue[Delivery], credentials: Credentials
) -> AsyncIterator[str]:
    """Receive webhooks over HTTP. Yield their URL."""
    app = web.Application()
    app.router.add_post("/hook", WebhookReceiver(deliveries, credentials).handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    finally:
        await runner.cleanup()


def _read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--seconds", type=int, default=SECONDS, metavar="N", help="default: 600")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the file for the JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="the file for the picture")
    read = parser.parse_args(arguments)
    if read.seconds < LEAST_SECONDS:
        parser.error(f"--seconds must be {LEAST_SECONDS} or more.")
    return read


def _name_files(options: argparse.Namespace) -> Iterator[Path]:
    name = f"soak-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for path, ending in ((options.json, "json"), (options.svg, "svg")):
        yield path or ROOT / "benchmarks" / "results" / f"{name}.{ending}"


def main(arguments: Sequence[str]) -> int:
    """Run the soak; return the exit code."""
    options = _read_arguments(arguments)
    soak = Soak()
    with run_faulty_service() as cloudinary_url:
        asyncio.run(soak.run(cloudinary_url, options.seconds + 0.5))
    lines, constant = soak.judge()
    document = {
        "samples": [attrs.asdict(sample) for sample in soak.samples],
        "failures": soak.failures,
        "stats": soak.stats,
        "verdict": lines,
    }
    data, picture = _name_files(options)
    for path, text in ((data, json.dumps(document) + "\n"), (picture, soak.draw())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print("\n".join([*lines, f"picture: {picture}"]))
    return 0 if constant else 1
