"""Progress of bulk work: a bar on a terminal, and a line every 30 s elsewhere.

The bar is that of the command line. It needs rich: ``pip install 'cloudinary-analyze[cli]'``.

Wrap the stream in it:

```python
from cloudinary_analyze.progress import show_progress

async with show_progress(session, session.map(urls, Coco), total=len(urls)) as outcomes:
    async for outcome in outcomes:
        ...
```
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

import attrs

from cloudinary_analyze._clock import SYSTEM_CLOCK
from cloudinary_analyze._stream import OutcomeStream
from cloudinary_analyze.errors import ConfigurationError, shorten
from cloudinary_analyze.outcomes import Outcome
from cloudinary_analyze.responses import Limit
from cloudinary_analyze.session import AnalyzeSession

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

__all__ = ["Meter", "ProgressReporter", "Reading", "describe_reading", "show_progress"]

Item = TypeVar("Item")
A = TypeVar("A")

BAR_INTERVAL: Final = 0.2  # seconds between two drawings of a bar
READ_INTERVAL: Final = 1.0  # seconds between two readings where no bar is drawn
BAR_FROM: Final = 70  # columns of the terminal; below, there is room for the text only
LINE_INTERVAL: Final = 30.0  # seconds between two lines where no bar can be drawn
PACE_SECONDS: Final = 60.0  # over which the rate is measured
QUIET_SECONDS: Final = 60.0  # without any notification before a hint


@attrs.frozen(kw_only=True)
class Reading:
    """The progress of bulk work at one moment.

    Attributes:
        done: Items with an outcome, failed ones included.
        failed: Items whose outcome is an error.
        total: The number of all items. ``None`` if unknown.
        tasks: In task mode: tasks accepted, completed, and waiting for a notification.
        notifications: Notifications received so far.
        quota: The newest quotas, by feature.
    """

    done: int
    failed: int
    total: int | None = None
    tasks: tuple[int, int, int] | None = None
    notifications: int = 0
    quota: Mapping[str, Limit] = attrs.field(factory=dict, hash=False)


@attrs.define(eq=False)
class Meter:
    """Measures the rate of bulk work, and estimates the remaining time.

    Attributes:
        now: A function that returns monotonic seconds.
    """

    now: Callable[[], float] = SYSTEM_CLOCK.monotonic
    _begun: float = attrs.field(init=False)
    _points: deque[tuple[float, int]] = attrs.field(factory=deque, init=False)
    _notified: tuple[float, int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._begun = self.now()
        self._notified = (self._begun, -1)

    def add(self, reading: Reading) -> None:
        """Add a reading, to measure the rate of the last minute."""
        now = self.now()
        if not self._points or now - self._points[-1][0] >= 0.1:
            self._points.append((now, reading.done))
        while len(self._points) > 2 and now - self._points[0][0] > PACE_SECONDS:
            self._points.popleft()
        waiting = reading.tasks is not None and reading.tasks[2]
        if not waiting or reading.notifications != self._notified[1]:
            self._notified = (now, reading.notifications)

    @property
    def elapsed(self) -> float:
        """Seconds since the meter was created."""
        return self.now() - self._begun

    @property
    def rate(self) -> float | None:
        """Items per second over the last minute. ``None`` if nothing is done yet."""
        if not self._points:
            return None
        (first, before), (last, done) = self._points[0], self._points[-1]
        return (done - before) / (last - first) if last > first and done > before else None

    def estimate_left(self, reading: Reading) -> float | None:
        """Return the seconds until the end at the current rate. ``None`` if unknown.

        Args:
            reading: The newest reading.
        """
        if reading.total is None or self.rate is None:
            return None
        return max(0, reading.total - reading.done) / self.rate

    @property
    def quiet(self) -> bool:
        """Whether tasks have waited for a minute without a notification."""
        return self.now() - self._notified[0] >= QUIET_SECONDS


def describe_reading(reading: Reading, meter: Meter) -> str:
    """Return a reading as one line of text.

    Args:
        reading: The reading.
        meter: The meter that the readings were added to.
    """
    text = f"{reading.done:,}"
    if reading.total is not None:
        text += f" of {reading.total:,}"
    parts = [f"{text} done", f"{reading.failed:,} failed", _describe_rate(meter)]
    parts.append(_describe_time(reading, meter))
    if (tasks := _describe_tasks(reading)) is not None:
        parts.append(tasks)
    if quota := describe_quota(reading.quota):
        parts.append(quota)
    return ", ".join(parts)


def build_record(reading: Reading, meter: Meter) -> dict[str, Any]:
    """Return a reading as a mapping for JSON."""
    left = meter.estimate_left(reading)
    names = ("accepted", "completed", "waiting")
    return {
        "done": reading.done,
        "failed": reading.failed,
        "total": reading.total,
        "rate": None if meter.rate is None else round(meter.rate, 2),
        "elapsed": round(meter.elapsed, 1),
        "remaining": None if left is None else round(left, 1),
        "tasks": None if reading.tasks is None else dict(zip(names, reading.tasks, strict=True)),
        "quota": {name: limit.remaining for name, limit in reading.quota.items()},
    }


def format_duration(seconds: float) -> str:
    """Return a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _describe_counts(reading: Reading) -> str:
    """Return the counts in the markup of rich."""
    total = "?" if reading.total is None else f"{reading.total:,}"
    failed = f"{reading.failed:,} failed"
    return f"{reading.done:,}/{total} {f'[red]{failed}[/]' if reading.failed else failed}"


