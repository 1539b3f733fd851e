"""The progress of a run, drawn on a terminal's stderr: done, failed, rate, time and quota left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Self

import attrs
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cloudinary_analyze.responses import Limit

INTERVAL: Final = 0.2  # seconds


@attrs.frozen(kw_only=True)
class Reading:
    """How far a run has come.

    Attributes:
        done: Items with an outcome, failed ones included.
        failed: Items whose outcome is an error.
        total: Items in all; ``None`` if that is not known.
        quota: What is known of the quotas.
    """

    done: int
    failed: int
    total: int | None
    quota: Mapping[str, Limit]


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("–/s" if speed is None else f"{speed:,.1f}/s")


def describe_quota(quota: Mapping[str, Limit]) -> str:
    """Return what is left of each quota, for one line."""
    left = [
        f"{name} {limit.remaining:,}"
        for name, limit in quota.items()
        if limit.remaining is not None
    ]
    return f"quota left: {', '.join(left)}" if left else ""


@attrs.define(eq=False)
class RunProgress:
    """Draws a run's progress while its block lasts.

    Attributes:
        console: Where to draw; ``None``: nowhere.
        read: Tells how far the run is; asked a few times a second, however fast the run is.
    """

    console: Console | None
    read: Callable[[], Reading]
    _progress: Progress | None = attrs.field(default=None, init=False)
    _row: TaskID | None = attrs.field(default=None, init=False)
    _ticker: asyncio.Task[None] | None = attrs.field(default=None, init=False)

    async def __aenter__(self) -> Self:
        if self.console is not None:
            self._progress = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("[red]{task.fields[failed]:,} failed"),
                _RateColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[quota]}", markup=False),
                console=self.console,
                auto_refresh=False,
                redirect_stdout=False,  # a terminal may show the results, too
            )
            self._row = self._progress.add_task("", total=None, failed=0, quota="")
            self._progress.start()
            self._ticker = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is None or self._ticker is None:
            return
        self._ticker.cancel()
        await asyncio.wait({self._ticker})
        self._draw()
        self._progress.stop()

    async def _tick(self) -> None:
        while True:
            self._draw()
            await asyncio.sleep(INTERVAL)

    def _draw(self) -> None:
        if self._progress is None or self._row is None:
            return
        reading = self.read()
        self._progress.update(
            self._row,
            completed=reading.done,
            total=reading.total,
            failed=reading.failed,
            quota=describe_quota(reading.quota),
            refresh=True,
        )
