"""A ledger that cannot be written, because it is locked, its disk is full, or it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import until
from task_support import connected

from cloudinary_analyze import (
    AnalyzeSession,
    BulkStoppedError,
    Captioning,
    Coco,
    ConfigurationError,
    Credentials,
    InvalidRequestError,
    LedgerError,
    Settings,
)
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger import SQLiteLedger
from cloudinary_analyze.ledger.sqlite import build_row

URLS = [f"https://example.com/{number}.jpg" for number in range(300)]
OWNER = {"base_url": "https://api.example.com", "cloud_name": "demo"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.ledger"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the write lock of a ledger, as a backup or a shell would."""
    with contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def open_session(emulator: Emulator, *, permits: int = 8) -> AnalyzeSession:
    credentials = Credentials.from_url(emulator.cloudinary_url)
    return AnalyzeSession(credentials, settings=Settings(permits=permits))


async def collect(session: AnalyzeSession, **options: Any) -> list[Any]:
    async with session.map(URLS, Captioning, **options) as stream:
        return [outcome async for outcome in stream]


async def until_quiet(emulator: Emulator) -> int:
    """Wait until the emulator gets no more calls, and return how many it got."""
    while True:
        before = emulator.counts.total_received
        await asyncio.sleep(0.7)
        if emulator.counts.total_received == before:
            return before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["call", "task"])