def _describe_rate(meter: Meter) -> str:
    return "–/s" if meter.rate is None else f"{meter.rate:,.1f}/s"


def _describe_time(reading: Reading, meter: Meter) -> str:
    left = meter.estimate_left(reading)
    text = f"{format_duration(meter.elapsed)} elapsed"
    return text if left is None else f"{text}, {format_duration(left)} left"


def _describe_tasks(reading: Reading) -> str | None:
    if reading.tasks is None:
        return None
    accepted, completed, waiting = reading.tasks
    return f"tasks: {accepted:,} accepted, {completed:,} completed, {waiting:,} waiting"


def describe_quota(quota: Mapping[str, Limit]) -> str:
    """Return what is left of each quota. Empty if unknown."""
    left = [
        f"{shorten(name)} {limit.remaining:,}"
        for name, limit in quota.items()
        if limit.remaining is not None
    ]
    return f"quota left: {', '.join(left)}" if left else ""


@attrs.define(eq=False)
class ProgressReporter:
    """Shows the progress of bulk work during its ``async with`` block.

    Attributes:
        read: Returns the current reading. Called a few times a second.
        console: Where to draw a bar. ``None``: no bar.
        report: Called with each line and its fields if there is no bar.
        interval: Seconds between two lines.
        meter: Measures the rate.
    """

    read: Callable[[], Reading]
    console: Console | None
    report: Callable[[str, Mapping[str, Any]], object]
    interval: float = LINE_INTERVAL
    meter: Meter = attrs.field(factory=Meter)
    _progress: Progress | None = attrs.field(default=None, init=False)
    _row: TaskID | None = attrs.field(default=None, init=False)
    _ticker: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _hinted: bool = attrs.field(default=False, init=False)

    async def __aenter__(self) -> Self:
        if self.console is not None:
            self._progress = _build_progress(self.console)
            self._row = self._progress.add_task("", total=None, text="", more="")
            self._progress.start()
        self._ticker = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        ticker, self._ticker = self._ticker, None
        if ticker is not None:
            ticker.cancel()
            await asyncio.wait({ticker})
        if self._progress is not None:
            self._draw(self.read())
            self._progress.stop()

    async def _tick(self) -> None:
        due = self.meter.elapsed + self.interval
        while True:
            reading = self.read()
            self.meter.add(reading)
            self._hint(reading)
            if self._progress is not None:
                self._draw(reading)
            elif self.meter.elapsed >= due:
                due += self.interval
                self.report(
                    describe_reading(reading, self.meter), build_record(reading, self.meter)
                )
            pause = READ_INTERVAL if self._progress is None else BAR_INTERVAL
            await asyncio.sleep(min(pause, self.interval))

    def _hint(self, reading: Reading) -> None:
        if not self.meter.quiet:
            self._hinted = False
        elif not self._hinted and reading.tasks is not None:
            self._hinted = True
            self.report(
                f"No notification has arrived for {format_duration(QUIET_SECONDS)}, and "
                f"{reading.tasks[2]:,} tasks are waiting. Check that the service reaches the "
                "notification URL.",
                {"hint": "no notifications", "waiting": reading.tasks[2]},
            )

    def _draw(self, reading: Reading) -> None:
        if self._progress is None or self._row is None:
            return
        more = (_describe_tasks(reading), describe_quota(reading.quota))
        self._progress.update(
            self._row,
            completed=reading.done,
            total=reading.total,
            text=f"{_describe_counts(reading)} {_describe_rate(self.meter)} "
            f"{_describe_time(reading, self.meter)}",
            more=", ".join(part for part in more if part),
            refresh=True,
        )


