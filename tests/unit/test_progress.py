"""Progress: the figures, the lines, and the bar around a user's `map`."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from typing import Any

import pytest
from rich.console import Console
from scripted import until
from task_support import connected

from cloudinary_analyze import AnalyzeSession, Captioning, ConfigurationError, Credentials, Limit
from cloudinary_analyze import progress as module
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.progress import (
    Meter,
    ProgressReporter,
    Reading,
    build_record,
    describe_reading,
    format_duration,
    show_progress,
)

URLS = [f"https://example.com/{number}.jpg" for number in range(30)]


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def measure(*points: tuple[float, int], total: int | None = 100, **fields: Any) -> tuple[Any, Any]:
    """Return the last reading and its meter."""
    time = Time()
    meter = Meter(time)
    reading = Reading(done=0, failed=0, total=total)
    for seconds, done in points:
        time.now = 1000.0 + seconds
        reading = Reading(done=done, failed=0, total=total, **fields)
        meter.add(reading)
    return reading, meter


def test_rate_and_time_left_follow_the_last_minute() -> None:
    slow = [(float(second), second) for second in range(30)]
    fast = [(30.0 + second, 30 + 10 * second) for second in range(100)]
    reading, meter = measure(*slow, *fast, total=2000)
    assert meter.rate == pytest.approx(10, rel=0.02)
    assert meter.estimate_left(reading) == pytest.approx((2000 - reading.done) / 10, rel=0.02)
    assert meter.elapsed == 129


def test_nothing_done_yet_has_no_rate() -> None:
    reading, meter = measure((0.0, 0), (5.0, 0))
    assert meter.rate is None
    assert meter.estimate_left(reading) is None
    assert describe_reading(reading, meter) == "0 of 100 done, 0 failed, –/s, 0:05 elapsed"


def test_a_line_shows_every_figure() -> None:
    quota = {"ai_vision": Limit("ai_vision", remaining=12_345), "x": Limit("x")}
    reading, meter = measure(
        (0.0, 0), (10.0, 50), total=1250, tasks=(120, 50, 70), quota=quota, notifications=50
    )
    assert describe_reading(reading, meter) == (
        "50 of 1,250 done, 0 failed, 5.0/s, 0:10 elapsed, 4:00 left, tasks: 120 accepted, "
        "50 completed, 70 waiting, quota left: ai_vision 12,345"
    )
    assert build_record(reading, meter) == {
        "done": 50,
        "failed": 0,
        "total": 1250,
        "rate": 5.0,
        "elapsed": 10.0,
        "remaining": 240.0,
        "tasks": {"accepted": 120, "completed": 50, "waiting": 70},
        "quota": {"ai_vision": 12345, "x": None},
    }


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90_061, "25:01:01")]
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


async def test_without_a_bar_lines_are_reported() -> None:
    lines: list[tuple[str, Any]] = []
    reading = Reading(done=3, failed=1, total=9)
    reporter = ProgressReporter(
        lambda: reading, None, lambda text, fields: lines.append((text, fields)), interval=0.01
    )
    async with reporter:
        await until(lambda: len(lines) >= 3)
    assert lines[0][0].startswith("3 of 9 done, 1 failed")
    assert lines[0][1]["total"] == 9


async def test_a_minute_without_notification_is_hinted_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(module, "READ_INTERVAL", 0.02)
    lines: list[str] = []
    tasks = [(9, 2, 7)]
    reporter = ProgressReporter(
        lambda: Reading(done=2, failed=0, tasks=tasks[0], notifications=2),
        None,
        lambda text, _: lines.append(text),
    )
    async with reporter:
        await until(lambda: lines)
        await asyncio.sleep(0.2)
    assert len(lines) == 1
    assert "No notification has arrived" in lines[0]
    assert "7 tasks are waiting" in lines[0]
    tasks[0] = (9, 9, 0)
    lines.clear()
    async with reporter:
        await asyncio.sleep(0.3)
    assert not lines


@pytest.mark.parametrize("terminal", [True, False])
async def test_a_users_map_has_the_same_bar(terminal: bool) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=80, color_system=None)
    async with Emulator() as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with AnalyzeSession(credentials) as session:
            stream = session.map(URLS, Captioning)
            found = []
            async with show_progress(session, stream, total=30, console=console) as outcomes:
                async for outcome in outcomes:
                    found.append(outcome)
    assert {outcome.item for outcome in found} == set(URLS)
    if terminal:
        assert re.search(r"30/30 0 failed.*elapsed.*\n.*quota left: object", shown.getvalue())
    else:
        assert not shown.getvalue()  # it took less than half a minute


@pytest.mark.parametrize("width", [100, 40, 25, 12])
async def test_a_narrow_bar_shows_the_counts_first(width: int) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=width, color_system=None)
    reading = Reading(done=1234, failed=0, total=100_000)
    async with ProgressReporter(lambda: reading, console, lambda *_: None):
        pass
    assert "1,234/100,0" in shown.getvalue()


async def test_leaving_early_closes_the_stream_and_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    async with Emulator(latency=0.01) as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with AnalyzeSession(credentials) as session:
            with contextlib.suppress(ZeroDivisionError):
                async with show_progress(
                    session, session.map(URLS, Captioning), console=console
                ) as outcomes:
                    async for _ in outcomes:
                        raise ZeroDivisionError
            assert session.stats.in_flight == 0
    assert len(asyncio.all_tasks()) == 1


async def test_without_rich_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    async with Emulator() as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with AnalyzeSession(credentials) as session:
            stream = session.map(URLS, Captioning)
            with pytest.raises(ConfigurationError, match=r"cloudinary-analyze\[cli\]"):
                async with show_progress(session, stream):
                    raise AssertionError
            await stream.aclose()


async def test_task_phases_are_counted() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200, color_system=None)
    async with connected(latency=0.05) as (_, session):
        stream = session.map(URLS, Captioning, mode="task")
        async with show_progress(session, stream, total=30, console=console) as outcomes:
            async for outcome in outcomes:
                assert outcome.error is None
        assert session.stats.accepted == 30
    seen = re.findall(r"tasks: (\d+) accepted, (\d+) completed, (\d+) waiting", shown.getvalue())
    phases = [tuple(map(int, numbers)) for numbers in seen]
    assert phases[-1] == (30, 30, 0)
    assert all(accepted == completed + waiting for accepted, completed, waiting in phases)
    assert [accepted for accepted, _, _ in phases] == sorted(accepted for accepted, _, _ in phases)