async def test_nothing_is_sent_while_the_ledger_is_locked(
    path: Path, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(latency=0.01) as (emulator, session):
        async with SQLiteLedger(path) as ledger:
            got: list[Any] = []
            async with session.map(URLS, Captioning, ledger=ledger, mode=mode, window=20) as stream:
                async for outcome in stream:
                    got.append(outcome)
                    if len(got) == 40:
                        with locked(path):
                            rest = asyncio.create_task(drain(stream, got))
                            sent = await until_quiet(emulator)
                            assert sent < 300
                            assert len(got) <= sent  # none is handed over unrecorded
                        await rest
            assert len(got) == 300
            assert all(outcome.error is None and not outcome.unrecorded for outcome in got)
            assert ledger.counts().answered == emulator.counts.total_received == 300
            await session.aclose()
    messages = [r.message for r in caplog.records if r.name == "cloudinary_analyze.ledger"]
    assert "No further request is sent" in messages[0]
    assert "can be written again" in messages[1]


async def test_no_claim_is_given_while_the_ledger_is_locked(path: Path) -> None:
    key = Captioning(URLS[0]).key
    async with SQLiteLedger(path) as ledger:
        await ledger.open(base_url="https://h", cloud_name="demo")
        with locked(path):
            recording = asyncio.create_task(ledger.record_submitted(Coco(URLS[0]).key, "t"))
            await until(lambda: ledger._use().trouble)
            assert await ledger.claim(key) is None
        async with asyncio.timeout(20):
            await recording
        assert await ledger.claim(key) is not None


async def drain(stream: Any, into: list[Any]) -> None:
    async for outcome in stream:
        into.append(outcome)


async def fail_run(emulator: Emulator, ledger: SQLiteLedger) -> tuple[list[Any], Exception]:
    """Lock a ledger in the middle of a run until its patience is over."""
    got: list[Any] = []
    async with open_session(emulator) as session:
        stream = session.map(URLS, Captioning, ledger=ledger)
        for _ in range(40):
            got.append(await anext(stream))
        with locked(ledger.path), pytest.raises(BulkStoppedError) as caught:
            async with asyncio.timeout(20):
                await drain(stream, got)
    return got, caught.value


async def test_unrecorded_responses_are_yielded_at_the_end(path: Path) -> None:
    async with Emulator() as emulator:
        async with SQLiteLedger(path, patience=0.3) as ledger:
            got, error = await fail_run(emulator, ledger)
            counts = ledger.counts()
        assert isinstance(error, BulkStoppedError)
        assert isinstance(error.reason, LedgerError)
        answered = [outcome for outcome in got if outcome.error is None]
        assert len(answered) == emulator.counts.total_done < 300
        unrecorded = [outcome for outcome in answered if outcome.unrecorded]
        assert len(answered) - len(unrecorded) == counts.answered
        assert len(unrecorded) > 0
        assert all(not o.unrecorded for o in got if o.error is not None)


async def test_rescued_responses_are_not_paid_for_again(path: Path, tmp_path: Path) -> None:
    rescued = tmp_path / "elsewhere" / "rescued.ledger"
    rescued.parent.mkdir()
    async with Emulator() as emulator:
        async with SQLiteLedger(path, patience=0.3) as ledger:
            await fail_run(emulator, ledger)
            count = await asyncio.to_thread(ledger.rescue, rescued)
            assert not await asyncio.to_thread(ledger.rescue, rescued)  # there is nothing left
        saved = SQLiteLedger(rescued).counts()
        assert saved.answered == count > 0
        assert stat.S_IMODE(rescued.stat().st_mode) == 0o600
        async with SQLiteLedger(path) as ledger, open_session(emulator) as session:
            caller = {"base_url": emulator.url, "cloud_name": emulator.cloud_name}
            await ledger.open(**caller)
            await ledger.absorb(rescued)
            got = await collect(session, ledger=ledger)
        assert all(outcome.error is None for outcome in got)
        assert emulator.counts.total_done == 300
        items = {item.source for item in SQLiteLedger(path).iter_items() if item.response}
        assert items == set(URLS)  # an export has all of them


async def test_a_rescue_of_another_cloud_is_refused(path: Path, tmp_path: Path) -> None:
    async with SQLiteLedger(tmp_path / "b.ledger") as other:
        await other.open(base_url="https://api.example.com", cloud_name="other")
    async with SQLiteLedger(path) as ledger:
        await ledger.open(**OWNER)
        with pytest.raises(LedgerError, match="belongs to other"):
            await ledger.absorb(tmp_path / "b.ledger")
        await ledger.absorb(tmp_path / "missing.ledger")
        with pytest.raises(LedgerError, match="Nothing failed"):
            ledger.rescue(tmp_path / "c.ledger")


def limit_file_sizes(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.skipif(os.name != "posix", reason="needs limits of file sizes")
async def test_open_proves_that_a_record_can_be_written(path: Path) -> None:
    async with SQLiteLedger(path) as ledger:
        await ledger.open(**OWNER)
    limit_file_sizes(60_000)
    try:
        async with Emulator() as emulator, open_session(emulator) as session:
            async with SQLiteLedger(path) as ledger:
                with pytest.raises(LedgerError, match=r"full|failed"):
                    await ledger.open(**OWNER)
            async with SQLiteLedger(path.with_name("new")) as ledger:
                with pytest.raises(LedgerError, match=r"full|failed"):
                    await collect(session, ledger=ledger)
            assert not emulator.counts.total_received
    finally:
        limit_file_sizes(resource.RLIM_INFINITY)
    async with SQLiteLedger(path) as ledger:
        await ledger.open(**OWNER)


@pytest.mark.skipif(os.name != "posix", reason="needs limits of file sizes")
async def test_a_run_continues_once_a_full_disk_has_space(path: Path) -> None:
    async with Emulator() as emulator:
        async with SQLiteLedger(path) as ledger, open_session(emulator) as session:
            got: list[Any] = []
            async with session.map(URLS, Captioning, ledger=ledger) as stream:
                async for outcome in stream:
                    got.append(outcome)
                    if len(got) == 40:
                        limit_file_sizes(100_000)
                        try:
                            rest = asyncio.create_task(drain(stream, got))
                            sent = await until_quiet(emulator)
                        finally:
                            limit_file_sizes(resource.RLIM_INFINITY)
                        await rest
            assert sent < 300
            assert len(got) == ledger.counts().answered == emulator.counts.total_done == 300


async def test_closing_is_patient_too(path: Path) -> None:
    ledger = SQLiteLedger(path)
    await ledger.open(**OWNER)
    with locked(path):
        await ledger.add_item(0, build_row(source="s", line=1, model="coco", key="ab" * 32))
        closing = asyncio.create_task(ledger.aclose())
        await asyncio.wait([closing], timeout=1.5)
        assert not closing.done()
    await closing
    assert ledger.counts().items == 1


async def test_a_failed_ledger_says_so_on_closing(path: Path) -> None:
    ledger = SQLiteLedger(path, patience=0)
    await ledger.open(**OWNER)
    with locked(path):
        await ledger.add_item(0, build_row(source="s", line=1, model="coco", key="ab" * 32))
        begun = time.monotonic()
        with pytest.raises(LedgerError, match="in use by another process"):
            await ledger.aclose()
        assert time.monotonic() - begun < 30


@pytest.mark.parametrize("patience", [-1, float("nan"), "60", None])
def test_patience_is_a_number_of_seconds(path: Path, patience: Any) -> None:
    with pytest.raises(ConfigurationError, match="`patience`"):
        SQLiteLedger(path, patience=patience)


async def test_new_ledgers_are_private_and_old_ones_keep_their_mode(path: Path) -> None:
    for mode in (0o600, 0o640):
        async with SQLiteLedger(path) as ledger:
            await ledger.open(**OWNER)
            await ledger.flush()
            modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob("a.ledger*")}
            assert modes == ({0o600} if mode == 0o600 else {0o600, 0o640})
        path.chmod(0o640)


async def test_a_link_to_a_ledger_stays_a_link(path: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    path.symlink_to(disk / "real")
    for _ in range(2):
        async with SQLiteLedger(path) as ledger:
            await ledger.open(**OWNER)
            await ledger.record_submitted("ab" * 32, "task")
    assert path.is_symlink()
    assert SQLiteLedger(disk / "real").counts().submitted == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ledger", "disk"]


@pytest.mark.parametrize(
    ("first", "second", "accepted"),
    [
        ("https://a.b/red.jpg", "https://a.b/blue.jpg", False),
        ("https://a.b/red.jpg", "https://other/red.jpg", False),
        ("https://a.b/red.jpg?sig=1#x", "https://a.b/red.jpg?sig=2", True),
        ("https://a.b/s--Ab_-1--/v1/red.jpg", "https://a.b/s--Zz--/v1/red.jpg", True),
        ("https://a.b/s--Ab--/red.jpg", "https://a.b/s--Ab--/blue.jpg", False),
        ("asset:0a", "asset:0b", False),
    ],
)
async def test_a_key_names_one_source_also_for_later_runs(
    path: Path, first: str, second: str, accepted: bool
) -> None:
    async with Emulator() as emulator:
        for source in (first, second, first):
            async with SQLiteLedger(path) as ledger, open_session(emulator) as session:
                async with session.map(
                    [source], build_request, ledger=ledger, key=lambda _: "picture"
                ) as stream:
                    (outcome,) = [outcome async for outcome in stream]
            if source == second and not accepted:
                assert isinstance(outcome.error, InvalidRequestError)
                assert "names" in outcome.error.message
            else:
                assert outcome.error is None
                assert str(outcome.response.entity) is not None
        assert emulator.counts.total_received == 1


def build_request(source: str) -> Captioning:
    from cloudinary_analyze import Asset

    kind, _, name = source.partition(":")
    return Captioning(Asset(name) if kind == "asset" else source)


async def test_a_second_source_is_refused_far_behind_the_window(path: Path) -> None:
    items = [*URLS[:100], "https://example.com/other.jpg"]
    async with Emulator() as emulator:
        async with SQLiteLedger(path) as ledger, open_session(emulator) as session:
            async with session.map(
                items,
                Captioning,
                ledger=ledger,
                window=4,
                ordered=True,
                key=lambda url: "0.jpg" if url == items[-1] else url.rpartition("/")[2],
            ) as stream:
                outcomes = [outcome async for outcome in stream]
        assert [type(outcome.error) for outcome in outcomes[:-1]] == [type(None)] * 100
        assert isinstance(outcomes[-1].error, InvalidRequestError)
        assert emulator.counts.total_received == 100


@pytest.fixture(autouse=True)
def _quiet_asyncio(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