def _build_progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.text import Text

    class TwoLines(Progress):
        """The bar, and below it the texts that do not fit next to it on a narrow terminal."""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            more = " ".join(task.fields["more"] for task in self.tasks)
            if more:
                yield Text(more, no_wrap=True, overflow="ellipsis")

    # one column of text, because several would lose the counts first on a narrow terminal
    bar = [BarColumn(bar_width=20)] if console.width >= BAR_FROM else []
    return TwoLines(
        *bar,
        TextColumn("{task.fields[text]}"),
        console=console,
        auto_refresh=False,
        redirect_stdout=False,  # the terminal may also show the results
    )


class _Counted(Generic[Item, A]):
    """Counts the outcomes of a stream as it yields them."""

    def __init__(
        self, session: AnalyzeSession, stream: OutcomeStream[Item, A], total: int | None
    ) -> None:
        self._session, self._stream, self._total = session, stream, total
        self._done = self._failed = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Outcome[Item, A]:
        outcome = await anext(self._stream)
        self._done += 1
        self._failed += outcome.error is not None
        return outcome

    def read(self) -> Reading:
        stats = self._session.stats
        notifications = sum(stats.notifications.values())
        tasks = None
        if stats.accepted or stats.pending:
            accepted = max(stats.accepted, stats.pending)  # some may belong to an earlier run
            tasks = (accepted, accepted - stats.pending, stats.pending)
        return Reading(
            done=self._done,
            failed=self._failed,
            total=self._total,
            tasks=tasks,
            notifications=notifications,
            quota=self._session.quota,
        )


@asynccontextmanager
async def show_progress(
    session: AnalyzeSession,
    stream: OutcomeStream[Item, A],
    *,
    total: int | None = None,
    console: Console | None = None,
) -> AsyncIterator[AsyncIterator[Outcome[Item, A]]]:
    """Show the progress of a stream on stderr, and yield its outcomes.

    Draws a bar with counts, rate, elapsed and remaining time, tasks and quota on a terminal.
    Elsewhere it prints a line every 30 s. Leaving the block closes the stream.

    Args:
        session: The session of the stream, for tasks and quota.
        stream: From `AnalyzeSession.map`.
        total: The number of items. ``None``: unknown, so no remaining time is shown.
        console: A console of rich. Default: one on stderr.

    Raises:
        ConfigurationError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError:
        raise ConfigurationError(
            "show_progress needs rich, which is not installed: "
            "pip install 'cloudinary-analyze[cli]'"
        ) from None
    shown = Console(file=sys.stderr, highlight=False) if console is None else console
    counted = _Counted(session, stream, total)
    reporter = ProgressReporter(
        counted.read,
        shown if shown.is_terminal and not shown.is_dumb_terminal else None,
        lambda text, _: shown.print(Text(text), soft_wrap=True),
    )
    async with stream, reporter:
        yield counted
