"""Records reach the disk before they are acknowledged. Digests are compared in constant time."""

from __future__ import annotations

import functools
import inspect
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from cloudinary_analyze import AnalyzeSession, Captioning, Credentials, webhooks
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger import SQLiteLedger
from cloudinary_analyze.results.files import open_replacement

FULL = 2


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that grows by (kind, inode) with each file or directory that is synced."""
    seen: list[tuple[int, int]] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        status = os.fstat(descriptor)
        seen.append((stat.S_IFMT(status.st_mode), status.st_ino))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return seen


async def test_every_ledger_write_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: list[tuple[int, int]]
) -> None:
    modes: list[int] = []

    class Connection(sqlite3.Connection):
        def close(self) -> None:
            modes.append(self.execute("PRAGMA synchronous").fetchone()[0])
            super().close()

    connect = functools.partial(sqlite3.connect, factory=Connection)
    monkeypatch.setattr(sqlite3, "connect", connect)
    async with (
        Emulator() as emulator,
        SQLiteLedger(tmp_path / "a.ledger") as ledger,
        AnalyzeSession(Credentials.from_url(emulator.cloudinary_url)) as session,
    ):
        urls = emulator.sample_urls(2)
        assert [o.error async for o in session.map(urls, Captioning, ledger=ledger)] == [None] * 2
    assert len(modes) >= 3  # of the lock, the creation, the writer
    assert set(modes) == {FULL}
    assert (stat.S_IFDIR, tmp_path.stat().st_ino) in synced  # the rename of the new ledger


def test_results_are_synced_before_they_replace_a_file(
    tmp_path: Path, synced: list[tuple[int, int]]
) -> None:
    target = tmp_path / "results.jsonl"
    with open_replacement(target) as stream:
        stream.write(b"{}\n")
        inode = os.fstat(stream.fileno()).st_ino
        assert not target.exists()
    assert (stat.S_IFREG, inode) in synced
    assert target.stat().st_ino == inode


def test_signatures_are_compared_in_constant_time() -> None:
    source = inspect.getsource(webhooks)  # no test can measure it reliably
    assert "hmac.compare_digest(expected, signature)" in source
    assert "expected == signature" not in source
    assert "signature == expected" not in source
