"""Cells of what watches a call: nothing, a hook, or OpenTelemetry, without a network.

The transport answers at once, so the figures are the session's own work in a call.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from benchmarks.clients import build_session
from benchmarks.model import OURS, Cell, Job, Sample, Samples, Target
from benchmarks.payloads import ANSWERS, build_image_url

if TYPE_CHECKING:
    from cloudinary_analyze import AnalyzeSession

HOOK: Final = "ours, with a hook"
TELEMETRY: Final = "ours, instrumented, no SDK"
PART: Final = 50  # divides the items of a job


class _InstantTransport:
    """Answers every attempt at once."""

    token = None

    def __init__(self, body: bytes) -> None:
        self.answer: tuple[int, dict[str, str], bytes] = (200, {}, body)

    async def send(self, *_: Any) -> tuple[int, dict[str, str], bytes]:
        return self.answer


def _watch_with_nothing(_: AnalyzeSession) -> None: ...


def _watch_with_hook(session: AnalyzeSession) -> None:
    session._meter.add_hook(lambda _: None)  # noqa: SLF001


def _watch_with_telemetry(session: AnalyzeSession) -> None:
    from cloudinary_analyze.telemetry import instrument

    instrument(session)


async def _call(count: int, watch: Callable[[AnalyzeSession], None]) -> float:
    """Return the CPU seconds that calls take, one after the other."""
    from cloudinary_analyze import Captioning

    async with build_session("http://127.0.0.1:9") as session:
        watch(session)
        attempts = session._connection.caller.attempts  # type: ignore[union-attr]  # noqa: SLF001
        transport = attempts.transport
        attempts.transport = _InstantTransport(ANSWERS["captioning"])
        requests = [Captioning(build_image_url(number)) for number in range(count)]
        gc.collect()
        begun = time.process_time()
        for request in requests:
            await session.analyze(request)
        taken = time.process_time() - begun
        attempts.transport = transport
        return taken


def _measure(watch: Callable[[AnalyzeSession], None], job: Job) -> Samples:
    count = job.items // PART
    asyncio.run(_call(count, watch))
    while True:
        yield Sample(value=1e6 * asyncio.run(_call(count, watch)) / count)


CELLS: Final = (
    Cell(
        name="watched-call",
        unit="µs CPU a call, no network",
        contenders={
            HOOK: partial(_measure, _watch_with_hook),
            OURS: partial(_measure, _watch_with_nothing),
            TELEMETRY: partial(_measure, _watch_with_telemetry),
        },
        baseline=OURS,
        subject=HOOK,
        targets=(Target(figure="excess", most=10.0),),
        sliced=True,
    ),
)
